"""How routers decide: functions of a routing."""

from keras import ops

from keras_moe.ops.balance import masked_mean, router_entropy


def router_confidence(routing):
    """Mean over real tokens of the highest probability: 1 / E undecided, 1 decided.

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    return masked_mean(ops.max(routing.probs, axis=-1), routing.mask)


def unserved_fraction(routing, plan):
    """Share of the real tokens that no expert serves.

    Tokens that all their experts dropped for want of room, or that no expert chose.

    Args:
        routing: an `ops.Routing`.
        plan: the `ops.GroupedPlan` of the routing.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    groups = plan.groups
    served = groups.sum_rows(ops.ones((groups.num_rows(), 1), "float32"))[:, 0]
    return masked_mean(ops.cast(served < 0.5, "float32"), routing.mask)


def router_saturation(before, after):
    """How far routing has settled: the share of a token's experts it had at an earlier checkpoint.

    Args:
        before: `ops.Routing` of some tokens at a checkpoint.
        after: the routing of the same tokens at a later one.

    Returns:
        Scalar, float32; 1 where nothing changed, about K / E where nothing is left, 0 where every
        token is padding.

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.1.
    """
    same = ops.expand_dims(after.indices, 2) == ops.expand_dims(before.indices, 1)
    used = ops.logical_and(after.indices >= 0, ops.expand_dims(after.mask, 1))
    kept = ops.logical_and(ops.any(same, axis=2), used)
    total = ops.sum(ops.cast(used, "float32"))
    return ops.sum(ops.cast(kept, "float32")) / ops.maximum(total, 1.0)


__all__ = ["router_confidence", "router_entropy", "router_saturation", "unserved_fraction"]
