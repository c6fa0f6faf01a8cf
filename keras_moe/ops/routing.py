"""Routing: which experts serve which token, and with what weight.

Axes: T tokens (all leading axes flattened), E experts, K experts per token.
"""

from typing import Any, NamedTuple

from keras import ops


class Routing(NamedTuple):
    """The decision of a router, before any token moves.

    - `indices` (T, K) int32: the experts of each token, best first.
    - `weights` (T, K) float32: their combine weights, zero for padding.
    - `probs` (T, E) float32: scores of all experts, a distribution over E.
    - `logits` (T, E) float32: what the scores were computed from.
    - `mask` (T,) bool: False for padding.
    - `counts` (E,) int32: assignments per expert, padding excluded, before any drop.
    - `dropped` () float32: share of the assignments that found no room in their expert.
    """

    indices: Any
    weights: Any
    probs: Any
    logits: Any
    mask: Any
    counts: Any
    dropped: Any


def top_k_routing(logits, top_k, mask=None):
    """Softmax over all experts, then the `top_k` best.

    With `top_k=1` the weight is the probability itself (Switch, Fedus et al. 2021,
    arXiv:2101.03961, eq. 2): renormalised it would be the constant 1 and the router would learn
    nothing from the task. With more, the chosen probabilities are divided by their sum, which
    equals a softmax over the chosen logits (Mixtral, arXiv:2401.04088, section 2.1).

    Args:
        logits: (T, E) tensor, computed on in float32.
        top_k: experts per token, from 1 to E.
        mask: (T,) bool tensor, False for padding, or None.

    Returns:
        A `Routing`.
    """
    # Padding may hold anything: a NaN there must not reach a gradient, so it is replaced before
    # the softmax and not masked behind it.
    logits = ops.cast(logits, "float32")
    if mask is None:
        mask = ops.ones(ops.shape(logits)[:1], "bool")
    else:
        logits = ops.where(ops.expand_dims(mask, 1), logits, 0.0)
    probs = softmax(logits)
    indices = top_k_indices(probs, top_k)
    weights = take_scores(probs, indices)
    if top_k > 1:
        weights = weights / ops.sum(weights, axis=-1, keepdims=True)
    weights = ops.where(ops.expand_dims(mask, 1), weights, 0.0)
    counts = count_assignments(indices, mask, logits.shape[-1])
    return Routing(indices, weights, probs, logits, mask, counts, ops.zeros((), "float32"))


def softmax(logits):
    """Softmax over the experts, whose NaN logits make all scores of a token NaN.

    TensorFlow's own softmax on CPUs gives the other experts a score of 0 there, which would hide
    a broken router; and `ops.softmax` warns of a single expert.
    """
    return ops.exp(ops.log_softmax(logits, axis=-1))


def top_k_indices(scores, top_k):
    """The `top_k` experts of each token, best first; a tie goes to the lower index.

    NaN scores choose valid experts too: the output is NaN then, and nothing is read out of range.

    Args:
        scores: (T, E) float32 tensor.
        top_k: experts per token.

    Returns:
        (T, K) int32.
    """
    # K rounds of argmax agree on ties and NaN on every backend, where top_k does not, and for a
    # few experts per token they are as fast.
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:  # Keras has no maximum of nothing.
        return ops.zeros((0, top_k), "int32")
    scores = ops.stop_gradient(scores)
    scores = ops.where(ops.isnan(scores), float("-inf"), scores)
    experts = ops.arange(num_experts, dtype="int32")
    taken = ops.zeros_like(scores, dtype="bool")
    chosen = []
    for _ in range(top_k):
        # A taken expert ranks below one whose score is minus infinity.
        best = ops.max(ops.where(taken, float("-inf"), scores), axis=-1, keepdims=True)
        candidates = ops.logical_and(ops.logical_not(taken), scores >= best)
        index = ops.min(ops.where(candidates, experts, num_experts), axis=-1)
        chosen.append(index)
        taken = ops.logical_or(taken, ops.expand_dims(index, 1) == experts)
    return ops.stack(chosen, axis=1)


def take_scores(scores, indices):
    """The scores (T, E) of the chosen experts (T, K), as (T, K).

    A sum over one-hot rows: its gradient is a product, where that of a gather is a scatter.
    """
    chosen = ops.expand_dims(indices, -1) == ops.arange(scores.shape[-1], dtype="int32")
    return ops.sum(ops.where(chosen, ops.expand_dims(scores, 1), 0.0), axis=-1)


def count_assignments(indices, mask, num_experts):
    """How many assignments each expert has.

    Args:
        indices: (T, K) int32.
        mask: (T,) bool, False for padding.
        num_experts: E.

    Returns:
        (E,) int32.
    """
    chosen = ops.expand_dims(indices, -1) == ops.arange(num_experts, dtype="int32")
    chosen = ops.logical_and(chosen, ops.reshape(mask, (-1, 1, 1)))
    return ops.sum(ops.cast(chosen, "int32"), axis=(0, 1))
