"""Balance: scalar losses of a routing, in float32, with padding left out of every mean.

Axes: T tokens, E experts, K experts per token.
"""

from keras import ops

from keras_moe._internal.checks import check_mask, check_number, check_tensors
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend
from keras_moe.ops.routing import Routing, check_routing
from keras_moe.ops.selection import _take_scores, _top_k_indices, check_top_k, chosen_experts
from keras_moe.ops.sorting import check_sequence_length


def load_balance(routing: Routing) -> Tensor:
    """Switch load-balance loss: `E * sum_e f_e * P_e`, 1 at balance.

    `f_e` is the share of all assignments that chose expert e, over all K choices and before any
    drop; `P_e` is the mean probability of e over real tokens. `f` is a count, so the gradient
    flows through `P` only. Fedus et al. 2021 (arXiv:2101.03961), eq. 4, divided by K so that the
    value does not depend on it.

    Args:
        routing: `ops.Routing`.

    Returns:
        Float32 scalar; 0 where every token is padding.
    """
    return _load_balance(check_routing(routing, "probs", "mask", "counts"))


@backend.jit_when_eager
def _load_balance(routing):
    return _agreement(routing.counts, _masked_mean(routing.probs, routing.mask))


def sequence_load_balance(routing: Routing, sequence_length: int) -> Tensor:
    """Mean over the sequences of the load-balance loss of each.

    DeepSeek-V3 (arXiv:2412.19437), eq. 17 to 20; 1 at balance. A sequence without a real token is
    left out.

    Args:
        routing: `ops.Routing`.
        sequence_length: Integer. Tokens of each sequence.

    Returns:
        Float32 scalar; 0 where every token is padding.
    """
    routing = check_routing(routing, "indices", "probs", "mask", "counts")
    length = check_sequence_length(sequence_length, routing.mask.shape[0])
    return _sequence_load_balance(routing, length)


@backend.jit_when_eager
def _sequence_load_balance(routing, sequence_length):
    num_experts = routing.probs.shape[-1]
    by_sequence = (-1, sequence_length, num_experts)
    mask = ops.reshape(routing.mask, (-1, sequence_length, 1))
    num_real = ops.sum(ops.cast(mask, "float32"), axis=1)
    probs = ops.where(mask, ops.reshape(routing.probs, by_sequence), 0.0)
    mean_probs = ops.sum(probs, axis=1) / ops.maximum(num_real, 1.0)
    chosen = chosen_experts(routing.indices, num_experts)
    chosen = ops.logical_and(ops.reshape(chosen, by_sequence), mask)
    losses = _agreement(ops.sum(ops.cast(chosen, "float32"), axis=1), mean_probs)
    return ops.sum(losses) / ops.maximum(ops.sum(ops.cast(num_real > 0, "float32")), 1.0)


def agreement(counts: Tensor, mean_probs: Tensor) -> Tensor:
    """`E * sum_e f_e * P_e` along the last axis; f, the shares of the counts, has no gradient.

    Args:
        counts: Tensor (..., E). Assignments of each expert.
        mean_probs: Float tensor (..., E). Mean score of each expert.

    Returns:
        Float32 tensor (...).
    """
    counts, mean_probs = ops.convert_to_tensor(counts), ops.convert_to_tensor(mean_probs)
    axes = "abcdefgh"[-len(mean_probs.shape) :]
    check_tensors(counts=(counts, axes, "number"), mean_probs=(mean_probs, axes, "float"))
    return _agreement(counts, mean_probs)


def _agreement(counts, mean_probs):
    counts = ops.stop_gradient(ops.cast(counts, "float32"))
    share = counts / ops.maximum(ops.sum(counts, axis=-1, keepdims=True), 1.0)
    return mean_probs.shape[-1] * ops.sum(share * mean_probs, axis=-1)


def router_z(routing: Routing) -> Tensor:
    """Router z-loss: mean of `logsumexp(logits) ** 2`, which keeps the logits small.

    Zoph et al. 2022 (ST-MoE, arXiv:2202.08906), eq. 5.

    Args:
        routing: `ops.Routing`.

    Returns:
        Float32 scalar; 0 where every token is padding.
    """
    return _router_z(check_routing(routing, "logits", "mask"))


@backend.jit_when_eager
def _router_z(routing):
    return _masked_mean(ops.square(ops.logsumexp(routing.logits, axis=-1)), routing.mask)


def router_entropy(routing: Routing) -> Tensor:
    """Mean over real tokens of the entropy of the scores, in nats; from 0 to `log E`.

    Args:
        routing: `ops.Routing`.

    Returns:
        Float32 scalar; 0 where every token is padding.
    """
    return _router_entropy(check_routing(routing, "probs", "mask"))


