"""Balance: scalar losses of a routing, in float32, with padding left out of every mean."""

from keras import ops

from keras_moe._internal.shape_checks import check_fields
from keras_moe._internal.tensor_checks import (
    check_divides,
    check_is_float,
    check_is_number,
    check_mask,
    check_size,
    fits,
)
from keras_moe.backend import backend
from keras_moe.ops.selection import chosen_experts


@backend.as_one_program
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
    check_fields(routing, "probs", "mask", "counts")
    return agreement(routing.counts, masked_mean(routing.probs, routing.mask))


@backend.as_one_program
def sequence_load_balance(routing, sequence_length):
    """Mean over the sequences of the load-balance loss of each.

    DeepSeek-V3 (arXiv:2412.19437), eq. 17 to 20; 1 at balance. A sequence without a real token is
    left out.

    Args:
        routing: an `ops.Routing`.
        sequence_length: tokens of each sequence.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    check_fields(routing, "indices", "probs", "mask", "counts")
    check_size("sequence_length", sequence_length)
    check_divides("sequence_length", sequence_length, routing.mask.shape[0])
    num_experts = routing.probs.shape[-1]
    by_sequence = (-1, sequence_length, num_experts)
    mask = ops.reshape(routing.mask, (-1, sequence_length, 1))
    num_real = ops.sum(ops.cast(mask, "float32"), axis=1)
    probs = ops.where(mask, ops.reshape(routing.probs, by_sequence), 0.0)
    mean_probs = ops.sum(probs, axis=1) / ops.maximum(num_real, 1.0)
    chosen = chosen_experts(routing.indices, num_experts)
    chosen = ops.logical_and(ops.reshape(chosen, by_sequence), mask)
    losses = agreement(ops.sum(ops.cast(chosen, "float32"), axis=1), mean_probs)
    return ops.sum(losses) / ops.maximum(ops.sum(ops.cast(num_real > 0, "float32")), 1.0)


def agreement(counts, mean_probs):
    """`E * sum_e f_e * P_e` along the last axis; f, the shares of the counts, has no gradient.

    Args:
        counts: (..., E) assignments of each expert.
        mean_probs: (..., E) mean score of each expert.

    Returns:
        (...) float32.
    """
    check_is_number("counts", counts)
    check_is_float("mean_probs", mean_probs)
    if not fits(counts.shape, mean_probs.shape) or not len(counts.shape):
        raise ValueError(
            "`counts` and `mean_probs` must have the same shape (..., E). Received: "
            f"counts.shape={tuple(counts.shape)}, mean_probs.shape={tuple(mean_probs.shape)}. "
            "Take both from one routing."
        )
    counts = ops.stop_gradient(ops.cast(counts, "float32"))
    share = counts / ops.maximum(ops.sum(counts, axis=-1, keepdims=True), 1.0)
    return mean_probs.shape[-1] * ops.sum(share * ops.convert_to_tensor(mean_probs), axis=-1)


@backend.as_one_program
def router_z(routing):
    """Router z-loss: mean of `logsumexp(logits) ** 2`, which keeps the logits small.

    Zoph et al. 2022 (ST-MoE, arXiv:2202.08906), eq. 5.

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    check_fields(routing, "logits", "mask")
    return masked_mean(ops.square(ops.logsumexp(routing.logits, axis=-1)), routing.mask)


@backend.as_one_program
def router_entropy(routing):
    """Mean over real tokens of the entropy of the scores, in nats; from 0 to `log E`.

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    check_fields(routing, "probs", "mask")
    probs = ops.convert_to_tensor(routing.probs)
    # The logarithm of what is above zero only: the slope of p log p at 0 is infinite.
    logs = ops.log(ops.where(probs > 0, probs, 1.0))
    return masked_mean(-ops.sum(probs * logs, axis=-1), routing.mask)


@backend.as_one_program
def squared_importance_variation(routing):
    """Squared coefficient of variation of the experts' summed scores: 0 at balance.

    Shazeer et al. 2017 (arXiv:1701.06538), eq. 7, of the scores of all experts as in V-MoE
    (Riquelme et al. 2021, arXiv:2106.05974, appendix A.1).

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    check_fields(routing, "probs", "mask")
    return squared_variation(masked_mean(routing.probs, routing.mask))


@backend.as_one_program
def squared_load_variation(routing):
    """Squared coefficient of variation of the experts' load: 0 at balance.

    Shazeer et al. 2017 (arXiv:1701.06538), eq. 11. The load has a gradient where the router draws
    noise; elsewhere this is a number without one.

    Args:
        routing: an `ops.Routing`.

    Returns:
        Scalar, float32; 0 where every token is padding.
    """
    check_fields(routing, "load")
    return squared_variation(routing.load)


def squared_variation(values):
    """`variance / mean ** 2` of values (E,), the variance divided by E; 0 where all are 0."""
    values = ops.convert_to_tensor(values)
    # Not by the standard deviation, whose root has no gradient at exact balance.
    mean = ops.mean(values)
    variance = ops.mean(ops.square(values - mean))
    return variance / ops.maximum(ops.square(mean), 1e-10)


def masked_mean(values, mask):
    """Mean over the real tokens of `values` (T, ...); 0 where there are none."""
    check_is_number("values", values)
    if not len(values.shape):
        raise ValueError(
            "`values` must have the shape (T, ...). Received: values.shape=(). Pass one value for "
            "each token."
        )
    check_mask(mask, (*values.shape[:1], None), of="values")
    real = ops.reshape(ops.cast(mask, "bool"), (-1,) + (1,) * (len(values.shape) - 1))
    total = ops.sum(ops.where(real, values, 0.0), axis=0)
    return total / ops.maximum(ops.sum(ops.cast(mask, "float32")), 1.0)
