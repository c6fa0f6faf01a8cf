"""Fewer or more experts, or fewer for each token, in a trained model."""

import math
import operator
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_choice, check_integer, check_number, shortened
from keras_moe._internal.keras_internals import forget_compiled, forget_old_weights, unlocked
from keras_moe.inspection import moe_layers
from keras_moe.inspection.recording import check_list_of_batches
from keras_moe.layers.replacement import backbones
from keras_moe.surgery import cutting, measuring

__all__ = ["Surgery", "add_experts", "merge_experts", "prune_experts", "set_top_k"]
__dir__ = __all__.copy


class Surgery(NamedTuple):
    """Changes to the experts of a model.

    - `experts`: dict from the name of a layer to a list with, for each of its experts now, the
      numbers of the experts that it comes from; merged ones have several, first the most used.
    - `loss_before`, `loss_after`: on the data, None without targets or if it is not compiled.
    """

    experts: dict
    loss_before: Any = None
    loss_after: Any = None


def prune_experts(
    model: keras.Layer,
    by: str | Tensor | dict = "usage",
    keep: float | dict = 0.5,
    data: Sequence = (),
) -> Surgery:
    """Take the least important experts out of a model, in place.

    A compiled model stays compiled, but its optimizer is reset. The layers of a converted
    KerasHub model keep one number of experts.

    Args:
        model: Keras model. A built model with MoE layers, or one such layer.
        by: String, array or dict. `"usage"`: how many tokens of the data an expert gets;
            `"saliency"`: its weight times the norm of its output, on average over these (REAP);
            `"contribution"`: the same, summed; or scores (E,), the best stay; or a dict of these.
        keep: Number or dict. Experts that stay in each layer: a share from above 0 to 1.0, rounded
            up, or an integer; or a dict by names of `inspection.moe_layers`, others keep all.
        data: List of batches: each inputs, or a tuple of inputs, targets and weights.

    Returns a `Surgery`, with the loss before and after. A ValueError is raised if fewer than
    `top_k` experts would stay, data are missing, or it is not known how to cut a router or bank.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(8, 32))
    >>> model, data = keras.Sequential([keras.Input((16,)), moe]), [keras.random.normal((64, 16))]
    >>> surgery = keras_moe.surgery.prune_experts(model, by="saliency", keep=4, data=data)
    >>> moe.experts.num_experts
    4

    References: Lasby et al. 2025 (arXiv:2510.13999); by usage Muzio et al. 2024 (arXiv:2404.05089).
    """
    layers, numbers, data = _plan(model, keep, data)
    groups = {}
    for name, scores in _scores(model, by, layers, data).items():
        # Of experts with equal scores, the first stays.
        best = np.sort(np.argsort(-scores, kind="stable")[: numbers[name]])
        groups[name] = [[expert] for expert in best.tolist()]
    return _operate(model, layers, groups, data)


def merge_experts(model: keras.Layer, keep: float | dict = 0.5, data: Sequence = ()) -> Surgery:
    """Merge similar experts of a model into one, in place.

    The most used experts stay; each of the others is merged into the most similar of these, by the
    router's logits over the tokens. Weights are averaged by usage, after the hidden features of the
    two were matched. Arguments, errors, the result and an example are as in `prune_experts`.

    Reference: Li et al. 2024, M-SMoE (arXiv:2310.01334), section 3, without its decomposition.
    """
    layers, numbers, data = _plan(model, keep, data, "merge")
    used, alike = measuring.usage_and_similarity(model, layers, data)
    groups = {name: cutting.groups_of(used[name], alike[name], numbers[name]) for name in layers}
    return _operate(model, layers, groups, data, used)


