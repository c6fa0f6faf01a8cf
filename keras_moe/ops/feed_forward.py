"""The feed-forward network of one expert, plain or gated, as a grouped operation."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe._internal.shape_checks import check_groups
from keras_moe._internal.validation import check_not_negative, check_positive_number, shortened
from keras_moe.backend import backend
from keras_moe.ops.assignments import Assignments, Choices
from keras_moe.ops.grouped import feed_forward_step, low_rank_step, run_grouped
from keras_moe.ops.grouped.records import QUANTIZED, Packed, Parameters
from keras_moe.ops.groups import check_row_numbers
from keras_moe.ops.platforms import named_platform
from keras_moe.ops.sharded import Exchange, run_sharded


class LowRank(NamedTuple):
    """Corrections of low rank of all kernels, `W + scale A B`.

    - `downs`: a tensor A (E, D, r) for each kernel (E, D, H).
    - `ups`: a tensor B (E, r, H) for each.
    - `scale`: a float.
    """

    downs: list
    ups: list
    scale: float


def grouped_feed_forward(
    tokens,
    weights,
    groups,
    activation,
    up_kernels,
    down_kernel,
    biases=(),
    expert_axis=None,
    clip=None,
    up_shift=0.0,
    low_rank=None,
):
    """Each token through the feed-forward networks of its experts, weighted and summed.

    With one up kernel the network is `act(x W + b) V + c`; with two, gate and up, it is
    `(act(x G) * (x U)) V`, Shazeer 2020 (arXiv:2002.05202). Only the pre-activations and the
    outputs of the rows are saved for the backward pass, which gathers rows and computes activations
    again.

    Args:
        tokens: (T, D) float tensor.
        weights: (T, K) float32 combine weights.
        groups: `ops.Groups` or `ops.ChosenGroups`, which rows belong to which expert and token. Or
            `ops.Assignments` or `ops.Choices`, which each device of a mesh sorts for itself.
        activation: function of one tensor.
        up_kernels: one or two tensors (E, D, H). With two, the first is the gate. Kernels and
            biases are converted to the dtype of the tokens one expert at a time; their gradients
            have the dtype they came in.
        down_kernel: (E, H, D').
        biases: one tensor (E, H) for each up kernel and one (E, D'), or none.
        expert_axis: the mesh axis that splits the kernels' first axis, where there is one.
        clip, up_shift: with a gate, `(act(min(x G, clip)) * (clipped(x U) + up_shift)) V`, where
            `clipped` is from `-clip` to `clip`. None and 0 change nothing.
        low_rank: a `LowRank`; the kernels are frozen then. None: there is no correction.

    Returns:
        (T, D') in the dtype of `tokens`. A token with no row is zero.

    Raises:
        ValueError: If shapes do not fit, there are biases, but not one for each kernel, or there
            is a `clip` without a gate.
        TypeError: If something is no tensor, no function, or no groups.
    """
    _check(activation, up_kernels, biases, expert_axis, clip, up_shift, low_rank)
    _check_shapes(tokens, weights, groups, up_kernels, down_kernel, biases)
    tokens, weights, *kernels = map(_as_tensor, (tokens, weights, *up_kernels, down_kernel))
    widths = tuple(kernel.shape[-1] for kernel in kernels)
    step = feed_forward_step(activation, widths, clip, up_shift)
    frozen = [kernel for kernel in kernels if low_rank or isinstance(kernel, QUANTIZED)]
    trained = [] if frozen else kernels
    if low_rank is not None:
        step = low_rank_step(step, len(kernels), low_rank.scale)
        trained = [*low_rank.downs, *low_rank.ups]
    parameters = Parameters(trained, list(map(_as_tensor, biases)), frozen)
    if isinstance(groups, (Assignments, Choices)):
        if any(isinstance(kernel, Packed) for kernel in frozen):
            raise ValueError(
                "Experts in four bits must compute on one device. Received: their kernels under a "
                '`keras.distribution`. Quantize to "int8", or without a distribution.'
            )
        shards = backend.token_shards()
        exchange = Exchange(step, shards, expert_axis, named_platform() or shards.platform)
        return run_sharded(exchange, tokens, weights, parameters, groups)
    return run_grouped(step, tokens, weights, parameters, groups)


def _check(activation, up_kernels, biases, expert_axis, clip, up_shift, low_rank):
    if not callable(activation) or isinstance(activation, keras.Layer):
        raise TypeError(
            "`activation` must be a function of one tensor, without weights. Received: "
            f"activation={shortened(activation)}. Pass, for example, `keras.ops.gelu`."
        )
    if not isinstance(expert_axis, (str, type(None))):
        raise TypeError(
            "`expert_axis` must be the name of a mesh axis. Received: "
            f"expert_axis={shortened(expert_axis)}. Leave it out where no mesh splits the kernels."
        )
    if low_rank is not None and not isinstance(low_rank, LowRank):
        raise TypeError(
            "`low_rank` must be a `LowRank`. Received: an object of type "
            f"{type(low_rank).__name__}. Leave it out for none."
        )
    if not isinstance(up_kernels, (list, tuple)) or len(up_kernels) not in (1, 2):
        raise ValueError(
            "`up_kernels` must be a list of one kernel, or of two: gate and up. Received: "
            f"{_number_of(up_kernels)}. Put the kernels into a list."
        )
    check_not_negative("up_shift", up_shift)
    if clip is not None:
        check_positive_number("clip", clip, example=7.0)
    if len(up_kernels) == 1 and (clip is not None or up_shift):
        raise ValueError(
            "`clip` and `up_shift` must have a gate. Received: "
            f"clip={clip}, up_shift={up_shift} and one up kernel, which has none. Leave them out."
        )
    if not isinstance(biases, (list, tuple)):
        raise TypeError(
            "`biases` must be a list of tensors, which may be empty. Received: an object of type "
            f"{type(biases).__name__}. Put them into a list."
        )
    if biases and len(biases) != len(up_kernels) + 1:
        raise ValueError(
            "There must be a bias for each kernel, or none. Received: "
            f"{len(biases)} biases, {len(up_kernels) + 1} kernels. Pass zeros for those that are "
            "missing."
        )


def _check_shapes(tokens, weights, groups, up_kernels, down_kernel, biases):
    # O are the features of the outputs.
    axes = ["EDH"] * len(up_kernels) + ["EHO"]
    tensors = {"tokens": (tokens, "TD", "float")}
    names = (*("gate", "up")[-len(up_kernels) :], "down")
    for name, kernel, letters in zip(names, (*up_kernels, down_kernel), axes):
        kind = "int" if isinstance(kernel, QUANTIZED) else "float"
        tensors[f"{name} kernel"] = (kernel, letters, kind)
    for name, bias, letters in zip(names, biases, axes):
        tensors[f"{name} bias"] = (bias, letters[::2], "float")
    check_groups(groups, weights, **tensors)
    check_row_numbers(groups)


def _as_tensor(values):
    """What may be a NumPy array, and is a tensor or integers of a quantized kernel otherwise."""
    return ops.convert_to_tensor(values) if isinstance(values, np.ndarray) else values


def _number_of(kernels):
    if isinstance(kernels, (list, tuple)):
        return f"{len(kernels)} of them"
    return f"an object of type {type(kernels).__name__}"