@backend.jit_when_eager
def _router_entropy(routing):
    probs = routing.probs
    # The logarithm of what is above zero only: the slope of p log p at 0 is infinite.
    logs = ops.log(ops.where(probs > 0, probs, 1.0))
    return _masked_mean(-ops.sum(probs * logs, axis=-1), routing.mask)


def squared_importance_variation(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the experts' summed scores: 0 at balance.

    Shazeer et al. 2017 (arXiv:1701.06538), eq. 7, of the scores of all experts as in V-MoE
    (Riquelme et al. 2021, arXiv:2106.05974, appendix A.1).

    Args:
        routing: `ops.Routing`.

    Returns:
        Float32 scalar; 0 where every token is padding.
    """
    return _squared_importance_variation(check_routing(routing, "probs", "mask"))


@backend.jit_when_eager
def _squared_importance_variation(routing):
    return squared_variation(_masked_mean(routing.probs, routing.mask))


def squared_load_variation(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the experts' load: 0 at balance.

    Shazeer et al. 2017 (arXiv:1701.06538), eq. 11. The load has a gradient where the router draws
    noise; elsewhere this is a number without one.

    Args:
        routing: `ops.Routing`.

    Returns:
        Float32 scalar; 0 where every token is padding.
    """
    return _squared_load_variation(check_routing(routing, "load"))


@backend.jit_when_eager
def _squared_load_variation(routing):
    return squared_variation(routing.load)


def squared_variation(values):
    """`variance / mean ** 2` of values (E,), the variance divided by E; 0 where all are 0."""
    # Not by the standard deviation, whose root has no gradient at exact balance.
    mean = ops.mean(values)
    variance = ops.mean(ops.square(values - mean))
    return variance / ops.maximum(ops.square(mean), 1e-10)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens.

    Args:
        values: Tensor (T, ...).
        mask: Bool tensor (T,), False for padding.

    Returns:
        Tensor (...); 0 where there is no real token.
    """
    values, mask = ops.convert_to_tensor(values), ops.convert_to_tensor(mask)
    check_mask(mask, values.shape[:1])
    return _masked_mean(values, ops.cast(mask, "bool"))


def _masked_mean(values, mask):
    real = ops.reshape(mask, (-1,) + (1,) * (len(values.shape) - 1))
    total = ops.sum(ops.where(real, values, 0.0), axis=0)
    return total / ops.maximum(ops.sum(ops.cast(mask, "float32")), 1.0)


def noisy_load(
    clean: Tensor, noisy: Tensor, deviation: float | Tensor, top_k: int, mask: Tensor
) -> Tensor:
    """Expected assignments of each expert if its own noise were drawn again.

    The probability that the logit of an expert, with new noise, is above that of the best K others:
    a load with a gradient. Shazeer et al. 2017 (arXiv:1701.06538), eq. 8 to 10.

    Args:
        clean: Float tensor (T, E). Logits without noise.
        noisy: Float tensor (T, E). Logits with noise.
        deviation: Float tensor (T, E), or a positive float. Standard deviation of the noise.
        top_k: Integer, K.
        mask: Bool tensor (T,), False for padding.

    Returns:
        Float32 tensor (E,).
    """
    clean, noisy, mask = map(ops.convert_to_tensor, (clean, noisy, mask))
    check_tensors(clean=(clean, "TE", "float"), noisy=(noisy, "TE", "float"))
    check_mask(mask, noisy.shape[:1])
    if isinstance(deviation, (list, tuple)) or len(getattr(deviation, "shape", ())):
        deviation = ops.convert_to_tensor(deviation)
        check_tensors(noisy=(noisy, "TE"), deviation=(deviation, "TE", "float"))
    else:
        deviation = check_number("deviation", deviation, above=0)
    top_k = check_top_k(top_k, noisy.shape[-1])
    return _noisy_load(clean, noisy, deviation, top_k, ops.cast(mask, "bool"))


@backend.jit_when_eager
def _noisy_load(clean, noisy, deviation, top_k, mask):
    num_experts = noisy.shape[-1]
    if top_k == num_experts:
        return ops.sum(ops.cast(ops.expand_dims(mask, 1), "float32") + 0.0 * clean, axis=0)
    best = _top_k_indices(noisy, top_k + 1)
    values = _take_scores(noisy, best)
    last_in, first_out = values[:, top_k - 1 : top_k], values[:, top_k:]
    is_in = chosen_experts(best[:, :top_k], num_experts)
    threshold = ops.where(is_in, first_out, last_in)
    chance = normal_cdf((clean - threshold) / deviation)
    return ops.sum(ops.where(ops.expand_dims(mask, 1), chance, 0.0), axis=0)


def normal_cdf(x):
    """Probability that a standard normal number is below `x`."""
    return 0.5 * (1.0 + ops.erf(x / 2**0.5))
