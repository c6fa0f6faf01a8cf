"""Balance: scalar losses of a routing, in float32, with padding left out of every mean."""

from keras import ops


def load_balance(routing):
    """Switch load-balance loss: `E * sum_e f_e * P_e`, 1 at balance.

    `f_e` is the share of all assignments that chose expert e, over all K choices and before any
    drop; `P_e` is the mean probability of e over real tokens. `f` is a count, so the gradient
    flows through `P` only. Fedus et al. 2021 (arXiv:2101.03961), eq. 4, divided by K so that the
    value does not depend on it.

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    counts = ops.cast(routing.counts, "float32")
    share = counts / ops.maximum(ops.sum(counts), 1.0)
    mean_probs = masked_mean(routing.probs, routing.mask)
    return routing.probs.shape[-1] * ops.sum(ops.stop_gradient(share) * mean_probs)


def router_z(routing):
    """Router z-loss: mean of `logsumexp(logits) ** 2`, which keeps the logits small.

    Zoph et al. 2022 (ST-MoE, arXiv:2202.08906), eq. 5.

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    return masked_mean(ops.square(ops.logsumexp(routing.logits, axis=-1)), routing.mask)


def masked_mean(values, mask):
    """Mean over the real tokens of `values` (T, ...); 0 where there are none."""
    real = ops.reshape(mask, (-1,) + (1,) * (len(values.shape) - 1))
    total = ops.sum(ops.where(real, values, 0.0), axis=0)
    return total / ops.maximum(ops.sum(ops.cast(mask, "float32")), 1.0)
