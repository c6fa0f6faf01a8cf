"""Experts of a MoE layer, merged, taken out or copied, and a router that fits.

Axes: E experts, D features, H hidden width.
"""

import numpy as np

from keras_moe._internal.keras_internals import float_array, names_beside
from keras_moe.inspection.summaries import architecture
from keras_moe.layers import FeedForwardExperts, GatedExperts, LayerExperts, LinearExperts
from keras_moe.layers.multi_gate import TaskGate
from keras_moe.layers.replacement import replace
from keras_moe.layers.stacked_experts import StackedExperts

# Banks with one hidden layer or none, whose features `merge` matches.
_MATCHED = (FeedForwardExperts, GatedExperts, LinearExperts)


def obstacles(layer, operation):
    """Reasons why the experts of a layer cannot be cut, merged or copied ("cut" and so on)."""
    bank, router = layer.banks[0], layer.router
    is_stacked, is_list = isinstance(bank, StackedExperts), isinstance(bank, LayerExperts)
    if not layer.built:
        yield "which is not built"
    if isinstance(layer, TaskGate):
        yield "a task of a `MultiGateMixtureOfExperts`, which calls the experts for all its tasks"
    if getattr(bank, "processes", None) is not None:
        yield "whose experts are split over processes"
    if not router.tokens_choose:
        yield f"with a `{type(router).__name__}`, whose logits do not choose the experts of a token"
    elif operation not in router.surgeries:
        yield f"with a `{type(router).__name__}`, whose `surgeries` do not include {operation!r}"
    if not is_stacked and (operation == "copy" or not is_list):
        yield f"with `{type(bank).__name__}`"
    if operation != "cut" and is_stacked and (bank.lora_enabled or bank.quantization_mode):
        yield "whose kernels have LoRA or are quantized"
    if operation == "merge" and is_stacked and not isinstance(bank, _MATCHED):
        yield f"with `{type(bank).__name__}`, whose hidden features cannot be matched"
    if operation == "merge" and is_list and len({(*architecture(own),) for own in bank.layers}) > 1:
        yield "whose experts differ in their layers, activations or shapes of weights"


def router_like(router, **changes):
    """A router that differs from another in some arguments, not built."""
    config, number = router.get_config(), changes.get("num_experts", router.num_experts)
    if config.get("max_top_k") is not None:
        config["max_top_k"] = min(config["max_top_k"], number)
    config.update((key, value) for key, value in changes.items() if key in config)
    try:
        changed = type(router).from_config(config)
    except TypeError as error:  # Keras puts the whole config into its own.
        raise error.__context__ or error from None
    changed.num_experts = number  # for a subclass that has another name for it
    changed.check_num_experts()
    return changed


def take(model, chosen, noise=None):
    """Keep or copy experts of built layers of a model, by an ascending array of numbers for each.

    `noise(value)` is added to the trained weights of copies.
    """
    chosen = {each: own for each, own in chosen.items() if len(own) != each.router.num_experts}
    replacements: dict = {}
    for layer, experts in chosen.items():
        replacements |= _other_parts(layer, experts, noise)
    replace(model, replacements)
    for layer in chosen:
        layer.restart_counters()


def _other_parts(layer, experts, noise):
    """A dict from the router and the bank of a layer to such for other numbers of its experts."""
    bank, old_router = layer.experts, layer.router
    copies, kept = len(experts) // bank.num_experts, {"num_experts": len(experts)}
    changes: dict = {**kept}
    # Copies share the probability of an expert, which may be its weight.
    share = copies > 1 and old_router.score == "softmax"
    if share and old_router.top_k == 1 and not old_router.renormalize:
        changes["scaling_factor"] = old_router.scaling_factor * copies
    router = router_like(old_router, **changes)
    with names_beside(old_router):
        router.build((None, old_router.input_spec.axes[-1]))
    _take_weights(old_router, router, experts, noise)
    if share and router.selection_bias is not None:
        router.selection_bias.assign(router.selection_bias / copies)
    axes = layer.input_spec.axes  # of a token, counted from the end
    tokens_shape = (None, *(axes[axis] for axis in sorted(axes)))
    own = [bank.layers[index] for index in experts] if isinstance(bank, LayerExperts) else []
    weights = [(weight, weight.trainable) for each in own for weight in each.weights]
    other = type(bank).from_config({**bank.get_config(), **({"layers": own} if own else kept)})
    with names_beside(bank):
        other.build(tokens_shape)
    if not own:
        _take_weights(bank, other, experts, noise)
    for weight, trainable in weights:  # The constructor of a frozen bank froze all its layers.
        weight.trainable = trainable
    return {old_router: router, bank: other}


