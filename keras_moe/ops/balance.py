"""Balance: scalars of a routing, in float32, with padding left out of every mean.

Axes: T tokens, E experts, K experts per token.
"""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.selection import chosen_experts, take_scores, top_k_indices


def load_importance_product(counts, mean_probs):
    """`E * sum_e f_e * P_e` of counts and mean scores (..., E): f, their shares, has no gradient.

    Fedus et al. 2021 (arXiv:2101.03961), eq. 4, divided by K: the value is 1 at balance.
    """
    counts = ops.cast(counts, "float32")  # without a gradient
    share = counts / ops.maximum(ops.sum(counts, axis=-1, keepdims=True), 1.0)
    return mean_probs.shape[-1] * ops.sum(share * mean_probs, axis=-1)


@backend.jit_when_eager
def router_entropy(routing):
    """Mean over real tokens of the entropy of the scores, from 0 to `log E`; 0 without any."""
    return routing.mean(entropy(ops.convert_to_tensor(routing.probs), keepdims=True))[0]


def entropy(probs, keepdims=False):
    """Entropy (...) of distributions (..., E), in nats."""
    # The logarithm of what is above zero only: the slope of p log p at 0 is infinite.
    logs = ops.log(ops.where(probs > 0, probs, 1.0))
    return -ops.sum(probs * logs, axis=-1, keepdims=keepdims)


@backend.jit_when_eager
def noisy_load(clean, noisy, deviation, top_k, mask):
    """Expected assignments (E,) of each expert if its own noise were drawn again.

    The probability that the logit of an expert, with new noise, is above the best K others: a load
    with a gradient. Shazeer et al. 2017 (arXiv:1701.06538), eq. 8 to 10. `clean` and `noisy` are
    logits (T, E), `deviation` (T, E), or a number, is the standard deviation of the noise.
    """
    num_experts = noisy.shape[-1]
    if top_k == num_experts:
        return ops.sum(ops.cast(ops.expand_dims(mask, 1), "float32") + 0.0 * clean, axis=0)
    best = top_k_indices(noisy, top_k + 1)
    values = take_scores(noisy, best)
    last_in, first_out = values[:, top_k - 1 : top_k], values[:, top_k:]
    is_in = chosen_experts(best[:, :top_k], num_experts)
    threshold = ops.where(is_in, first_out, last_in)
    chance = 0.5 * (1.0 + ops.erf((clean - threshold) / (deviation * 2**0.5)))
    return ops.sum(ops.where(ops.expand_dims(mask, 1), chance, 0.0), axis=0)
