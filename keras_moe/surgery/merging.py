"""Averages similar experts.

Axes: E experts, D features, H hidden width.
"""

import numpy as np
from keras import ops

from keras_moe.layers.layer_experts import LayerExperts


def check_can_merge(name, bank):
    """Refuse experts whose weights cannot be averaged."""
    if not isinstance(bank, LayerExperts):
        if bank.lora_enabled or bank.quantization_mode is not None:
            raise ValueError(
                "Experts must have plain kernels to be averaged, neither quantized nor with LoRA. "
                f"Received: {name!r} with such kernels. Prune them, or merge before that."
            )
        return
    shapes = [[tuple(weight.shape) for weight in layer.weights] for layer in bank.layers]
    if any(each != shapes[0] for each in shapes):
        raise ValueError(
            "Experts must have weights of the same shapes to be averaged. Received: "
            f"{name!r} with {[layer.name for layer in bank.layers]}, which differ. "
            "Prune them instead."
        )


def centers_of(usage, similarity, number):
    """Groups of experts around the most used ones.

    Args:
        usage: (E,) array.
        similarity: (E, E) array.
        number: how many groups.

    Returns:
        Dict from the center of each group to the list of its experts, ascending.
    """
    centers = np.sort(np.argsort(-usage, kind="stable")[:number])
    groups = {int(center): [int(center)] for center in centers}
    for expert in range(len(usage)):
        if expert not in groups:
            groups[int(centers[np.argmax(similarity[expert, centers])])].append(expert)
    return {center: sorted(experts) for center, experts in groups.items()}


def merge(bank, groups, usage):
    """Put the average of each group, weighted by usage, in the place of its center."""
    for center, experts in groups.items():
        if len(experts) > 1:
            # Where none was used, all count alike.
            shares = usage[experts] + 1e-6
            shares = shares / shares.sum()
            if isinstance(bank, LayerExperts):
                _merge_layers(bank, center, experts, shares)
            else:
                _merge_stacked(bank, center, experts, shares)


def _merge_layers(bank, center, experts, shares):
    layers = [bank.layers[expert] for expert in experts]
    for index, weight in enumerate(bank.layers[center].weights):
        values = [ops.convert_to_numpy(layer.weights[index]) for layer in layers]
        weight.assign(np.tensordot(shares, np.stack(values), 1))


def _merge_stacked(bank, center, experts, shares):
    stacks = {weight.name: _array(weight) for weight in bank.weights}
    features = {expert: _hidden_features(stacks, expert) for expert in experts}
    total = sum(
        share * features[expert][_match(features[center], features[expert])]
        for expert, share in zip(experts, shares)
    )
    bias = (
        sum(share * stacks["down_bias"][expert] for expert, share in zip(experts, shares))
        if "down_bias" in stacks
        else None
    )
    column = 0
    for weight in bank.weights:
        stack = stacks[weight.name]
        if weight.name == "down_bias":
            stack[center] = bias
        else:
            width = 1 if stack.ndim == 2 else _features_of(weight)
            part = total[:, column : column + width]
            column += width
            stack[center] = _restored(weight, part)
        weight.assign(stack)


def _hidden_features(stacks, expert):
    """All weights of each hidden feature of an expert, (H, ...)."""
    parts = []
    for name, stack in stacks.items():
        if name == "down_bias":
            continue
        value = stack[expert]
        if name == "down_kernel":
            parts.append(value)
        else:
            parts.append(value[:, None] if value.ndim == 1 else value.T)
    return np.concatenate(parts, axis=1)


def _restored(weight, part):
    if weight.name == "down_kernel":
        return part
    return part[:, 0] if len(weight.shape) == 2 else part.T


def _features_of(weight):
    return weight.shape[2] if weight.name == "down_kernel" else weight.shape[1]


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


def _array(variable):
    return np.array(ops.convert_to_numpy(ops.cast(variable.value, "float32")))