def add_experts(
    model: keras.Layer,
    *,
    factor: int | dict = 2,
    noise: float = 0.1,
    data: Sequence = (),
    seed: int | None = None,
) -> Surgery:
    """Copy all experts of a model, in place, so that training continues with more of them.

    Expert e becomes the experts `factor * e` to `factor * e + factor - 1`, with copies of its
    column of the router. A token still goes to K experts: if K is 1, outputs stay the same without
    noise. A compiled model stays compiled, but its optimizer is reset, with its learning rate
    schedule.

    Args:
        model: Keras model. A built model with MoE layers of stacked experts, or one such layer.
        factor: Integer of at least 2. Copies of each expert, or a dict for some layers, by name.
        noise: Float. Standard deviation of the noise that is added to each copy of a weight that
            trains, in standard deviations of the weight. Without noise, copies may stay equal.
        data: List of batches, for the losses: each inputs, targets and weights.
        seed: Integer or None. None takes one from Keras's, see `keras.utils.set_random_seed`.

    Returns and raises: as `prune_experts`.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(8, 32))
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> surgery = keras_moe.surgery.add_experts(model, factor=4)
    >>> moe.experts.num_experts
    32

    Reference: Dwivedi et al. 2026, Expert Upcycling (arXiv:2604.19835), with K fixed.
    """
    noise = check_number("noise", noise)
    rng = np.random.default_rng(random.randrange(2**32) if seed is None else seed)
    layers, numbers, data = _plan(model, factor, data, "copy")
    groups = {}
    for name, layer in layers.items():
        had = _num_experts(layer)
        groups[name] = np.arange(had).repeat(numbers[name] // had)[:, None].tolist()

    def noise_like(value):
        return noise * value.std() * rng.normal(size=value.shape)

    return _operate(model, layers, groups, data, noise=noise_like)


def set_top_k(model: keras.Layer, top_k: int | dict) -> None:
    """Change `top_k` in place, in compiled functions of `model` as well.

    Other models that hold its layers must be compiled again, except on PyTorch.

    Args:
        model: Keras model. A model with MoE layers, or one such layer.
        top_k: Integer or dict. Experts per token, K, or a dict for some layers, by name.

    A ValueError is raised if a router does not choose a fixed number, has fewer experts, or is
    shared with a layer that keeps another number, or if converted layers of KerasHub would differ.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(8, 32))
    >>> keras_moe.surgery.set_top_k(keras.Sequential([keras.Input((16,)), moe]), 1)
    >>> moe.router.top_k
    1
    """
    layers, numbers = _layers(model, top_k, "top_k")
    changed = {}
    for name, layer in layers.items():
        router = layer.router
        if "top_k" not in router.get_config() or router.has_fixed_top_k:
            rule = "A router must choose experts by their scores, with `top_k` in its config"
            raise ValueError(f"{rule}. Received: {name!r} with `{type(router).__name__}`")
        # The constructor checks it.
        changed[name] = cutting.router_like(router, top_k=numbers[name]).top_k
    for name, layer in moe_layers(model).items():
        routed = (other for other in layers if layers[other].router is layer.router)
        if any(changed.get(name) != changed[other] for other in routed):
            rule = "Layers that share a router must keep one number of experts"
            raise ValueError(f"{rule}. Received: top_k={shortened(top_k)} not for {name!r}")
    top_k_of = operator.attrgetter("router.top_k")
    _check_converted(model, changed, top_k_of)
    for name, layer in layers.items():
        router = layer.router
        with unlocked(router):
            if getattr(router, "renormalize", False) is None:
                router.renormalize = router.top_k > 1
            router.top_k = changed[name]
    _write_to_backbones(model, layers, top_k_of, "top_k", "num_experts_per_token")
    forget_compiled(model)


_num_experts = operator.attrgetter("experts.num_experts")


def _operate(model, layers, groups, data, used=None, noise=None):
    """Keep the first expert of each group, merged with the others by usage if that is given."""
    before = measuring.loss_on(model, data)
    for name in used or ():
        cutting.merge(layers[name].experts, groups[name], used[name])
    chosen = {layers[name]: np.array([group[0] for group in groups[name]]) for name in layers}
    cutting.take(model, chosen, noise)
    _write_to_backbones(model, layers, _num_experts, "num_experts")
    forget_old_weights(model)
    return Surgery(groups, before, measuring.loss_on(model, data))


def _plan(model, given, data, operation="cut"):
    """Layers, how many experts each will have, and the data as a list."""
    layers, given = _layers(model, given, "factor" if operation == "copy" else "keep")
    parts = [part for each in moe_layers(model).values() for part in (each.router, *each.banks)]
    wrong = []
    for name, layer in layers.items():
        wrong += [f"{name!r}, {obstacle}" for obstacle in cutting.obstacles(layer, operation)]
        if any(sum(part is own for part in parts) > 1 for own in (layer.router, *layer.banks)):
            wrong.append(f"{name!r}, which shares its router or bank with another layer")
    if wrong:
        rule = "Layers must be built, in one process, with their own experts and router to cut"
        raise ValueError(f"{rule}. Received: {'; '.join(wrong)}")
    numbers = {}
    for name, layer in layers.items():
        numbers[name] = _number(name, layer, given[name], operation)
        # Its constructor has rules, such as for groups.
        cutting.router_like(layer.router, num_experts=numbers[name])
    _check_converted(model, numbers, _num_experts)
    check_list_of_batches("data", data)
    return layers, numbers, list(data)


def _check_converted(model, changed, number_of):
    """Refuse different numbers of converted layers: the config of KerasHub's model has one."""
    every = moe_layers(model).items()
    numbers = {n: changed.get(n, number_of(each)) for n, each in every if not each.has_own_config}
    differ = len(set(numbers.values())) > 1 or not backbones(model)
    if differ and numbers.keys() & changed.keys():
        rule = "Layers made by `convert.use_sparse_experts` must keep one number in a whole model"
        raise ValueError(f"{rule}. Received: {numbers}")


def _write_to_backbones(model, layers, number_of, *names):
    """Set the number of converted layers in KerasHub's own, whose configs have it by a name."""
    for number in {number_of(layer) for layer in layers.values() if not layer.has_own_config}:
        for backbone in backbones(model):
            for layer in backbone._flatten_layers():
                is_theirs = layer is backbone or type(layer).__module__.startswith("keras_hub.")
                for name in names:
                    if is_theirs and hasattr(layer, name):
                        setattr(layer, name, number)


def _layers(model, given, argument):
    """MoE layers by name, and what is given for each: one value for all, or a dict for some."""
    layers = moe_layers(model)
    if not isinstance(given, dict):
        return layers, dict.fromkeys(layers, given)
    if not given or set(given) - set(layers):
        rule = f"`{argument}` must name MoE layers of the model, {', '.join(layers)}"
        raise ValueError(f"{rule}. Received: {argument}={shortened(given)}")
    return {name: layer for name, layer in layers.items() if name in given}, given


def _number(name, layer, keep, operation):
    """How many experts a layer will have, by the `keep` or the `factor` that is given for it."""
    num_experts, router = layer.router.num_experts, layer.router
    if operation == "copy":
        return check_integer("factor", keep, minimum=2) * num_experts
    try:
        number = operator.index(keep)
    except TypeError:
        share = check_number("keep", keep, above=0)
        # A share of float32, or such as 0.07, may be a little larger than meant.
        number = math.ceil(share * num_experts - 1e-5) if share <= 1 else share
    # Some routers aim at a mean that is above the least.
    least = max(router.min_top_k, router.get_config().get("top_k") or 1)
    if not least <= number <= num_experts or number != int(number):
        raise ValueError(
            f"`keep` must be a share up to 1 or a number of experts from `top_k`, {least}, to "
            f"{num_experts}. Received: keep={shortened(keep)} for {name!r}"
        )
    return int(number)


def _scores(model, by, layers, data):
    if isinstance(by, str):
        check_choice("by", by, measuring.MEASURES)
        return measuring.importance(by, model, layers, data)
    _, by = _layers(model, by, "by")
    scores = {}
    for name, layer in layers.items():
        given = by.get(name)
        scores[name] = np.asarray(ops.convert_to_numpy(given), "float64")
        number = _num_experts(layer)
        if scores[name].shape != (number,) or np.isnan(scores[name]).any():
            rule = f"`by` must name a measure or have numbers for the {number} experts of {name!r}"
            raise ValueError(f"{rule}. Received: by={shortened(given)}")
    return scores
