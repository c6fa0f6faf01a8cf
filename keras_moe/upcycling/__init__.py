"""Upcycling of dense models to mixtures of experts."""

import collections
import itertools
import random
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal.checks import check_integer, check_number, shortened
from keras_moe._internal.keras_internals import (
    float_array,
    forget_old_weights,
    names_beside,
    parameters_of,
    set_state,
)
from keras_moe._internal.serialization import register
from keras_moe.inspection.summaries import architecture
from keras_moe.layers import FeedForwardExperts, GatedExperts, LowRankExperts, MixtureOfExperts
from keras_moe.layers.replacement import record_changes, replace
from keras_moe.layers.stacked_experts import StackedExperts
from keras_moe.layers.sublayers import freeze_parts
from keras_moe.routers import TopKRouter
from keras_moe.upcycling.feed_forwards import feed_forwards, is_dense, left_dense

__all__ = ["freeze_all_but", "merge_lora", "upcycle"]


def upcycle(
    model: keras.Model | Sequence[keras.Model],
    num_experts: int | None = None,
    top_k: int = 2,
    granularity: int = 1,
    reinitialized: float = 0.0,
    select: Sequence[str] | str | Callable | None = None,
    every: int = 1,
    router_losses: Sequence | None = None,
    seed: int | None = None,
    rank: int | None = None,
) -> keras.Model:
    """Return a model whose dense feed-forward layers are mixtures that start from them.

    Each expert begins as a copy of the dense layer, or as one of `granularity` equal parts of it,
    and the router at random. Outputs do not change at the start, except at padding, where a mixture
    returns zeros. Several models of one architecture become one: experts come from each, and all
    other weights are averaged. The page on starting from a model explains which layers are
    found, and the arguments; a warning names the layers that stay dense.

    Args:
        model: Built Keras model, or list of M models. The result shares the other layers of the
            first, whose blocks change in place: use the result only. The others stay as they are.
        num_experts: Integer or None. Number of experts, E, divisible by `granularity` times M; copy
            c is of model c modulo M. None: 8 for one model, otherwise one copy of each.
        top_k: Integer. Experts per token, K, divisible by `granularity`.
        granularity: Integer. Parts into which each copy is split; divides the hidden width.
        reinitialized: Float from 0 to below 1. Share of each expert's hidden features drawn again.
        select: List of strings, string, function or None. Names of the layers, a regular expression
            that is found in them, or a function of a name. None: all.
        every: Integer. n for every n-th of them, beginning with the n-th.
        router_losses: None for `("load_balance", "router_z")`; `[]` for no losses; or a list, as in
            `layers.MixtureOfExperts`.
        seed: Integer or None. None takes one from Keras's, see `keras.utils.set_random_seed`.
        rank: Integer or None. Rank of corrections of one frozen layer: `layers.LowRankExperts`.

    Returns:
        The model, with a `layers.MixtureOfExperts` for each of the layers, called
        `"{name}_experts"`. If it was compiled it still is, but its optimizer is reset.

    Raises:
        ValueError: If arguments do not go together, models differ or have no such layers, or a
            mixture cannot compute, freeze and regularize as they do.

    Example:

    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, "relu", name="wide")])
    >>> model.add(keras.layers.Dense(16))
    >>> [layer.name for layer in keras_moe.upcycle(model, num_experts=4).layers]
    ['wide_experts']

    References: Komatsuzaki et al. 2022 (arXiv:2212.05055), section 3, for copies; He et al. 2024
    (arXiv:2410.07524), section 3.2, for parts; Nakamura et al. 2025 (arXiv:2502.19261), section
    3.2, for partly reinitialised copies; Sukhbaatar et al. 2024, Branch-Train-MiX
    (arXiv:2403.07816), section 3.2, for several models.
    """
    models: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
    granularity = check_integer("granularity", granularity)
    if num_experts is None:
        num_experts = len(models) * granularity if len(models) > 1 else 8
    num_experts = check_integer("num_experts", num_experts)
    reinitialized = check_number("reinitialized", reinitialized, below=1)
    every = check_integer("every", every)
    if not models or num_experts % (len(models) * granularity) or top_k % granularity:
        rule = "`num_experts` must be a multiple of the number of models times `granularity`"
        received = f"{len(models)} models, {num_experts=}, {top_k=}, {granularity=}"
        raise ValueError(f"{rule}, and `top_k` of `granularity`. Received: {received}")
    if rank is not None and (granularity > 1 or reinitialized or len(models) > 1):
        rule = "With a `rank` all experts share the dense layer of one model"
        received = f"{granularity=}, {reinitialized=}, {len(models)} models"
        raise ValueError(f"{rule}. Received: {received}")
    first, found = models[0], [feed_forwards(each) for each in models]
    _check_alike(models)
    places = [[own[place] for own in found] for place in _select(first, found[0], select, every)]
    chosen = [place[0] for place in places]
    wrong = [f"{own.name!r} with {why}" for own in chosen for why in _obstacles(own, granularity)]
    if wrong:
        rule = "Experts must be able to do what the dense layers do"
        raise ValueError(f"{rule}. Received: {'; '.join(wrong)}")
    for layer in first._flatten_layers():
        freeze_parts(layer)
    rng = np.random.default_rng(random.randrange(2**32) if seed is None else seed)
    replacements: dict = {}
    for place in places:
        feed_forward = place[0]
        mixture = _mixture(feed_forward, num_experts, top_k, granularity, router_losses, rng, rank)
        bank = mixture.experts if rank is None else mixture.experts.base
        weights = _expert_weights(place, bank.num_experts, granularity)
        if reinitialized:
            _draw_again(weights, reinitialized, rng)
        for name, value in weights.items():
            if getattr(bank, name) is not None:
                getattr(bank, name).assign(value)
        replacements |= dict.fromkeys(feed_forward.layers)
        replacements[feed_forward.layers[0]] = mixture
        if feed_forward.gate is not None:
            up = feed_forward.up
            replacements[up] = Ones(dtype=up.dtype_policy.name, name=up.name)
    if len(models) > 1:
        trained = {id(weight) for weight in parameters_of(first)}
        for weights in zip(*(each.weights for each in models)):
            if id(weights[0]) in trained:
                weights[0].assign(np.mean(list(map(float_array, weights)), axis=0))
    model, changes = replace(first, replacements)
    forget_old_weights(model)
    for block in (feed_forward.owner for feed_forward in chosen if feed_forward.gate is not None):
        # The block still applies the activation to the gate, and multiplies by `up`.
        set_state(block, "activation", keras.activations.linear)
        changes.append((block, ["activation"]))
    record_changes(model, changes)
    return model


