"""Score functions: from the logits of a router to what experts are chosen and weighted by."""

from keras import ops

from keras_moe.backend import backend

# Added to scores that could otherwise be zero: a router that pushed all of a token's scores there
# would divide zero by zero, or escape the balance loss, whose gradient vanishes with the scores.
SMALLEST_SCORE = 1e-7


@backend.jit_when_eager
def softmax(logits, axis=-1):
    """Softmax along an axis, where one NaN makes all scores NaN.

    TensorFlow's own softmax on CPUs gives the other experts a score of 0 there, which would hide
    a broken router; and `ops.softmax` warns of a single expert.
    """
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
