"""Noisy routing: how likely noise is to choose an expert, which is a load with a gradient.

Axes: T tokens, E experts, K experts per token.
"""

from keras import ops

from keras_moe._internal.shape_checks import check_noise
from keras_moe._internal.validation import check_positive_number
from keras_moe.backend import backend
from keras_moe.ops.selection import chosen_experts, take_scores, top_k_indices


@backend.as_one_program
def noisy_load(clean, noisy, deviation, top_k, mask):
    """Expected assignments of each expert if its own noise were drawn again.

    The probability that the logit of an expert, with new noise, is above that of the best K others.
    Shazeer et al. 2017 (arXiv:1701.06538), eq. 8 to 10.

    Args:
        clean: (T, E) logits without noise.
        noisy: (T, E) logits with noise.
        deviation: standard deviation of the noise, (T, E) or a number.
        top_k: K.
        mask: (T,) bool, False for padding.

    Returns:
        (E,) float32.
    """
    check_noise(clean, noisy, deviation, top_k, mask)
    clean, noisy = ops.convert_to_tensor(clean), ops.convert_to_tensor(noisy)
    num_experts = noisy.shape[-1]
    if not hasattr(deviation, "shape"):
        check_positive_number("deviation", deviation)
    deviation = ops.convert_to_tensor(deviation)
    if top_k == num_experts:
        return ops.sum(ops.cast(ops.expand_dims(mask, 1), "float32") + 0.0 * clean, axis=0)
    best = top_k_indices(noisy, top_k + 1)
    values = take_scores(noisy, best)
    last_in, first_out = values[:, top_k - 1 : top_k], values[:, top_k:]
    is_in = chosen_experts(best[:, :top_k], num_experts)
    threshold = ops.where(is_in, first_out, last_in)
    chance = normal_cdf((clean - threshold) / deviation)
    return ops.sum(ops.where(ops.expand_dims(mask, 1), chance, 0.0), axis=0)


def normal_cdf(x):
    """Probability that a standard normal number is below `x`."""
    return 0.5 * (1.0 + ops.erf(x / 2**0.5))