def freeze_all_but(model: keras.Model, pattern: str = "_lora_|router") -> None:
    """Freeze all weights of a model but some. The optimizer of a compiled model is reset.

    Keras does not save which parts are frozen: load with `compile=False`, and call it again.

    Args:
        model: Keras model. It must be built. It changes in place.
        pattern: Regular expression, found in the paths of the weights that train, else a ValueError
            is raised. The default is for low-rank factors and routers.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="up")])
    >>> keras_moe.freeze_all_but(model, "bias")
    >>> [weight.name for weight in model.trainable_weights]
    ['bias']
    """

    def trained(layer):
        return [weight for weight in parameters_of(layer) if re.search(pattern, weight.path)]

    try:
        is_found = bool(trained(model))
    except (re.error, TypeError):
        is_found = False
    if not is_found:
        rule = "`pattern` must be a regular expression that is found in a path of a weight"
        raise ValueError(f"{rule}. Received: {pattern!r}")
    for layer in model._flatten_layers():  # from the outside in, as each sets its sublayers
        # TensorFlow skips setting an attribute to the value it has.
        type(layer).trainable.fset(layer, bool(trained(layer)))
    for weight in parameters_of(model):
        weight.trainable = weight.trainable and bool(re.search(pattern, weight.path))
    forget_old_weights(model)


