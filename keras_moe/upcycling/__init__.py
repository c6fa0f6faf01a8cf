"""Dense models become mixtures of experts."""

import random
import warnings

import keras
import numpy as np

from keras_moe._internal.keras_internals import names_below
from keras_moe._internal.validation import (
    check_fraction,
    check_function,
    check_model,
    check_pattern,
    check_positive_integer,
    check_seed,
    check_top_k,
    shortened,
)
from keras_moe.layers.feed_forward_experts import FeedForwardExperts
from keras_moe.layers.gated_experts import GatedExperts
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.sublayers import freeze_parts
from keras_moe.routers.top_k import TopKRouter
from keras_moe.upcycling.experts import expert_weights
from keras_moe.upcycling.feed_forwards import feed_forwards, overlooked
from keras_moe.upcycling.regularizers import bank_regularizer, check_penalties
from keras_moe.upcycling.rewriting import rewrite


def upcycle(
    model,
    num_experts=8,
    top_k=2,
    granularity=1,
    reinitialized=0.0,
    select=None,
    every=1,
    router_losses=None,
    seed=None,
):
    """Turn dense feed-forward layers of a model into mixtures of experts that start from them.

    Each expert begins as a copy of the dense layer, or as one of `granularity` equal parts of it,
    and the router at random. What a model computes does not change at the start, as each token's
    weights sum to 1, whichever copies it goes to; training makes the experts differ. `L1` and `L2`
    regularizers, which must be the same in the dense layers, add to the loss what they did: their
    factors are divided by the number of copies. The experts of frozen layers are frozen; their
    router is new, and trains.

    These layers are found: `Dense` layers from D to H features with an activation, then back to D
    without, in a functional or sequential model, with dropout between them or without; a
    `keras.Sequential` of such two in an attribute of another layer, as of our Transformer blocks;
    and those of KerasHub's Transformer blocks (Bert, GPT-2, Llama, Mistral, Qwen and others).
    Dropout between the two is removed, because experts have none.

    With parts, the columns of the router's kernel that belong to one copy are equal, so that a
    token first goes to all parts of its best copies. With `top_k=granularity` it costs what the
    dense layer costs.

    Args:
        model: a built Keras model. It changes in place, and the result shares its other layers: use
            the result only.
        num_experts: number of experts, E, divisible by `granularity`.
        top_k: experts per token, K, divisible by `granularity`. With 1 the weight of an expert is
            always 1, and the router learns from its losses only.
        granularity: in how many experts each copy is split; divides the hidden width.
        reinitialized: share of the hidden features of each expert that is drawn anew, from 0 to
            below 1, so that experts differ from the start. The model then computes something else.
        select: which of the layers: a list of their names, a regular expression that their names
            match somewhere, or a function of a name. A layer is named after the block that holds
            it, or after its first `Dense`. None: all.
        every: n for every n-th of them, beginning with the n-th.
        router_losses: as in `layers.MixtureOfExperts`.
        seed: integer. None draws one from Keras's, which `keras.utils.set_random_seed` sets.

    Returns:
        The model, with a `layers.MixtureOfExperts` for each of the layers, called
        `"{name}_experts"`. If it was compiled it still is, with an optimizer that starts anew. A
        functional or sequential model whose own `Dense` layers were replaced is a new one.

    Raises:
        ValueError: If an argument is out of its range, the model has no such layers, `select` names
            none or others; or if the dense layers of one place have different regularizers, or such
            as cannot be divided, or constraints, or only some of them are frozen; or if layers are
            split whose activation mixes features, such as softmax.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((16,)),
    ...     keras.layers.Dense(32, "relu", name="wide"),
    ...     keras.layers.Dense(16),
    ... ])
    >>> x = keras.random.normal((4, 16))
    >>> before = model(x)
    >>> model = keras_moe.upcycle(model, num_experts=4)
    >>> [layer.name for layer in model.layers]
    ['wide_experts']
    >>> bool(keras.ops.max(keras.ops.abs(model(x) - before)) < 1e-6)
    True

    References: Komatsuzaki et al. 2022 (arXiv:2212.05055), section 3, for copies; He et al. 2024
    (arXiv:2410.07524), section 3.2, for parts and equal columns, there called virtual groups;
    Nakamura et al. 2025 (arXiv:2502.19261), section 3.2, for partly re-initialised copies.
    """
    check_model(model)
    _check(num_experts, top_k, granularity, reinitialized, every)
    seed = check_seed("seed", seed)
    selected = _choose(model, select)
    chosen = selected[every - 1 :: every]
    if not chosen:
        raise ValueError(
            "`every` must be at most the number of layers that are chosen from. "
            f"Received: every={every} for {len(selected)} of them. Pass a smaller one."
        )
    for feed_forward in chosen:
        _check_layers(feed_forward, granularity)
    for layer in model._flatten_layers():
        freeze_parts(layer)
    rng = np.random.default_rng(random.randrange(2**32) if seed is None else seed)
    mixtures = []
    for feed_forward in chosen:
        mixture = _mixture(feed_forward, num_experts, top_k, granularity, router_losses, rng)
        weights = expert_weights(feed_forward, num_experts, granularity, reinitialized, rng)
        _assign(mixture.experts, weights)
        mixtures.append((feed_forward, mixture))
    return rewrite(model, mixtures)


