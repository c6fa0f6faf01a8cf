"""What a file has of a `MixtureOfExperts` itself: counts, its losses, and random draws."""

import numpy as np
from keras import ops

from keras_moe._internal.saved_state import load_draws, save_draws


def save_state(layer, store):
    """Put it into the store of the layer's weights."""
    # Without the sums that `ExpertMonitor` resets each epoch, which do not affect training.
    for key, variable in _saved(layer).items():
        store[key] = ops.convert_to_numpy(variable)
    weights = layer.loss_weights_in_force
    for key, index in _weight_keys(layer):
        store[key] = np.array([layer.router_losses[index].weight, weights[index]], "float32")
    if layer.last_counts is not None:
        store["last_counts"] = layer.last_counts
    save_draws(layer, store)


def load_state(layer, store):
    """Load what `save_state` has put there, by a layer with these losses or with others.

    Raises:
        ValueError: If the layer is not built, or the weights are not those of such a layer.
    """
    entries = load_draws(layer, store)
    if not layer.built and "expert_counts" in entries:
        raise ValueError(
            "Weights are loaded into a layer that is built. Received: "
            f"`load_weights` for layer {layer.name!r}, which is not. Call the model on inputs, "
            "or build it, first."
        )
    if layer.built and "expert_counts" not in entries:
        raise ValueError(
            "The file must have the weights of a `MixtureOfExperts` for layer "
            f"{layer.name!r}. Received: {sorted(entries) or 'nothing'} for it. Load what the same "
            "model has saved; `upcycle` makes experts of dense layers."
        )
    for key, variable in _saved(layer).items():
        # A checkpoint fits a layer with other losses: those keep their own state.
        if key in ("expert_counts", "dropped_count") or _fits(variable, entries.get(key)):
            variable.assign(entries[key])
    for key, index in _weight_keys(layer):
        initial, weight = entries.get(key, (None, None))
        # A loss that was made with another weight keeps it, instead of the one that a schedule
        # left.
        if initial == np.float32(layer.router_losses[index].weight):
            layer.set_router_loss_weight(index, float(weight))
    counts = entries.get("last_counts")
    has_counts = layer.built and _fits(layer.expert_counts, counts)
    layer.last_counts = np.asarray(counts) if has_counts else None
    layer.last_losses = None


def _saved(layer):
    """The variables that are saved, by the keys of their entries."""
    if not layer.built:
        return {}
    saved = {counter.name: counter for counter in (layer.expert_counts, layer.dropped_count)}
    for index, (loss, states) in enumerate(zip(layer.router_losses, layer.loss_states)):
        for number, variable in enumerate(states):
            saved[f"{_key(index, loss)}_state_{number}"] = variable
    return saved


def _weight_keys(layer):
    losses = enumerate(layer.router_losses)
    return [(f"{_key(index, loss)}_weight", index) for index, loss in losses]


def _key(index, loss):
    """What the entries of a loss begin with in a saved layer."""
    return f"router_loss_{index}_{type(loss).__name__}"


def _fits(variable, entry):
    return entry is not None and tuple(entry.shape) == tuple(variable.shape)