def merge_lora(model: keras.Model) -> None:
    """Merge low-rank corrections of experts into their kernels; the outputs stay.

    Integer kernels are rounded to integers again, so their outputs change a little.

    Banks with `enable_lora` lose their factors. In `layers.LowRankExperts` each expert
    gets kernels of its own. The model changes in place, with a new optimizer. Merged kernels
    are frozen. Keras does not save that: after loading, a layer is frozen only if it was before
    `enable_lora`. Raises a ValueError if the model has no such layers.

    Example:

    >>> base = keras_moe.layers.GatedExperts(num_experts=1, hidden_dim=16)
    >>> experts = keras_moe.layers.LowRankExperts(base, num_experts=4, rank=2)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts, name="moe")
    >>> keras_moe.merge_lora(keras.Sequential([keras.Input((8,)), layer]))
    >>> tuple(layer.experts.up_kernel.shape)
    (4, 8, 16)
    """
    stacked = [layer for layer in model._flatten_layers() if isinstance(layer, StackedExperts)]
    banks = [layer for layer in stacked if isinstance(layer, LowRankExperts)]
    adapted = [layer for layer in stacked if layer.lora_enabled]
    if not banks and not adapted:
        rule = "`model` must have `LowRankExperts`, or banks with LoRA"
        raise ValueError(f"{rule}. Received: `{model.name}` without")
    for layer in adapted:
        layer.merge_factors()
    replace(model, {bank: bank.merge() for bank in banks})
    forget_old_weights(model)