def _mixture(feed_forward, num_experts, top_k, granularity, router_losses, rng):
    up, denses = feed_forward.up, feed_forward.denses
    copies = num_experts // granularity
    features, width = up.kernel.shape
    experts = (FeedForwardExperts if feed_forward.gate is None else GatedExperts)(
        num_experts,
        width // granularity,
        feed_forward.activation,
        use_bias=any(dense.use_bias for dense in denses),
        kernel_initializer=up.kernel_initializer,
        kernel_regularizer=bank_regularizer(denses, "kernel", copies),
        bias_regularizer=bank_regularizer(denses, "bias", copies),
        dtype=up.dtype_policy,
        trainable=up.trainable,
    )
    router = TopKRouter(
        num_experts,
        top_k,
        renormalize=True,
        scaling_factor=float(granularity),
        kernel_initializer=keras.initializers.RandomNormal(
            stddev=0.02, seed=int(rng.integers(2**31))
        ),
    )
    mixture = MixtureOfExperts(
        experts, router, router_losses, name=f"{feed_forward.name}_experts", dtype=up.dtype_policy
    )
    holder, _, _ = (feed_forward.layers[0].path or "").rpartition("/")
    with names_below(holder):
        mixture.build((None, features))
    kernel = keras.ops.convert_to_numpy(router.kernel)[:, ::granularity]
    router.kernel.assign(np.repeat(kernel, granularity, axis=1))
    return mixture


def _assign(bank, weights):
    for name, value in weights.items():
        variable = getattr(bank, name)
        if variable is not None:
            variable.assign(value)


def _without_feed_forward(model):
    """What a model has instead of dense feed-forward layers."""
    if not model.built:
        return f"model {model.name!r}, which is not built"
    found = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)]
    described = ", ".join(
        f"{layer.name!r} from {layer.kernel.shape[0]} to {layer.units}"
        f"{'' if layer.activation is keras.activations.linear else ' with an activation'}"
        for layer in found
        if layer.built
    )
    return f"model {model.name!r} with {described or 'no `Dense` layer'}"


