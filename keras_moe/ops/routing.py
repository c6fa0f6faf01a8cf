"""Routing: which experts serve which token, and with what weight.

Axes: T tokens (all leading axes flattened), E experts, K experts per token.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_choice, check_tensors
from keras_moe.backend import backend
from keras_moe.backend.base import LOW
from keras_moe.ops.selection import (
    SCORES,
    SMALLEST_SCORE,
    distribution,
    entropy,
    mask_invalid,
    softmax,
    top_k_indices,
)


class Routing(NamedTuple):
    """The decision of a router, before any token moves: five tensors, completed by `Router`.

    - `indices` (T, K) int32: the experts of each token, best first; of `DenseRouter`,
      `DSelectKRouter` and `ExpertChoiceRouter` position e is expert e. -1 in unused positions and
      at padding.
    - `weights` (T, K) float32: their combine weights, zero for padding and unused positions.
    - `probs` (T, E) float32: scores of all experts, a distribution over E.
    - `logits` (T, E) float32: what the scores were computed from.
    - `mask` (T,) bool: False for padding.
    - `counts` (E,) int32: assignments per expert, padding excluded, before any drop. float32 of
      routers that are `counted_by_weight`: the combine weight of each, scaled to the same sum.
    - `dropped` () float32: share of the assignments that found no slot in their expert.
    - `load` (E,) float32: `counts`; for noisy routers a smooth, differentiable estimate of them.
    - `details`: dict of tensors for the router's own plan or a loss made for it. Empty for most.
    """

    indices: Any
    weights: Any
    probs: Any
    logits: Any
    mask: Any
    counts: Any = None
    dropped: Any = None
    load: Any = None
    details: Any = {}  # of all routings without: replaced as a whole, never changed

    @backend.jit_when_eager
    def mean(self, values: Tensor) -> Tensor:
        """Mean (...) of values (T, ...) over the real tokens, 0 where there is none."""
        if backend.is_complete(self.mask):
            return ops.mean(values, axis=0)
        is_padding = ops.reshape(~self.mask, (-1, *[1] * (len(values.shape) - 1)))
        total = ops.sum(backend.masked_fill(values, is_padding, 0.0), axis=0)
        return total / (ops.sum(ops.cast(self.mask, "float32")) + 1e-20)

    @backend.jit_when_eager
    def entropy(self) -> Tensor:
        """Mean over real tokens of the entropy of the scores, from 0 to `log E`; 0 without any."""
        return self.mean(entropy(ops.convert_to_tensor(self.probs)))


def check_is_routing(routing):
    if not isinstance(routing, Routing):
        rule = "`routing` must be an `ops.Routing`"
        raise TypeError(f"{rule}. Received: an object of type {type(routing).__name__}")


def check_routing(routing, sizes=None):
    """Check the shapes and dtypes of the fields of a routing that are not None."""
    check_tensors(
        sizes, **{name: (getattr(routing, name), *kind) for name, kind in _FIELDS.items()}
    )


_FIELDS = {
    "indices": ("TK", "int"),
    "weights": ("TK", "float"),
    "probs": ("TE", "float"),
    "logits": ("TE", "float"),
    "mask": ("T", "mask"),
    "counts": ("E", "number"),
    "load": ("E", "float"),
}


@backend.jit_when_eager
def complete(routing):
    """The routing with all of its fields, in which padding has no expert, weight or count."""
    num_experts, counts, load = routing.logits.shape[-1], routing.counts, routing.load
    # Nothing is read or written out of range, whatever a user-defined router returns.
    indices = mask_invalid(routing.indices, num_experts, routing.mask)
    counts = backend.count_integers(indices, num_experts) if counts is None else counts
    return routing._replace(
        indices=indices,
        weights=backend.fill_unserved(routing.weights, indices, 0.0),
        counts=counts,
        load=ops.cast(counts, "float32") if load is None else load,
        dropped=ops.zeros((), "float32") if routing.dropped is None else routing.dropped,
    )


@backend.jit_when_eager
def without_padding(values, mask, is_zero=False):
    """Values (T, F), zero where a mask (T,) is False, and the mask, which is never None.

    Before any score is computed: a NaN in padding must not reach a gradient.
    """
    if mask is None:
        return values, backend.mark_complete(ops.ones_like(values[:, 0], "bool"))
    mask = ops.cast(mask, "bool")
    return values if is_zero else ops.where(ops.expand_dims(mask, 1), values, 0.0), mask


def top_k_routing(
    logits: Tensor,
    top_k: int,
    mask: Tensor | None = None,
    score: str = "softmax",
) -> Routing:
    """The `top_k` experts with the best scores.

    With `top_k=1` the weight is the score itself (Switch, Fedus et al. 2021, arXiv:2101.03961, eq.
    2): renormalised it would be the constant 1, and the router would learn nothing from the task.
    With more, the chosen scores are divided by their sum, which for softmax equals a softmax over
    the chosen logits (Mixtral, arXiv:2401.04088, section 2.1).

    Args:
        logits: Float tensor (T, E), computed on in float32.
        top_k: Integer. Experts per token, from 1 to E.
        mask: Bool tensor (T,), False for padding, or None.
        score: String. `"softmax"`, `"sigmoid"` or `"sqrt_softplus"`.

    Returns:
        A `Routing`.

    Raises:
        ValueError: If there is no such score, or `top_k` is not from 1 to E.

    Example:

    >>> keras_moe.ops.top_k_routing(keras.random.normal((6, 4)), top_k=2).indices.shape
    (6, 2)
    """
    logits = ops.convert_to_tensor(logits)
    mask = None if mask is None else ops.convert_to_tensor(mask)
    check_tensors(logits=(logits, "TE", "float"), mask=(mask, "T", "mask"))
    check_choice("score", score, SCORES)
    logits, mask = without_padding(ops.cast(logits, "float32"), mask)
    scores = SCORES[score](logits)
    indices = top_k_indices(ops.stop_gradient(scores), top_k)
    weights, probs = weigh(indices, logits, scores, score)
    return complete(Routing(indices, weights, probs, logits, mask))


@backend.jit_when_eager
def weigh(indices, logits, scores, score, renormalize=None, scale=1.0):
    """Weights (T, K) of chosen experts, and `probs`, by their scores (T, E) of the kind `score`."""
    indices = mask_invalid(indices, scores.shape[1])
    renormalizes = indices.shape[1] > 1 if renormalize is None else renormalize
    is_softmax = score == "softmax"
    weights = backend.take_columns(logits if renormalizes and is_softmax else scores, indices)
    if renormalizes and is_softmax:  # with fewer operations
        weights = softmax(backend.fill_unserved(weights, indices, LOW))
    elif renormalizes:
        weights = distribution(weights)
    weights = weights if scale == 1 else weights * scale
    return weights, scores if is_softmax else distribution(scores)


def weighted_counts(indices, weights, mask):
    """Counts (E,), float32: shares of the combine weight, without a gradient.

    Place e of indices (T, E) is e, or -1 where it does not serve. The sum is that of assignments.
    """
    # A sum that is NaN once would stay so in the counters.
    served = ops.logical_and(ops.expand_dims(mask, 1), indices >= 0)
    counted = ops.logical_and(served, ops.isfinite(weights))
    totals = ops.sum(ops.where(counted, ops.stop_gradient(weights), 0.0), axis=0)
    assigned = ops.sum(ops.cast(served, "float32"))
    return totals * (assigned / ops.maximum(ops.sum(totals), SMALLEST_SCORE))