@register
class Ones(keras.layers.Layer):
    """Takes the place of a layer whose outputs a KerasHub block multiplies with the mixture's."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.built = True  # `quantize` needs built layers, also before the model has run.

    def call(self, inputs):
        return ops.ones_like(inputs)


def _select(model, found, select, every):
    """The numbers of the chosen ones among the feed-forwards that were found in a model."""
    left = left_dense(model, found)
    if not found:
        layers = model._flatten_layers()
        others = [f"`{each.name}` {tuple(each.kernel.shape)}" for each in layers if is_dense(each)]
        others += [f"mixture `{m.name}`" for m in layers if isinstance(m, MixtureOfExperts)]
        received = "; ".join(left or others) if model.built else "a model that is not built"
        rule = "`model` must have a `Dense` layer with an activation, then one without, back to D"
        raise ValueError(f"{rule}. Received: {received}")
    names = wanted = [feed_forward.name for feed_forward in found]
    if select is None and left:
        warnings.warn(f"These layers stay dense: {'; '.join(left)}.", stacklevel=3)
    elif callable(select):
        wanted = list(filter(select, names))
    elif isinstance(select, str):
        wanted = [name for name in names if re.search(select, name)]
    elif select is not None:
        wanted = list(select)
    chosen = [number for number, name in enumerate(names) if name in wanted][every - 1 :: every]
    if not chosen or any(name not in names for name in wanted):
        rule = f"`select` and `every` must choose among the dense feed-forward layers, {names}"
        raise ValueError(f"{rule}. Received: select={shortened(select)}, every={every}")
    return chosen


def _check_alike(models):
    for number, model in enumerate(models):
        pairs = itertools.zip_longest(architecture(models[0]), architecture(model))
        for ours, theirs in pairs:
            if ours != theirs:
                rule = "Models must have the same layers, activations and shapes of weights"
                raise ValueError(f"{rule}. Received: {ours} in the first, {theirs} in {number}")
    layers: list = sum((model._flatten_layers() for model in models), [])
    with_lora = [layer.name for layer in layers if getattr(layer, "lora_enabled", False)]
    if len(models) > 1 and with_lora:
        # The averages of A and of B do not multiply to the average of A B.
        raise ValueError(f"Models must be mixed without LoRA. Received: LoRA in {with_lora}")


def _obstacles(feed_forward, granularity):
    """Reasons why a bank of experts would change outputs or the loss."""
    denses, width = feed_forward.denses, feed_forward.up.units
    if width % granularity:
        yield f"granularity={granularity}, which does not divide the hidden width, {width}"
    elif granularity > 1:
        hidden, act = keras.random.normal((4, 8), seed=0), feed_forward.activation
        if not ops.all(ops.abs(act(hidden)[:, :4] - act(hidden[:, :4])) < 1e-5):
            yield f"granularity={granularity}, but activation={shortened(act)} mixes features"
    if any(dense.quantization_mode or dense.lora_enabled for dense in denses):
        yield "quantized kernels or LoRA"
    if len({dense.trainable for dense in denses}) > 1:
        yield "frozen `Dense` layers beside trainable ones"
    for layer in feed_forward.layers:
        if any(part.activity_regularizer for part in layer._flatten_layers()):
            yield f"an `activity_regularizer` of `{layer.name}`"
    if any(dense.kernel_constraint or dense.bias_constraint for dense in denses):
        yield "a constraint"
    for kind in ("kernel", "bias"):
        l1_l2 = _penalty(denses, kind)
        if l1_l2 is None:
            yield f"`{kind}_regularizer`s that differ, or are not `L1`, `L2` or `L1L2`"
        elif kind == "bias" and granularity > 1 and any(l1_l2):
            # The squares of the parts' shares of the last bias do not add up to its square.
            yield f"a `bias_regularizer` with granularity={granularity}"


def _penalty(denses, kind):
    """The (l1, l2) that dense layers share, or None if they differ or regularize otherwise."""
    denses = [dense for dense in denses if kind == "kernel" or dense.use_bias]
    regularizers = [getattr(dense, f"{kind}_regularizer") for dense in denses]
    known = (type(None), keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
    found = {tuple(float(getattr(r, name, 0.0)) for name in ("l1", "l2")) for r in regularizers}
    if len(found) > 1 or not all(type(each) in known for each in regularizers):
        return None
    return found.pop() if found else (0.0, 0.0)


def _mixture(feed_forward, num_experts, top_k, granularity, router_losses, rng, rank):
    up, denses = feed_forward.up, feed_forward.denses
    features, width = up.kernel.shape

    def regularizer(kind):
        """A regularizer of all copies that adds as much to the loss as the dense layers' own."""
        copies = num_experts // granularity
        l1, l2 = _penalty(denses, kind)
        return keras.regularizers.L1L2(l1 / copies, l2 / copies) if l1 or l2 else None

    experts = (FeedForwardExperts if feed_forward.gate is None else GatedExperts)(
        num_experts if rank is None else 1,
        width // granularity,
        feed_forward.activation,
        use_bias=any(dense.use_bias for dense in denses),
        kernel_initializer=up.kernel_initializer,
        kernel_regularizer=regularizer("kernel"),
        bias_regularizer=regularizer("bias"),
        dropout=feed_forward.dropout,
        dtype=up.dtype_policy,
        trainable=up.trainable,
        # As in converted models, for the `enable_lora` of KerasHub.
        name="experts" if rank is None else "base",
    )
    if rank is not None:
        experts = LowRankExperts(experts, num_experts, rank, name="experts")
    normal = keras.initializers.RandomNormal(stddev=0.02, seed=int(rng.integers(2**31)))
    scales: dict = {"renormalize": True, "scaling_factor": float(granularity)}
    router = TopKRouter(num_experts, top_k, **scales, kernel_initializer=normal, name="router")
    name = f"{feed_forward.name}_experts"
    mixture = MixtureOfExperts(experts, router, router_losses, name=name, dtype=up.dtype_policy)
    with names_beside(feed_forward.layers[0]):
        mixture.build((None, features))
    # Parts of one copy have equal columns.
    kernel = ops.convert_to_numpy(router.kernel)[:, ::granularity]
    router.kernel.assign(np.repeat(kernel, granularity, axis=1))
    return mixture


def _expert_weights(feed_forwards, num_experts, granularity):
    """Stacked weights by their names in a bank: expert `c * G + g` gets part g of copy c."""
    parts: dict = collections.defaultdict(list)
    for feed_forward in feed_forwards:
        down = feed_forward.down
        parts["down_kernel"] += np.split(float_array(down.kernel), granularity)
        parts["down_bias"] += [_bias(down) / granularity] * granularity  # They sum to the whole.
        for name, dense in (("gate", feed_forward.gate), ("up", feed_forward.up)):
            if dense is not None:
                parts[f"{name}_kernel"] += np.split(float_array(dense.kernel), granularity, axis=1)
                parts[f"{name}_bias"] += np.split(_bias(dense), granularity)
    turns = num_experts // (granularity * len(feed_forwards))
    return {name: np.stack(each * turns) for name, each in parts.items()}


def _draw_again(weights, share, rng):
    """Draw a share of each expert's hidden features again, with their old mean and deviation."""
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
    return float_array(dense.bias) if dense.use_bias else np.zeros(dense.units, "float32")
