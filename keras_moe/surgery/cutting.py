"""Leaves a MoE layer with some of its experts, and a router that fits.

Axes: E experts.
"""

import numpy as np
from keras import ops

from keras_moe._internal.keras_internals import (
    let_go,
    names_below,
    open_to_state,
    own_state,
    set_state,
)
from keras_moe.layers.layer_experts import LayerExperts
from keras_moe.layers.stacked_experts import StackedExperts as DenseExperts
from keras_moe.routers import LogitRouter, SoftRouter


def check_can_cut(name, layer):
    """Refuse a layer of which it is not known how its experts are taken out."""
    parts = [type(part).__name__ for part in (layer.router, layer.experts)]
    bank_fits = isinstance(layer.experts, (DenseExperts, LayerExperts))
    # The logits of a soft router are those of slots: tokens choose no experts.
    router_fits = isinstance(layer.router, LogitRouter) and not isinstance(layer.router, SoftRouter)
    if not layer.built or not bank_fits or not router_fits:
        raise ValueError(
            "A layer must be built, its experts be `FeedForwardExperts`, `GatedExperts` or "
            "`LayerExperts`, and its router have a kernel with a column for each of them, as "
            "those that derive from `routers.SelectionRouter`. Received: "
            f"{name!r} with {' and '.join(parts)}{'' if layer.built else ', which is not built'}. "
            "Leave it out, or build the model first."
        )
    check_is_ours(name, layer)
    if getattr(layer.experts, "processes", None) is not None:
        raise ValueError(
            "The experts of a layer must be in one process. Received: "
            f"{name!r}, spread over several. Save the model and load it in one."
        )


def check_is_ours(name, layer):
    """Refuse a layer whose numbers stand in the config of a block of another package."""
    if not layer.has_own_config:
        raise ValueError(
            "The numbers of experts and of `top_k` of a converted model are those of its config, "
            f"and cannot change. Received: {name!r}, made by `convert.sparsify`. "
            "Make the model with other numbers instead."
        )


def cut(layer, experts):
    """Keep some experts of a built layer, in place.

    Args:
        layer: a `MixtureOfExperts`.
        experts: integer array of the numbers of those that stay, ascending.
    """
    if len(experts) == layer.experts.num_experts:
        return
    router = _cut_router(layer.router, experts)
    bank = layer.experts
    with names_below(layer.path):
        tokens_shape = (None, layer.input_spec.axes[-1])
        router.build(tokens_shape)
        _take_weights(layer.router, router, experts)
        if isinstance(bank, LayerExperts):
            config = {**bank.get_config(), "layers": [bank.layers[index] for index in experts]}
            bank = LayerExperts(**config)
            bank.build(tokens_shape)
        else:
            bank = type(bank).from_config({**bank.get_config(), "num_experts": len(experts)})
            bank.build(tokens_shape)
            _take_weights(layer.experts, bank, experts)
        _cut_counts(layer, experts)
    set_state(layer, "router", router)
    set_state(layer, "experts", bank)
    with names_below(layer.path), open_to_state(layer):
        for loss in layer.router_losses:
            for variable in filter(_is_variable_of(layer), vars(loss).values()):
                let_go(layer, variable)
        layer._build_losses()


def _cut_counts(layer, experts):
    counts = ops.convert_to_numpy(layer.expert_counts)[experts]
    with open_to_state(layer):
        new = layer._counter("expert_counts", counts.shape)
    new.assign(counts)
    set_state(layer, "expert_counts", new)
    if layer.last_counts is not None:
        layer.last_counts = layer.last_counts[experts]


def _is_variable_of(layer):
    own = {id(variable) for variable in own_state(layer)}
    return lambda value: id(value) in own


def _cut_router(router, experts):
    config = {**router.get_config(), "num_experts": len(experts)}
    if config.get("max_top_k") is not None:
        config["max_top_k"] = min(config["max_top_k"], len(experts))
    return type(router).from_config(config)


def _take_weights(old, new, experts):
    """Give a layer the weights of another that has more experts."""
    for theirs, mine in zip(old.weights, new.weights, strict=True):
        value = ops.convert_to_numpy(ops.cast(theirs.value, "float32"))
        for axis, (before, after) in enumerate(zip(theirs.shape, mine.shape, strict=True)):
            if before != after:
                value = np.take(value, experts, axis)
        mine.assign(value)