def _choose(model, select):
    found = feed_forwards(model)
    if not found:
        raise ValueError(
            "The model must have dense feed-forward layers: a `Dense` layer from D to H features "
            "with an activation, then one from H to D without, side by side in a functional or "
            "sequential model, in a `keras.Sequential` that is an attribute of a layer, or in a "
            f"Transformer block of KerasHub. Received: {_without_feed_forward(model)}. Build a "
            "model first, and put the two layers of other blocks into a `keras.Sequential`."
        )
    names = [feed_forward.name for feed_forward in found]
    if select is None:
        wanted = set(names)
        if left := overlooked(model, found):
            warnings.warn(
                f"These layers stay dense: {left}. Between each and the `Dense` layer that leads "
                "back stands something else than dropout and one activation, its own or a "
                "`keras.layers.Activation`.",
                stacklevel=3,
            )
    elif callable(select):
        check_function("select", select, "name")
        wanted = {name for name in names if select(name)}
    elif isinstance(select, str):
        pattern = check_pattern("select", select)
        wanted = {name for name in names if pattern.search(name)}
    elif hasattr(select, "__iter__"):
        wanted = {each for each in select if isinstance(each, str)}
        if len(wanted) < len(list(select)):
            wanted = set()  # something in it is no name, or twice
    else:
        wanted = set()
    if not wanted or wanted - set(names):
        raise ValueError(
            "`select` must choose among the dense feed-forward layers of the model. Received: "
            f"select={shortened(select)} for a model with {names}. "
            "Pass some of these names, a regular expression or a function of a name."
        )
    return [feed_forward for feed_forward in found if feed_forward.name in wanted]


def _check(num_experts, top_k, granularity, reinitialized, every):
    check_positive_integer("num_experts", num_experts)
    check_top_k(top_k, num_experts)
    check_positive_integer("granularity", granularity)
    check_positive_integer("every", every)
    check_fraction("reinitialized", reinitialized)
    if num_experts % granularity or top_k % granularity:
        raise ValueError(
            "`granularity` must divide `num_experts` and `top_k`: a copy of the dense layer is "
            "complete with all its parts, and not equal to it without some. Received: "
            f"granularity={granularity}, num_experts={num_experts}, top_k={top_k}. "
            f"Pass, for example, num_experts={8 * granularity}, top_k={granularity}."
        )


def _acts_on_parts(activation, width, granularity):
    """Whether an activation makes the same of a part of the features as of all, unlike softmax."""
    features = np.random.default_rng(0).normal(size=(4, width)).astype("float32")
    part = width // granularity
    of_all, of_part = (
        keras.ops.convert_to_numpy(activation(keras.ops.convert_to_tensor(each)))
        for each in (features, features[:, :part])
    )
    return np.allclose(of_all[:, :part], of_part, atol=1e-6)


def _check_layers(feed_forward, granularity):
    width = feed_forward.up.units
    if width % granularity:
        raise ValueError(
            "`granularity` must divide the hidden width of each layer. Received: "
            f"granularity={granularity} for {feed_forward.name!r} of width {width}. "
            "Pass a divisor, or choose other layers with `select`."
        )
    if granularity > 1 and not _acts_on_parts(feed_forward.activation, width, granularity):
        raise ValueError(
            "The activation of a layer that is split must treat each hidden feature by itself, so "
            "that the parts compute what the whole did. Received: "
            f"granularity={granularity} for {feed_forward.name!r} with "
            f"activation={shortened(feed_forward.activation)}. Pass granularity=1, or choose other "
            "layers with `select`."
        )
    for dense in feed_forward.denses:
        if dense.quantization_mode or dense.lora_enabled:
            raise ValueError(
                "Layers must have plain kernels, neither quantized nor with LoRA. Received: "
                f"{feed_forward.name!r} with such a kernel. Upcycle the model before that."
            )
    trainable = {dense.name: dense.trainable for dense in feed_forward.denses}
    if len(set(trainable.values())) > 1:
        raise ValueError(
            "The `Dense` layers must be frozen together or not at all: a bank of experts is one "
            f"layer. Received: trainable={trainable} in {feed_forward.name!r}. Set `trainable` of "
            "them to the same value."
        )
    check_penalties(feed_forward, granularity)


__all__ = ["upcycle"]
