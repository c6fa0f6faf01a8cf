"""Selection: which experts of a token have the best scores, under one constraint or another."""

import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer
from keras_moe.backend import backend

# The second lowest float: below all other scores and above minus infinity. TensorFlow's argmax
# begins from the lowest and therefore never finds it.
LOW = float(np.nextafter(np.finfo("float32").min, np.float32(0)))


def check_top_k(top_k, num_experts):
    """Return a number of experts per token as a Python integer, from 1 to E."""
    top_k = check_integer("top_k", top_k)
    if top_k > num_experts:
        raise ValueError(
            "`top_k` must be at most the number of experts. "
            f"Received: top_k={top_k}, {num_experts} experts"
        )
    return top_k


@backend.jit_when_eager
def top_k_indices(scores: Tensor, top_k: int) -> Tensor:
    """The `top_k` experts of each token, best first; a tie goes to the lower index.

    NaN scores choose valid experts too: the output is NaN then, and nothing is read out of range.

    Args:
        scores: Float tensor (T, E).
        top_k: Integer. Experts per token.

    Returns:
        Tensor (T, K) of int32.
    """
    # K rounds of argmax agree on ties and NaN on every backend, where top_k does not, as fast.
    num_tokens, num_experts = scores.shape
    top_k = check_top_k(top_k, num_experts)
    if num_tokens == 0:  # Keras cannot take the maximum of an empty axis.
        return ops.zeros((0, top_k), "int32")
    scores = ops.stop_gradient(scores)
    # NaN and minus infinity rank above the experts that are taken already.
    rest = ops.where(scores > LOW, scores, LOW)
    experts = ops.arange(num_experts, dtype="int32")
    chosen = [backend.argmax(rest)]
    for _ in range(top_k - 1):
        rest = ops.where(ops.expand_dims(chosen[-1], 1) == experts, float("-inf"), rest)
        chosen.append(backend.argmax(rest))
    return ops.stack(chosen, axis=1)


def top_tokens(scores, number):
    """Indices (..., number) of the largest of (..., S), best first; ties go to the lower index."""
    if backend.needs_static_shapes():
        # XLA finds the largest without a sort of all.
        places = ops.top_k(scores, number)[1]
    else:
        # Not `top_k`, which on PyTorch orders ties arbitrarily.
        places = ops.argsort(-scores, axis=-1)[..., :number]
    return ops.cast(places, "int32")


@backend.jit_when_eager
def group_limited_scores(scores, num_groups, top_groups):
    """Scores (T, E), minus infinity for the experts outside a token's best groups.

    A group is as good as the sum of its two best experts. DeepSeek-V3 (arXiv:2412.19437),
    section 2.1.2, there called nodes. Not zero: a selection bias makes scores negative, and an
    excluded expert would beat an admitted one.
    """
    size = scores.shape[-1] // num_groups
    grouped = ops.reshape(scores, (-1, size))
    best = top_k_indices(grouped, min(2, size))
    of_groups = ops.sum(take_scores(grouped, best), axis=-1)
    chosen = top_k_indices(ops.reshape(of_groups, (-1, num_groups)), top_groups)
    admitted = ops.repeat(chosen_experts(chosen, num_groups), size, axis=1)
    return ops.where(admitted, scores, float("-inf"))


def chosen_experts(indices, num_experts):
    """(T, E) bool: whether each expert is among the indices (T, K) of a token."""
    experts = ops.arange(num_experts, dtype="int32")
    return ops.any(ops.expand_dims(indices, -1) == experts, axis=1)


@backend.jit_when_eager
def mask_invalid(indices, num_experts, mask=None):
    """Indices (T, K) with -1 in place of invalid ones, or where a mask (T,) is False."""
    known = (indices >= 0) & (indices < num_experts)
    if mask is not None:
        known = known & ops.expand_dims(mask, 1)
    return ops.where(known, indices, -1)


@backend.jit_when_eager
def take_scores(scores, indices):
    """Scores (T, K) of the chosen experts, from scores (T, E); 0 where an index is -1."""
    return backend.take_columns(scores, indices)
