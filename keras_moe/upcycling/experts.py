"""Weights and regularizers of experts, from those of a dense feed-forward network.

Axes: D features, H hidden width of the network, E experts, G experts that share a copy of it.
"""

import keras
import numpy as np
from keras import ops

# Sums over the elements, or none.
_SUMS = (type(None), keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


def expert_weights(feed_forward, num_experts, granularity, reinitialized, rng):
    """Stacked weights of experts, float32 arrays by the names of a bank's.

    Expert `c * G + g` gets the g-th of G equal parts of the hidden features of copy c. The bias of
    the output is divided among the parts, so that the sum of G parts is the whole network.

    Args:
        feed_forward: a `FeedForward`.
        num_experts: E, divisible by G.
        granularity: G, divides H.
        reinitialized: share of the hidden features of each expert that is drawn again, with the
            mean and the standard deviation of the old ones. Drop-Upcycling (arXiv:2502.19261),
            section 3.2.
        rng: NumPy generator.
    """
    parts = {}
    for name in ("gate", "up"):
        dense = getattr(feed_forward, name)
        if dense is not None:
            parts[f"{name}_kernel"] = np.split(_array(dense.kernel), granularity, axis=1)
            parts[f"{name}_bias"] = np.split(_bias(dense), granularity)
    down = feed_forward.down
    parts["down_kernel"] = np.split(_array(down.kernel), granularity)
    parts["down_bias"] = [_bias(down) / granularity] * granularity
    copies = num_experts // granularity
    weights = {name: np.stack(each * copies) for name, each in parts.items()}
    if reinitialized:
        _draw_again(weights, reinitialized, rng)
    return weights


def _draw_again(weights, share, rng):
    """Draw a share of the hidden features of each expert again, others in each."""
    num_experts, width, _ = weights["down_kernel"].shape
    for expert in range(num_experts):
        chosen = rng.permutation(width)[: round(share * width)]
        for name, value in weights.items():
            if name.endswith("kernel") and len(chosen):
                # Hidden features are the rows of `down_kernel`, columns elsewhere.
                kernel = value[expert] if name == "down_kernel" else value[expert].T
                old = kernel[chosen]
                kernel[chosen] = rng.normal(old.mean(), old.std(), old.shape)


def _bias(dense):
    return _array(dense.bias) if dense.use_bias else np.zeros(dense.units, "float32")


def _array(variable):
    return ops.convert_to_numpy(ops.cast(variable.value, "float32"))


def bank_regularizer(denses, kind, copies):
    """The regularizer of a bank that adds as much to the loss as that of the dense layers.

    Args:
        denses: `Dense` layers with the same regularizers.
        kind: "kernel" or "bias".
        copies: number of copies, E / G: sums over their elements are as many times as large.
    """
    l1, l2 = next(map(_factors, _regularizers(denses, kind)), (0.0, 0.0))
    return keras.regularizers.L1L2(l1 / copies, l2 / copies) if l1 or l2 else None


def check_penalties(feed_forward, granularity):
    """Refuse penalties and constraints that a bank would lose, or that would change the loss."""
    received = next(_obstacles(feed_forward, granularity), None)
    if received is not None:
        raise ValueError(
            "The `Dense` layers must have one `kernel_regularizer` and one `bias_regularizer`, "
            "`L1`, `L2` or `L1L2`, and no constraint or `activity_regularizer`. "
            f"Received: {received} in {feed_forward.name!r}"
        )


def _obstacles(feed_forward, granularity):
    for part in feed_forward.layers:
        for layer in part._flatten_layers():
            if layer.activity_regularizer is not None:
                yield f"an `activity_regularizer` of `{layer.name}`"
    for dense in feed_forward.denses:
        if dense.kernel_constraint is not None or dense.bias_constraint is not None:
            yield f"a constraint of `{dense.name}`"
    for kind in ("kernel", "bias"):
        regularizers = _regularizers(feed_forward.denses, kind)
        for regularizer in regularizers:
            if type(regularizer) not in _SUMS:
                yield f"{regularizer!r} as `{kind}_regularizer`"
        if len(set(map(_factors, regularizers))) > 1:
            yield f"different `{kind}_regularizer`s"
    if granularity > 1 and bank_regularizer(feed_forward.denses, "bias", copies=1):
        # The squares of the parts' shares of the last bias do not add up to its square.
        yield f"a `bias_regularizer` with granularity={granularity}"


def _regularizers(denses, kind):
    having = [dense for dense in denses if kind == "kernel" or dense.use_bias]
    return [getattr(dense, f"{kind}_regularizer") for dense in having]


def _factors(regularizer):
    """Those of the L1 norm and of the squared L2 norm."""
    return tuple(float(getattr(regularizer, name, 0.0)) for name in ("l1", "l2"))
