"""How routers decide: functions of a routing."""

from keras import ops

from keras_moe._internal.shape_checks import check_fields, check_shapes, known
from keras_moe._internal.tensor_checks import fits
from keras_moe.ops.balance import masked_mean, router_entropy
from keras_moe.ops.selection import take_scores


def router_confidence(routing):
    """Mean over real tokens of the highest probability: 1 / E undecided, 1 decided.

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    check_fields(routing, "probs", "mask")
    # Not `ops.max`, which fails where there are no tokens.
    best = ops.expand_dims(ops.argmax(routing.probs, axis=-1), 1)
    return masked_mean(take_scores(routing.probs, best)[:, 0], routing.mask)


def unserved_fraction(routing, plan):
    """Share of the real tokens that no expert serves.

    These are tokens whose assignments were all dropped, or that no expert chose.

    Args:
        routing: an `ops.Routing`.
        plan: the plan of the routing.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    check_fields(routing, "mask")
    if not hasattr(plan, "served"):
        raise TypeError(
            "`plan` must be a plan. Received: an object of type "
            f"{type(plan).__name__}. Pass `router.plan(routing)`."
        )
    served = plan.served()
    check_shapes({"plan.served()": (served, "T", "mask")}, **known(T=routing.mask.shape[0]))
    unserved = ops.logical_not(served)
    return masked_mean(ops.cast(unserved, "float32"), routing.mask)


def router_saturation(before, after):
    """How far routing has settled: the share of a token's experts that it had before.

    Args:
        before: `ops.Routing` of some tokens at a checkpoint.
        after: the routing of the same tokens at a later one.

    Returns:
        Scalar, float32; 1 where nothing changed, about K / E where nothing is left, 0 where every
        token is padding.

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.1.
    """
    check_fields(before, "indices", "counts")
    check_fields(after, "indices", "mask", "counts")
    if not fits(before.indices.shape[:1], after.indices.shape[:1]):
        raise ValueError(
            "Both routings must be of the same tokens. Received: "
            f"{before.indices.shape[0]} and {after.indices.shape[0]} tokens. Route the same data."
        )
    if not fits(before.counts.shape, after.counts.shape):
        raise ValueError(
            "Both routings must be of the same experts. Received: "
            f"{before.counts.shape[0]} and {after.counts.shape[0]} experts. Take both from one "
            "model."
        )
    same = ops.expand_dims(after.indices, 2) == ops.expand_dims(before.indices, 1)
    used = ops.logical_and(after.indices >= 0, ops.expand_dims(after.mask, 1))
    kept = ops.logical_and(ops.any(same, axis=2), used)
    total = ops.sum(ops.cast(used, "float32"))
    return ops.sum(ops.cast(kept, "float32")) / ops.maximum(total, 1.0)


__all__ = ["router_confidence", "router_entropy", "router_saturation", "unserved_fraction"]
