"""Fewer experts in a trained model: pruned or merged."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_moe._internal.batches import check_list_of_batches
from keras_moe._internal.keras_internals import forget_compiled, forget_old_weights
from keras_moe._internal.tensor_checks import host_values
from keras_moe._internal.validation import check_choice, check_top_k, is_whole, listed, shortened
from keras_moe.inspection import moe_layers
from keras_moe.routers import GroupLimitedRouter, HashRouter
from keras_moe.surgery import measuring
from keras_moe.surgery.cutting import check_can_cut, check_is_ours, cut
from keras_moe.surgery.merging import centers_of, check_can_merge, merge

MEASURES = {
    "usage": measuring.usage,
    "saliency": measuring.saliency,
    "contribution": measuring.contribution,
}


class Surgery(NamedTuple):
    """What was done to a model.

    - `experts`: dict from the name of each layer to a list with, for each expert it has now, the
      numbers of those it was made of; merged ones have several.
    - `loss_before`, `loss_after`: on the data, or None where the model is not compiled or the data
      have no targets.
    """

    experts: dict
    loss_before: Any = None
    loss_after: Any = None


def prune_experts(model, by="usage", keep=0.5, data=()):
    """Take the least important experts out of a model, in place.

    Routers lose the columns of those experts, and choose among the others; nothing else changes.
    Compiled models can train on at once, with an optimizer that starts anew.

    Args:
        model: a built Keras model with MoE layers, or one such layer.
        by: "usage": how many tokens of the data an expert serves; "saliency": how much it adds to
            a token it serves, its weight times the norm of its output, on average (REAP);
            "contribution": the same, summed over its tokens; or scores (E,), higher for those to
            keep, or a dict of them by the name of the layer.
        keep: how many experts stay in each layer: a number, a share from above 0 to 1, which is
            rounded up, or a dict of these by the name of the layer, as in
            `inspection.moe_layers`. Layers that are not in a dict keep all.
        data: list of batches, also where there is one: each inputs, or a tuple of inputs, targets
            and weights. `report` takes all documents in one array instead.

    Returns:
        A `Surgery`, with the loss before and after.

    Raises:
        ValueError: If an argument is out of its range, fewer than `top_k` experts would stay, data
            are missing, or it is not known how to cut a router or bank.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> data = [keras.random.normal((64, 16))]
    >>> surgery = keras_moe.surgery.prune_experts(model, by="saliency", keep=4, data=data)
    >>> model.get_layer("moe").experts.num_experts, len(surgery.experts["moe"])
    (4, 4)

    References: Lasby et al. 2025 (arXiv:2510.13999); Muzio et al. 2024 (arXiv:2404.05089) for
    pruning by usage.
    """
    layers, numbers, data = _plan(model, keep, data)
    scores = _scores(model, by, layers, data)
    chosen = {
        # Of experts with equal scores, the first stays.
        name: np.sort(np.argsort(-scores[name], kind="stable")[: numbers[name]])
        for name in layers
    }
    return _operate(model, layers, chosen, {}, data)


def merge_experts(model, keep=0.5, data=()):
    """Merge similar experts of a model into one, in place.

    The most used experts stay; each of the others is merged into the most similar of these, by the
    router's logits over the tokens. Weights are averaged by usage, after the hidden features of the
    two were matched.

    Args:
        model: a built Keras model with MoE layers, or one such layer.
        keep: as in `prune_experts`.
        data: as in `prune_experts`.

    Returns:
        A `Surgery`.

    Raises:
        ValueError: As in `prune_experts`, or if experts that are layers differ in their shapes.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> data = [keras.random.normal((64, 16))]
    >>> surgery = keras_moe.surgery.merge_experts(model, keep=4, data=data)
    >>> sorted(sum(surgery.experts["moe"], []))
    [0, 1, 2, 3, 4, 5, 6, 7]

    Reference: Li et al. 2024, M-SMoE (arXiv:2310.01334), section 3, without its decomposition.
    """
    layers, numbers, data = _plan(model, keep, data)
    _check_data(data, "merge_experts")
    for name, layer in layers.items():
        check_can_merge(name, layer.experts)
    used, alike = measuring.usage_and_similarity(model, layers, data)
    groups = {name: centers_of(used[name], alike[name], numbers[name]) for name in layers}
    chosen = {name: np.array(sorted(each)) for name, each in groups.items()}
    merges = {name: (groups[name], used[name]) for name in layers}
    return _operate(model, layers, chosen, merges, data)


def set_top_k(model, top_k):
    """Let each token go to another number of experts, in place, compiled functions included.

    Weights still sum to 1, if they did before. With one expert for each token they are then the
    constant 1: to train on, the router has only its own losses to learn from.

    Args:
        model: a Keras model with MoE layers, or one such layer.
        top_k: experts per token, K, or a dict of these by the name of the layer, as in
            `inspection.moe_layers`. Layers that are not in a dict keep theirs.

    Raises:
        ValueError: If a router does not choose a fixed number, or has fewer experts.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> keras_moe.surgery.set_top_k(model, 1)
    >>> model.get_layer("moe").router.top_k
    1
    """
    layers = _layers(model, top_k, "top_k")
    for name, layer in layers.items():
        check_is_ours(name, layer)
        router = layer.router
        value = top_k[name] if isinstance(top_k, dict) else top_k
        config = router.get_config()
        if "top_k" not in config:
            raise ValueError(
                "The router of a layer must have a `top_k`, experts that each token chooses. "
                f"Received: {name!r} with a `{type(router).__name__}`, whose config has none. "
                "Leave the layer out, by a dict of the others, or make it with a "
                "`routers.TopKRouter`, which with `top_k=num_experts` computes what a "
                "`DenseRouter` does and loads its weights."
            )
        check_top_k(value, router.num_experts, type(router).__name__)
        if isinstance(router, HashRouter) and value != router.top_k:
            raise ValueError(
                "The router of a layer must choose experts by scores. Received: "
                f"{name!r} with a `{type(router).__name__}`, which has {router.top_k} for each "
                "token in a table. Leave the layer out, by a dict of the others."
            )
        type(router).from_config({**config, "top_k": value})  # It has rules of its own.
    for name, layer in layers.items():
        router = layer.router
        if getattr(router, "renormalize", False) is None:
            router.renormalize = router.top_k > 1
        router.top_k = top_k[name] if isinstance(top_k, dict) else top_k
    forget_compiled(model)


def _operate(model, layers, chosen, merges, data):
    before = measuring.loss_on(model, data)
    for name, (groups, used) in merges.items():
        merge(layers[name].experts, groups, used)
    for name, layer in layers.items():
        cut(layer, chosen[name])
    forget_old_weights(model)
    made_of = {
        name: [merges[name][0][expert] if name in merges else [expert] for expert in each.tolist()]
        for name, each in chosen.items()
    }
    return Surgery(made_of, before, measuring.loss_on(model, data))


def _plan(model, keep, data):
    """Layers, how many experts of each stay, and the data as a list."""
    layers = _layers(model, keep, "keep")
    _check_not_shared(model, layers)
    numbers = {}
    for name, layer in layers.items():
        check_can_cut(name, layer)
        numbers[name] = _number(name, layer, keep[name] if isinstance(keep, dict) else keep)
    check_list_of_batches("data", data)
    data = list(data)
    for batch in data:
        measuring.check_batch(batch)
    return layers, numbers, data


def _check_not_shared(model, layers):
    seen: dict[int, str] = {}
    for name, layer in moe_layers(model).items():
        for part in (layer.router, layer.experts):
            other = seen.setdefault(id(part), name)
            if other != name and (name in layers or other in layers):
                raise ValueError(
                    "Each layer must have a router and a bank of its own. Received: "
                    f"{other!r} and {name!r}, which share `{part.name}`. Make the model without "
                    "sharing, and give it the weights."
                )


def _layers(model, given, argument):
    layers = moe_layers(model)
    if not isinstance(given, dict):
        return layers
    unknown = sorted(set(given) - set(layers))
    if unknown or not given:
        raise ValueError(
            f"`{argument}` must name MoE layers of the model. Received: "
            f"{listed(unknown) or 'an empty dict'}. The model has {listed(layers)}."
        )
    return {name: layer for name, layer in layers.items() if name in given}


def _number(name, layer, keep):
    num_experts, router = layer.experts.num_experts, layer.router
    number = keep
    if not is_whole(keep) and isinstance(keep, float) and 0 < keep <= 1:
        number = int(np.ceil(keep * num_experts))
    # Some aim at a mean that is above the least.
    top_k = router.get_config().get("top_k")
    least = max(router.min_top_k, top_k or 1)
    if top_k is None and least == num_experts > 1 and number != num_experts:
        raise ValueError(
            "Each token must choose some of the experts, so that the others can be cut. Received: "
            f"keep={shortened(keep)} for {name!r} with a `{type(router).__name__}`, where a token "
            "may go to all. Make the model with a router such as `routers.TopKRouter`, and train "
            "it, first."
        )
    if not is_whole(number) or not least <= number <= num_experts:
        meaning = f" ({number} of {num_experts})" if isinstance(keep, float) else ""
        raise ValueError(
            "`keep` must be a share above 0 and up to 1, or a number of experts, and at least the "
            f"`top_k` of the router must be left. Received: keep={shortened(keep)}{meaning} for "
            f"{name!r} with num_experts={num_experts}, top_k={least}. Pass another, or make a "
            "token go to fewer experts first, with most routers by `surgery.set_top_k`."
        )
    if isinstance(router, GroupLimitedRouter) and number % router.num_groups:
        raise ValueError(
            "`keep` must be a multiple of the groups of a router. Received: "
            f"keep={keep!r}, {number} experts, for {name!r} with {router.num_groups} groups. "
            f"Pass, for example, {router.num_groups * (number // router.num_groups + 1)}."
        )
    return int(number)


def _scores(model, by, layers, data):
    if isinstance(by, str):
        check_choice("by", by, list(MEASURES))
        _check_data(data, f"by={by!r}")
        measured = MEASURES[by](model, layers, data)
        scores = {name: _as_scores(name, of) for name, of in measured.items()}
        if by == "usage" and not any(score.any() for score in scores.values()):
            _check_data((), "by='usage'")
        return scores
    if isinstance(by, dict):
        _layers(model, by, "by")
    scores = by if isinstance(by, dict) else {name: by for name in layers}
    scores = {name: _as_scores(name, value) for name, value in scores.items()}
    for name, layer in layers.items():
        shape = scores[name].shape if name in scores else None
        if shape != (layer.experts.num_experts,):
            raise ValueError(
                "`by` must have one score for each expert of each layer. Received: shape "
                f"{shape} for {name!r} with num_experts={layer.experts.num_experts}. "
                f"{'Did you mean `keep`?' if shape == () else 'Pass a dict of arrays (E,).'}"
            )
    return scores


def _as_scores(name, values):
    array = host_values(ops.convert_to_numpy(values) if hasattr(values, "shape") else values)
    if array is None or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(
            f"`by` must be {listed(MEASURES)} or scores that are finite numbers. "
            f"Received: by={shortened(values)} for {name!r}. Pass one for each expert, higher for "
            "those to keep."
        )
    return array.astype("float64")


def _check_data(data, what):
    if not data:
        raise ValueError(
            f"Experts must be measured on data. Received: {what} and no data. "
            "Pass `data=[inputs]` or `data=[(inputs, targets), ...]`."
        )
