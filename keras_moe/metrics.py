"""Metrics of expert usage and of routings: pure functions.

In `model.fit` use `callbacks.ExpertMonitor`, in other loops counts of `layer.read_counts()`.

Axes: T tokens, E experts, K experts per token, G groups of tokens.
"""

import math

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_indices, check_integer, check_tensors, host_values
from keras_moe.ops.routing import Routing, check_is_routing
from keras_moe.ops.selection import chosen_experts, entropy, mask_invalid, weights_of_experts

__all__ = [
    "coactivation",
    "count_table",
    "dead_experts",
    "expert_share",
    "load_entropy",
    "load_imbalance",
    "mutual_information",
    "router_entropy",
    "typical_words",
]
__dir__ = __all__.copy


def load_imbalance(counts: Tensor) -> Tensor:
    """Excess of the busiest expert over the mean of `counts` (E,), float32: `max / mean - 1`.

    Also known as MaxVio. 0 at balance or without assignments, E - 1 if one expert has everything.

    Reference: Wang et al. 2024 (arXiv:2408.15664), eq. 4.
    """
    counts = as_counts(counts)
    return ops.maximum(ops.max(counts) / ops.maximum(ops.mean(counts), 1e-30) - 1.0, 0.0)


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the shares of `counts` (E,), divided by `log E`, float32.

    1 at balance; 0 if one of several experts has everything, or without assignments.
    """
    share = expert_share(counts)
    return share[0] if share.shape[0] == 1 else entropy(share) / math.log(share.shape[0])


def dead_experts(counts: Tensor) -> Tensor:
    """Number of experts with less than a thousandth of the mean of `counts` (E,), float32."""
    return ops.sum(ops.cast(is_dead(counts), "float32"))


def is_dead(counts):
    """Which experts `dead_experts` counts, (E,) bool; all without assignments."""
    counts = as_counts(counts)
    # Not zero: where all experts serve all tokens, counts are sums of weights.
    return counts <= 1e-3 * ops.mean(counts)


def expert_share(counts: Tensor) -> Tensor:
    """Each expert's share of the assignments `counts` (E,), float32; 0 without assignments."""
    counts = as_counts(counts)
    return counts / ops.maximum(ops.sum(counts), 1e-30)


def router_entropy(routing: Routing) -> Tensor:
    """Entropy of a token's scores in an `ops.Routing`, divided by `log E`: mean over real tokens.

    Float32 scalar: 1 for a router without a preference, 0 for a certain one or for only padding.
    """
    check_is_routing(routing)
    return routing.entropy() / math.log(max(routing.counts.shape[0], 2))


def coactivation(routing: Routing) -> Tensor:
    """Share of the row expert's tokens that also go to the column's expert, (E, E) float32.

    Of an `ops.Routing`; 0 without tokens.

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.2.
    """
    check_is_routing(routing)
    chosen = chosen_experts(routing.indices, routing.counts.shape[0])
    chosen = ops.cast(ops.logical_and(chosen, ops.expand_dims(routing.mask, 1)), "float32")
    together = ops.matmul(ops.transpose(chosen), chosen)
    return together / ops.maximum(ops.expand_dims(ops.sum(chosen, axis=0), 1), 1.0)


def count_table(routing: Routing, groups: Tensor, num_groups: int) -> Tensor:
    """Assignments of each expert from each group of tokens, (G, E) float32.

    Args:
        routing: An `ops.Routing`.
        groups: Integer tensor or list, (T,). The label, token id or other group of each token, from
            0 to `num_groups` - 1, or -1 for none. Other numbers raise a ValueError in a list or
            NumPy array; in a tensor they count as -1.
        num_groups: Integer. Number of groups, G.
    """
    check_is_routing(routing)
    num_groups = check_integer("num_groups", num_groups)
    check_indices("groups", groups, num_groups)
    groups = ops.convert_to_tensor(groups)
    check_tensors({"T": routing.mask.shape[0]}, groups=(groups, "T", "int"))
    num_experts = routing.counts.shape[0]
    indices = ops.convert_to_tensor(routing.indices)
    indices = mask_invalid(indices, num_experts, routing.mask)
    ones = ops.ones_like(indices, dtype="float32")
    assigned = weights_of_experts(indices, ones, num_experts)
    # Tokens of no group go to a spare one that is sliced off.
    groups = mask_invalid(ops.cast(groups, "int32"), num_groups) % (num_groups + 1)
    return ops.segment_sum(assigned, groups, num_groups + 1)[:-1]


def mutual_information(table: Tensor) -> Tensor:
    """Mutual information of a token's group and its expert, in nats, float32.

    `table` is a tensor or list (G, E), the assignments of `count_table`.
    """
    table = as_counts(table, "GE", "table")
    joint = table / ops.maximum(ops.sum(table), 1.0)
    rows, columns = ops.sum(joint, axis=1, keepdims=True), ops.sum(joint, axis=0, keepdims=True)
    ratio = joint / ops.where(joint > 0, rows * columns, 1.0)
    return ops.sum(joint * ops.log(ops.where(joint > 0, ratio, 1.0)))


def typical_words(routing: Routing, texts: list[str], num_words: int = 10) -> list[list[str]]:
    """The words that are most typical of each expert, a list of strings for each.

    They have the highest lift: the expert's share of a word's assignments, divided by its share of
    all. Ten pseudo-assignments per word, distributed as all assignments are, rank rare words low.

    Args:
        routing: An `ops.Routing`.
        texts: List of T strings, one per token, padding included. Spaces separate words.
        num_words: Integer. Largest number of words per expert; all have a lift above 1.
    """
    check_is_routing(routing)
    if len(texts) != routing.mask.shape[0]:
        rule = f"`texts` must have a string for each of {routing.mask.shape[0]} tokens"
        raise ValueError(f"{rule}. Received: {len(texts)} strings")
    words, found = np.unique(np.array(" ".join(texts).split(), object), return_inverse=True)
    sizes = [len(text.split()) for text in texts]
    indices = np.repeat(ops.convert_to_numpy(routing.indices), sizes, axis=0)
    table = np.zeros((len(words), len(routing.counts) + 1))
    np.add.at(table, (found[:, None], indices), 1)
    table = table[:, :-1]  # The last column is of no expert, -1.
    share = table.sum(axis=0) / max(table.sum(), 1)
    lift = (table + 10 * share) / (table.sum(axis=1) + 10)[:, None] / np.maximum(share, 1e-9)
    best = np.argsort(-lift, axis=0, kind="stable")[:num_words].T
    return [words[row[lift[row, expert] > 1]].tolist() for expert, row in enumerate(best)]


def as_counts(counts, axes="E", name="counts"):
    """Counts as a float32 tensor, checked: their axes and, on the host, their sign."""
    if hasattr(counts, "_fields") or isinstance(counts, (dict, keras.Layer, str)):
        rule = f"`{name}` must be numbers, such as `routing.counts` or `layer.expert_counts`"
        raise TypeError(f"{rule}. Received: a `{type(counts).__name__}`")
    array = host_values(counts)
    if array is not None and (array < 0).any():
        raise ValueError(f"`{name}` must be numbers of at least 0. Received: {array.min()}")
    counts = ops.convert_to_tensor(counts, "float32")
    check_tensors(**{name: (counts, axes)})
    return counts