def _take_weights(old, new, experts, noise):
    """Give a layer the weights of another with other experts; frozen ones stay frozen."""
    for theirs, mine in zip(old.weights, new.weights, strict=True):
        value = float_array(theirs)
        for axis, (before, after) in enumerate(zip(theirs.shape, mine.shape, strict=True)):
            if before != after:
                value = np.take(value, experts, axis)
                if noise is not None and theirs.trainable:
                    value = value + noise(value)
        mine.assign(value)
        mine.trainable = theirs.trainable


def groups_of(usage, similarity, number):
    """Lists of experts, each around one of the most used, which comes first."""
    centers = np.sort(np.argsort(-usage, kind="stable")[:number])
    groups = {int(center): [int(center)] for center in centers}
    for expert in range(len(usage)):
        if expert not in groups:
            groups[int(centers[np.argmax(similarity[expert, centers])])].append(expert)
    return list(groups.values())


def merge(bank, groups, usage):
    """Put the average of each group, weighted by usage, in the place of its first expert."""
    groups = {group[0]: sorted(group) for group in groups if len(group) > 1}
    shares = {center: usage[experts] + 1e-6 for center, experts in groups.items()}  # All may be 0.
    shares = {center: each / each.sum() for center, each in shares.items()}
    if isinstance(bank, LayerExperts):
        for center, experts in groups.items():
            for weights in zip(*(bank.layers[expert].weights for expert in experts)):
                mean = np.tensordot(shares[center], list(map(float_array, weights)), 1)
                weights[experts.index(center)].assign(mean)
        return
    stacks = {weight.name: float_array(weight) for weight in bank.weights}
    if "output_scale" in stacks:  # of converted experts
        stacks["down_kernel"] *= stacks["output_scale"][:, None, None]
        stacks["output_scale"][:] = 1.0
    # Weights without hidden features, which could be matched: all of a bank of linear maps.
    whole = stacks if len(bank.projections) == 1 else stacks.keys() & {"down_bias", "output_scale"}
    views = [  # with the hidden features first, (E, H, ...)
        np.atleast_3d(stack) if stack.ndim == 2 or name == "down_kernel" else stack.swapaxes(1, 2)
        for name, stack in stacks.items()
        if name not in whole
    ]
    for center, experts in groups.items():
        for name in whole:
            stacks[name][center] = np.tensordot(shares[center], stacks[name][experts], 1)
        features = {e: np.concatenate([v[e] for v in views], axis=1) for e in experts if views}
        orders = [_match(features[center], each) for each in features.values()]
        for view in views:
            matched = [view[expert][order] for expert, order in zip(experts, orders)]
            view[center] = np.tensordot(shares[center], matched, 1)
    for weight in bank.weights:
        weight.assign(stacks[weight.name])


def _match(to, features):
    """Which hidden feature of an expert is most like each of another's: the best pairs first."""
    unit_to, unit = (
        each / (np.linalg.norm(each, axis=1, keepdims=True) + 1e-12) for each in (to, features)
    )
    alike = unit_to @ unit.T
    order: dict[int, int] = {}
    taken = set()
    for flat in np.argsort(-alike, axis=None, kind="stable").tolist():
        row, column = divmod(flat, len(to))
        if row not in order and column not in taken:
            order[row] = column
            taken.add(column)
    return np.array([order[row] for row in range(len(to))])
