"""Dense models become mixtures of experts."""

import random
import re
import warnings

import keras
import numpy as np

from keras_moe._internal.checks import check_instance, check_integer, check_number, shortened
from keras_moe._internal.keras_internals import names_below
from keras_moe.layers import FeedForwardExperts, GatedExperts, MixtureOfExperts
from keras_moe.layers.sublayers import freeze_parts
from keras_moe.routers import TopKRouter
from keras_moe.upcycling.experts import bank_regularizer, check_penalties, expert_weights
from keras_moe.upcycling.feed_forwards import feed_forwards, left_dense
from keras_moe.upcycling.rewriting import rewrite

__all__ = ["upcycle"]


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
    and the router at random. The outputs of a model do not change at the start, as each token's
    weights sum to 1, whichever copies it goes to; training makes the experts differ. `L1` and `L2`
    regularizers, which must be the same in the dense layers, add to the loss what they did: their
    factors are divided by the number of copies. The experts of frozen layers are frozen; their
    router is new, and trains.

    These layers are found: `Dense` layers from D to H features with an activation, then back to D
    without, in a functional or sequential model, with dropout between them or without; a
    `keras.Sequential` of such two in an attribute of another layer, as of our Transformer blocks;
    and those of KerasHub's Transformer blocks (Bert, GPT-2, Llama, Mistral, Qwen and others).
    Dropout between the two is removed, because experts have none. A warning names `Dense` layers
    that look like such two and stay dense.

    With parts, the columns of the router's kernel that belong to one copy are equal, so that a
    token first goes to all parts of its best copies. With `top_k=granularity` it costs what the
    dense layer costs.

    Args:
        model: Keras model. It must be built. It changes in place, and the result shares its other
            layers: use the result only.
        num_experts: Integer. Number of experts, E, divisible by `granularity`.
        top_k: Integer. Experts per token, K, divisible by `granularity`. With 1 the weight of an
            expert is always 1, and the router learns from its losses only.
        granularity: Integer. Number of experts into which each copy is split; divides the hidden
            width.
        reinitialized: Float. Share of the hidden features of each expert that is drawn again, from
            0 to below 1, so that experts differ from the start. The outputs of the model then
            change.
        select: List of strings, string, function or None. Which of the layers: their names, a
            regular expression that their names match somewhere, or a function of a name. A layer is
            named after the block that holds it, or after its first `Dense`. None: all.
        every: Integer. n for every n-th of them, beginning with the n-th.
        router_losses: List or None. As in `layers.MixtureOfExperts`.
        seed: Integer or None. None draws one from Keras's, which `keras.utils.set_random_seed`
            sets.

    Returns:
        The model, with a `layers.MixtureOfExperts` for each of the layers, called
        `"{name}_experts"`. If it was compiled it still is, with an optimizer that starts again. A
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
    check_instance("model", model, keras.Layer)
    num_experts = check_integer("num_experts", num_experts)
    top_k = check_integer("top_k", top_k)
    granularity = check_integer("granularity", granularity)
    reinitialized = check_number("reinitialized", reinitialized, below=1)
    every = check_integer("every", every)
    if num_experts % granularity or top_k % granularity:
        raise ValueError(
            "`granularity` must divide `num_experts` and `top_k`: a copy of the dense layer is "
            "complete with all its parts, and not equal to it without some. Received: "
            f"granularity={granularity}, num_experts={num_experts}, top_k={top_k}"
        )
    selected = _select(model, select)
    chosen = selected[every - 1 :: every]
    if not chosen:
        raise ValueError(
            "`every` must be at most the number of layers that are chosen from. "
            f"Received: every={every} for {len(selected)}"
        )
    for feed_forward in chosen:
        _check_layers(feed_forward, granularity)
        check_penalties(feed_forward, granularity)
    for layer in model._flatten_layers():
        freeze_parts(layer)
    rng = np.random.default_rng(random.randrange(2**32) if seed is None else seed)
    mixtures = []
    for feed_forward in chosen:
        mixture = _mixture(feed_forward, num_experts, top_k, granularity, router_losses, rng)
        weights = expert_weights(feed_forward, num_experts, granularity, reinitialized, rng)
        for name, value in weights.items():
            if getattr(mixture.experts, name) is not None:
                getattr(mixture.experts, name).assign(value)
        mixtures.append((feed_forward, mixture))
    return rewrite(model, mixtures)


def _select(model, select):
    found = feed_forwards(model)
    if not found:
        raise ValueError(
            "`model` must be built and have dense feed-forward layers: a `Dense` layer from D to H "
            "features with an activation, then one from H to D without, side by side in a "
            "functional or sequential model, in a `keras.Sequential` that is an attribute of a "
            f"layer, or in a Transformer block of KerasHub. Received: model={shortened(model)}. "
            "Put the two layers of other blocks into a `keras.Sequential`."
        )
    names = [feed_forward.name for feed_forward in found]
    if select is None:
        wanted = names
        if left := left_dense(model, found):
            warnings.warn(
                f"These layers stay dense: {left}. Each is in a layer with a `Dense` layer back to "
                "as many features, but they are not called side by side in a model or in a "
                "`keras.Sequential`, with only dropout and one activation between them: its own "
                "or a `keras.layers.Activation`.",
                stacklevel=3,
            )
    elif callable(select):
        wanted = list(filter(select, names))
    elif isinstance(select, str):
        wanted = [name for name in names if re.search(select, name)]
    else:
        wanted = list(select)
    if not wanted or any(name not in names for name in wanted):
        raise ValueError(
            "`select` must choose among the dense feed-forward layers of the model. Received: "
            f"select={shortened(select)} for a model with {names}"
        )
    return [feed_forward for feed_forward in found if feed_forward.name in wanted]


def _check_layers(feed_forward, granularity):
    name, width = feed_forward.name, feed_forward.up.units
    if width % granularity:
        raise ValueError(
            "`granularity` must divide the hidden width of each layer. Received: "
            f"granularity={granularity} for {name!r} of width {width}"
        )
    if granularity > 1 and not _acts_on_parts(feed_forward.activation, width // granularity):
        raise ValueError(
            "The activation of a layer that is split must treat each hidden feature by itself. "
            f"Received: granularity={granularity} for {name!r} with "
            f"activation={shortened(feed_forward.activation)}"
        )
    if any(dense.quantization_mode or dense.lora_enabled for dense in feed_forward.denses):
        raise ValueError(
            "Layers must have plain kernels, neither quantized nor with LoRA. Received: "
            f"{name!r} with such a kernel. Upcycle the model before that."
        )
    trainable = {dense.name: dense.trainable for dense in feed_forward.denses}
    if len(set(trainable.values())) > 1:
        raise ValueError(
            "The `Dense` layers must be frozen together or not at all: a bank of experts is one "
            f"layer. Received: trainable={trainable} in {name!r}"
        )


def _acts_on_parts(activation, part):
    """Whether an activation computes a part of the features as it does in the whole."""
    features = np.random.default_rng(0).normal(size=(4, 2 * part)).astype("float32")
    of_all, of_part = (
        keras.ops.convert_to_numpy(activation(keras.ops.convert_to_tensor(each)))
        for each in (features, features[:, :part])
    )
    return np.allclose(of_all[:, :part], of_part, atol=1e-6)


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
    with names_below((feed_forward.layers[0].path or "").rpartition("/")[0]):
        mixture.build((None, features))
    # Parts of one copy have equal columns.
    kernel = keras.ops.convert_to_numpy(router.kernel)[:, ::granularity]
    router.kernel.assign(np.repeat(kernel, granularity, axis=1))
    return mixture
