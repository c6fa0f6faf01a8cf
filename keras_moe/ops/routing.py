"""Routing: which experts serve which token, and with what weight.

Axes: T tokens (all leading axes flattened), E experts, K experts per token.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe._internal.shape_checks import check_fields, check_scores, check_selected
from keras_moe._internal.tensor_checks import check_experts, check_mask
from keras_moe._internal.validation import (
    check_choice,
    check_flag,
    check_function,
    check_positive_number,
    check_top_k,
    shortened,
)
from keras_moe.backend import backend
from keras_moe.ops.scores import SCORES, distribution
from keras_moe.ops.selection import take_scores, top_k_indices


class Routing(NamedTuple):
    """The decision of a router, before any token moves.

    - `indices` (T, K) int32: the experts of each token, -1 in a place that is not used. Best first,
      where tokens choose K of them; in the order of the experts, where K is E. Padding has any, of
      weight zero.
    - `weights` (T, K) float32: their combine weights, zero for padding and unused places.
    - `probs` (T, E) float32: scores of all experts, a distribution over E.
    - `logits` (T, E) float32: what the scores were computed from.
    - `mask` (T,) bool: False for padding.
    - `counts` (E,) int32: assignments per expert, padding excluded, before any drop.
    - `dropped` () float32: share of the assignments that found no slot in their expert.
    - `load` (E,) float32: `counts`; for noisy routers a smooth, differentiable estimate of the
      load.
    - `details`: tuple of tensors that only the router's own plan understands.
    """

    indices: Any
    weights: Any
    probs: Any
    logits: Any
    mask: Any
    counts: Any
    dropped: Any
    load: Any = None
    details: Any = ()


def make_routing(indices, weights, probs, logits, mask, counts=None, load=None, details=()):
    """A `Routing` in which padding has no weight and no count.

    Args:
        indices, weights, probs, logits, mask, details: as in `Routing`.
        counts: (E,) int32, or None to count the indices.
        load: (E,) float32, or None for the counts.
    """
    check_experts("indices", indices, getattr(logits, "shape", (None,))[-1])
    check_fields(Routing(indices, weights, probs, logits, mask, counts, None, load))
    if not isinstance(details, tuple):
        raise TypeError(
            "`details` must be a tuple of tensors. Received: an object of type "
            f"{type(details).__name__}. Pass `(tensor,)`, or leave it out."
        )
    weights = ops.where(ops.expand_dims(mask, 1), weights, 0.0)
    if counts is None:
        counts = count_assignments(indices, mask, logits.shape[-1])
    if load is None:
        load = ops.cast(counts, "float32")
    nothing = ops.zeros((), "float32")
    return Routing(indices, weights, probs, logits, mask, counts, nothing, load, details)


def without_padding(routing, mask):
    """A `Routing` of a user's router, which may not know about some or all of the padding."""
    unknown = ops.logical_and(routing.mask, ops.logical_not(mask))
    extra = count_assignments(routing.indices, unknown, routing.logits.shape[-1])

    def without_extra(counts):
        return counts if counts is None else counts - ops.cast(extra, counts.dtype)

    return routing._replace(
        weights=ops.where(ops.expand_dims(mask, 1), routing.weights, 0.0),
        mask=ops.logical_and(routing.mask, mask),
        counts=without_extra(routing.counts),
        load=without_extra(routing.load),
    )


@backend.as_one_program
def clean_logits(logits, mask=None):
    """Logits in float32 with zeros for padding, and a mask that is never None.

    Padding may hold anything: a NaN there must not reach a gradient, so it is replaced before any
    score is computed, not masked afterwards.
    """
    check_scores("logits", logits)
    logits = ops.cast(logits, "float32")
    if mask is None:
        return logits, ops.ones(ops.shape(logits)[:1], "bool")
    check_mask(mask, logits.shape, of="logits")
    mask = ops.cast(mask, "bool")
    return ops.where(ops.expand_dims(mask, 1), logits, 0.0), mask


def top_k_routing(
    logits, top_k, mask=None, score="softmax", renormalize=None, scale=1.0, select=None
):
    """The `top_k` experts with the best scores.

    With softmax scores and `top_k=1` the weight is the probability itself (Switch, Fedus et al.
    2021, arXiv:2101.03961, eq. 2): renormalised it would be the constant 1 and the router would
    learn nothing from the task. With more, the chosen scores are divided by their sum, which for
    softmax equals a softmax over the chosen logits (Mixtral, arXiv:2401.04088, section 2.1).

    Args:
        logits: (T, E) tensor, computed on in float32.
        top_k: experts per token, from 1 to E.
        mask: (T,) bool tensor, False for padding, or None.
        score: "softmax", "sigmoid" or "sqrt_softplus".
        renormalize: whether the weights of a token are divided by their sum. None: if K > 1.
        scale: what all weights are multiplied by.
        select: function from scores (T, E) to indices (T, K), which sees no gradient. None: the
            best scores.

    Returns:
        A `Routing`.

    Raises:
        ValueError: If there is no such score, or `top_k` is not from 1 to E.
    """
    check_scores("logits", logits)
    check_choice("score", score, SCORES)
    check_positive_number("scale", scale)
    check_top_k(top_k, logits.shape[-1])
    if select is not None and not callable(select):
        raise TypeError(
            "`select` must be a function of scores (T, E). Received: "
            f"select={shortened(select)}. Leave it out for the best scores."
        )
    check_flag("renormalize", renormalize, optional=True)
    logits, mask = clean_logits(logits, mask)
    scores = SCORES[score](logits)
    if select is None:
        indices = top_k_indices(scores, top_k)
    else:
        try:
            indices = select(ops.stop_gradient(scores))
        except TypeError:  # Not before: it is slow, for each call of a router.
            check_function("select", select, "scores")
            raise
        check_selected(indices, scores.shape[0], top_k)
        indices = ops.cast(indices, "int32")
    weights = take_scores(scores, indices)
    if renormalize or (renormalize is None and top_k > 1):
        weights = distribution(weights)
    probs = scores if score == "softmax" else distribution(scores)
    return make_routing(indices, weights * scale, probs, logits, mask)


@backend.as_one_program
def count_assignments(indices, mask, num_experts):
    """How many assignments each expert has.

    Args:
        indices: (T, K) int32; -1 for no expert.
        mask: (T,) bool, False for padding.
        num_experts: E.

    Returns:
        (E,) int32.
    """
    served = ops.where(ops.expand_dims(mask, 1), indices, -1)
    return backend.count_integers(ops.reshape(served, (-1,)), num_experts)
