"""Score functions: from the logits of a router to what experts are chosen and weighted by."""

from keras import ops

from keras_moe.backend import backend

# Added to scores that could otherwise be zero: a router that pushed all of a token's scores there
# would divide zero by zero, or escape the balance loss, whose gradient vanishes with the scores.
SMALLEST_SCORE = 1e-7


@backend.jit_when_eager
def softmax(logits, axis=-1):
    """Softmax along an axis, where one NaN makes all scores NaN."""
    # TensorFlow's own softmax on CPUs gives the other experts a score of 0 there, which would hide
    # a broken router; and `ops.softmax` warns of a single expert.
    return ops.exp(ops.log_softmax(logits, axis=axis))


@backend.jit_when_eager
def sigmoid(logits):
    """Each expert scored alone: DeepSeek-V3 (arXiv:2412.19437), eq. 15."""
    return ops.sigmoid(logits) + SMALLEST_SCORE


@backend.jit_when_eager
def sqrt_softplus(logits):
    """`sqrt(log(1 + exp(z)))`, which grows with the logit where a sigmoid saturates."""
    # Inside the root: its slope at zero is infinite.
    return ops.sqrt(ops.softplus(logits) + SMALLEST_SCORE**2)


SCORES = {"softmax": softmax, "sigmoid": sigmoid, "sqrt_softplus": sqrt_softplus}


@backend.jit_when_eager
def distribution(scores):
    """Scores (T, E) as shares of their sum."""
    return scores / ops.maximum(ops.sum(scores, axis=-1, keepdims=True), 1e-20)


def smooth_step(values):
    """From exactly 0 below -1/2 to exactly 1 above 1/2, a cubic between, with slopes of 0 there.

    Hazimeh et al. 2021 (arXiv:2106.03760), eq. 4, with a width of 1.
    """
    values = ops.clip(values + 0.5, 0.0, 1.0)
    # The minimum, as rounding may exceed 1.
    return ops.minimum(ops.square(values) * (3.0 - 2.0 * values), 1.0)


@backend.jit_when_eager
def selector_scores(bits, num_experts):
    """Shares (..., E) of the experts from the chance (..., M) that each bit of their number is 1.

    Hazimeh et al. 2021 (arXiv:2106.03760), eq. 3. Where E is no power of 2, an expert without a
    partner that differs in the highest bit alone does without that bit: shares always sum to 1.
    """
    shares = ops.ones((*ops.shape(bits)[:-1], 1), bits.dtype)
    for place in range(bits.shape[-1]):
        bit = bits[..., place : place + 1]
        number = min(2**place, num_experts - 2**place)  # of experts that the bit tells apart
        pairs, single = shares[..., :number], shares[..., number:]
        shares = ops.concatenate([pairs * (1.0 - bit), single, pairs * bit], axis=-1)
    return shares


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
