"""Scores of experts from logits, and the selection of the best ones of a token."""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.sorting import as_dtype

# Added to scores that could otherwise be zero: a router that pushed all of a token's scores there
# would divide zero by zero, or escape the balance loss, whose gradient vanishes with the scores.
SMALLEST_SCORE = 1e-7


softmax = backend.jit_when_eager(backend.softmax)


def sigmoid(logits):
    """Each expert scored alone: DeepSeek-V3 (arXiv:2412.19437), eq. 15."""
    return ops.sigmoid(logits) + SMALLEST_SCORE


def sqrt_softplus(logits):
    """`sqrt(log(1 + exp(z)))`, which grows with the logit where a sigmoid saturates."""
    # Inside the root: its slope at zero is infinite.
    return ops.sqrt(ops.softplus(logits) + SMALLEST_SCORE**2)


SCORES = {"softmax": softmax, "sigmoid": sigmoid, "sqrt_softplus": sqrt_softplus}


def distribution(scores):
    """Scores (T, E) as shares of their sum."""
    return scores / (ops.sum(scores, axis=-1, keepdims=True) + 1e-20)


def entropy(probs):
    """Entropy (...) of distributions (..., E), in nats."""
    # The slope of p log p at 0 is infinite.
    return -ops.sum(probs * ops.log(probs + 1e-37), axis=-1)


def l2_normalize(vectors, axis):
    """Vectors along `axis` with a length of 1, those near zero with a shorter one."""
    return vectors * _inverse_length(vectors, axis)


def cosine_logits(vectors, directions):
    """Products (R, E) of the unit vectors of rows (R, D) with directions (D, E)."""
    # Rows are scaled after the product, which has fewer values.
    return ops.matmul(vectors, directions) * _inverse_length(vectors, axis=1)


def _inverse_length(vectors, axis):
    # The constant inside the root: a token of zeros has a gradient then.
    return ops.rsqrt(ops.sum(ops.square(vectors), axis=axis, keepdims=True) + 1e-6)


@backend.jit_when_eager
def top_k_indices(scores, top_k):
    """The `top_k` experts (T, K), int32, of scores (T, E), best first; ties go to the lower index.

    NaN ranks first, so that the output is NaN as well, and nothing is read out of range.
    """
    num_tokens, num_experts = scores.shape
    if not 0 < top_k <= num_experts:
        rule = "`top_k` must be at most the number of experts, and at least 1"
        raise ValueError(f"{rule}. Received: top_k={top_k}, {num_experts} experts")
    if num_tokens == 0:  # Keras cannot take the maximum of an empty axis.
        return ops.zeros((0, top_k), "int32")
    return backend.top_k(scores, top_k)


def chosen_experts(indices, num_experts):
    """(T, E) bool: whether each expert is among the indices (T, K) of a token."""
    experts = ops.arange(num_experts, dtype="int32")
    return ops.any(ops.expand_dims(indices, -1) == experts, axis=1)


@backend.jit_when_eager
def mask_invalid(indices, num_experts, mask=None):
    """Indices (T, K) with -1 in place of invalid ones, or where a mask (T,) is False."""
    if backend.is_complete(indices, num_experts) and (mask is None or backend.is_complete(mask)):
        return indices
    indices = as_dtype(indices, "int32")  # -1 is no number of an unsigned dtype
    invalid = (indices < 0) | (indices >= num_experts)
    if mask is not None:
        invalid = invalid | ~ops.expand_dims(mask, 1)
    return backend.masked_fill(indices, invalid, -1)


def without_repeats(indices):
    """Indices (T, S) with -1 in place of experts that the token has in an earlier place."""
    is_same = ops.expand_dims(indices, 1) == ops.expand_dims(indices, 2)  # (T, place, other)
    is_repeat = ops.logical_and(is_same, ops.tri(indices.shape[1], k=-1, dtype="bool"))
    return ops.where(ops.any(is_repeat, axis=2), -1, indices)


def weights_of_experts(indices, weights, num_experts):
    """Weights (T, E) of all experts from those (T, K) of the chosen ones."""
    # Not `ops.segment_sum`, with which PyTorch exports a program for one size of batches.
    is_chosen = ops.expand_dims(indices, 2) == ops.arange(num_experts, dtype=indices.dtype)
    return ops.sum(ops.where(is_chosen, ops.expand_dims(weights, 2), 0.0), axis=1)


take_scores = backend.jit_when_eager(backend.take_columns)
