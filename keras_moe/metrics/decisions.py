"""How routers decide: functions of a routing."""

from keras import ops

from keras_moe._internal.checks import check_tensors
from keras_moe.ops.balance import masked_mean
from keras_moe.ops.selection import chosen_experts, take_scores


def router_confidence(routing):
    """Mean over real tokens of the highest probability: 1 / E undecided, 1 decided.

    Args:
        routing: An `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    # Not `ops.max`, which fails where there are no tokens.
    best = ops.expand_dims(ops.argmax(routing.probs, axis=-1), 1)
    return masked_mean(take_scores(routing.probs, best)[:, 0], routing.mask)


def unserved_fraction(routing, plan):
    """Share of the real tokens that no expert serves.

    These are tokens whose assignments were all dropped, or that no expert chose.

    Args:
        routing: An `ops.Routing`.
        plan: The plan of the routing, `router.plan(routing)`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    served = plan.served()
    check_tensors({"T": routing.mask.shape[0]}, **{"plan.served()": (served, "T")})
    return masked_mean(ops.cast(ops.logical_not(served), "float32"), routing.mask)


def router_saturation(before, after):
    """How far routing has settled: the share of a token's experts that it had before.

    Args:
        before: An `ops.Routing` of some tokens at a checkpoint.
        after: The routing of the same tokens at a later one.

    Returns:
        Scalar, float32; 1 where nothing changed, about K / E where nothing is left, 0 where every
        token is padding.

    Raises:
        ValueError: If the routings differ in their numbers of tokens or experts.

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.1.
    """
    check_tensors(
        {"T": after.indices.shape[0], "E": after.counts.shape[0]},
        **{"before.indices": (before.indices, "TK"), "before.counts": (before.counts, "E")},
    )
    same = ops.expand_dims(after.indices, 2) == ops.expand_dims(before.indices, 1)
    used = ops.logical_and(after.indices >= 0, ops.expand_dims(after.mask, 1))
    kept = ops.logical_and(ops.any(same, axis=2), used)
    total = ops.sum(ops.cast(used, "float32"))
    return ops.sum(ops.cast(kept, "float32")) / ops.maximum(total, 1.0)


def coactivation(routing):
    """Which experts serve the same tokens.

    Args:
        routing: An `ops.Routing`.

    Returns:
        (E, E) float32: the share of the tokens of the row's expert that the column's expert serves
        too. The diagonal is 1, or 0 for an expert without tokens.

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.2.
    """
    chosen = chosen_experts(routing.indices, routing.counts.shape[0])
    chosen = ops.cast(ops.logical_and(chosen, ops.expand_dims(routing.mask, 1)), "float32")
    together = ops.matmul(ops.transpose(chosen), chosen)
    return together / ops.maximum(ops.expand_dims(ops.sum(chosen, axis=0), 1), 1.0)
