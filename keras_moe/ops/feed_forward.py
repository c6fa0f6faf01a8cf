"""Feed-forward networks of all experts as one grouped operation.

Axes: T tokens, D features, E experts, K experts per token, H hidden width, R rows (assignments
sorted by expert).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
from keras import ops

from keras_moe._internal.checks import check_number
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend
from keras_moe.ops.assignments import Assignments, Choices
from keras_moe.ops.grouped import run_grouped, step_of
from keras_moe.ops.grouped.records import QUANTIZED, Affine, Network, Packed, Parameters
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.groups import ChosenGroups, Groups, check_groups, combine_rows, dispatch_rows
from keras_moe.ops.plans import GroupedPlan
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
    tokens: Tensor,
    weights: Tensor,
    groups: Groups | ChosenGroups | GroupedPlan,
    activation: str | Callable,
    up_kernels: Sequence[Tensor],
    down_kernel: Tensor,
    biases: Sequence[Tensor] = (),
    expert_axis: str | None = None,
    clip: float | None = None,
    up_shift: float = 0.0,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Each token through the feed-forward networks of its experts, weighted and summed.

    With one up kernel the network is `act(x W + b) V + c`; with two, gate and up, it is
    `(act(x G) * (x U)) V`, Shazeer 2020 (arXiv:2002.05202). Only the pre-activations and the
    outputs of the rows are saved for the backward pass, which gathers rows and computes activations
    again.

    Args:
        tokens: Float tensor (T, D).
        weights: Float tensor (T, K). Combine weights.
        groups: `ops.Groups` or `ops.ChosenGroups`, which rows belong to which expert and token; or
            `ops.Assignments` or `ops.Choices`, which each device of a mesh sorts for itself.
        activation: Function of one tensor, or the name of one in Keras.
        up_kernels: List of one or two float tensors (E, D, H). With two, the first is the gate.
            Kernels and biases are converted to the dtype of the tokens one expert at a time; their
            gradients have the dtype they came in.
        down_kernel: Float tensor (E, H, D').
        biases: List of a float tensor (E, H) for each up kernel and one (E, D'), or empty.
        expert_axis: String or None. Mesh axis that splits the kernels' first axis.
        clip: Float or None. With a gate the network is
            `(act(min(x G, clip)) * (clipped(x U) + up_shift)) V`, where `clipped` is from `-clip`
            to `clip`.
        up_shift: Float. See `clip`.
        low_rank: `LowRank` or None. Corrections of the kernels, which are frozen then.

    Returns:
        Tensor (T, D') in the dtype of `tokens`. A token with no row is zero.

    Raises:
        ValueError: If shapes do not fit, there are biases, but not one for each kernel, or there
            is a `clip` without a gate.
    """
    kernels = [*up_kernels, down_kernel]
    if len(kernels) not in (2, 3):
        raise ValueError(
            "`up_kernels` must be a list of one kernel, or of two: gate and up. "
            f"Received: {len(up_kernels)} of them"
        )
    if len(biases) not in (0, len(kernels)):
        raise ValueError(
            "There must be a bias for each kernel, or none. "
            f"Received: {len(biases)} biases, {len(kernels)} kernels"
        )
    if low_rank and not len(low_rank.downs) == len(low_rank.ups) == len(kernels):
        raise ValueError(
            "`low_rank` must have factors for each kernel. Received: "
            f"{len(low_rank.downs)} downs, {len(low_rank.ups)} ups, {len(kernels)} kernels"
        )
    if len(kernels) == 2 and (clip is not None or up_shift):
        raise ValueError(
            "`clip` and `up_shift` need a gate. "
            f"Received: clip={clip}, up_shift={up_shift}, and one up kernel"
        )
    clip = None if clip is None else check_number("clip", clip, above=0)
    tokens, weights, *biases = map(ops.convert_to_tensor, (tokens, weights, *biases))
    axes = ["EDH"] * (len(kernels) - 1) + ["EHO"]
    tensors = {"tokens": (tokens, "TD", "float")}
    for number, bias in enumerate(biases):
        tensors[f"biases[{number}]"] = (bias, axes[number][::2], "float")
    for number, kernel in enumerate(kernels):
        is_float = not isinstance(kernel, QUANTIZED)
        kernels[number] = ops.convert_to_tensor(kernel) if is_float else kernel
        kind = "float" if is_float else "int"
        tensors[f"kernels[{number}]"] = (kernels[number], axes[number], kind)
    check_groups(groups, weights, **tensors)
    biases = biases or [None] * len(kernels)
    factors: list = [None] * len(kernels)
    if low_rank:
        factors = [tuple(map(ops.convert_to_tensor, each)) for each in zip(*low_rank[:2])]
    projections = [Affine(*parts) for parts in zip(kernels, biases, factors)]
    scale = low_rank.scale if low_rank else None
    network = Network(keras.activations.get(activation), clip, up_shift, scale)
    plan = GroupedPlan(groups, weights)
    return _grouped_feed_forward(tokens, plan, network, projections, expert_axis)


def _grouped_feed_forward(tokens, plan, network, projections, expert_axis=None, processes=None):
    """Each token through the networks of its experts, weighted and summed, (T, D').

    Args:
        tokens: (T, D).
        plan: a `GroupedPlan`.
        network: a `Network`.
        projections: list of `Affine`, in the order of a forward pass.
        expert_axis: the mesh axis that splits the experts, where there is one.
        processes: a `backend.expert_processes()`, where each has some of the experts.
    """
    if processes is not None:
        return _serve_in_processes(tokens, plan, network, projections, processes)
    groups, weights = plan
    step = step_of(network, tuple(kernel.shape[-1] for kernel, _, _ in projections))
    parameters = Parameters.of(projections)
    if not isinstance(groups, (Assignments, Choices)):
        return run_grouped(step, tokens, weights, parameters, groups)
    if any(isinstance(kernel, Packed) for kernel, _, _ in projections):
        raise ValueError(
            "Experts in four bits must compute on one device. Received: their kernels under a "
            '`keras.distribution`. Quantize to "int8", or without a distribution.'
        )
    shards = backend.token_shards()
    exchange = Exchange(step, shards, expert_axis, named_platform() or shards.platform)
    return run_sharded(exchange, tokens, weights, parameters, groups)


def _all_experts(tokens, network, projections):
    """The outputs (T, E, D') of all experts for each token (T, D): products of whole stacks."""
    step = step_of(network, tuple(kernel.shape[-1] for kernel, _, _ in projections))
    stacks = Parameters.of(projections).take(lambda stack: stack, tokens.dtype)

    def project(rows, number):
        kernel, bias, _ = stacks[number]
        products = ops.matmul(rows, kernel)
        return products if bias is None else products + ops.expand_dims(bias, 1)

    rows = ops.expand_dims(tokens, 0)
    outputs, _ = step.forward(rows, products_of(project, pull=None), keep=False)
    return ops.transpose(outputs, (1, 0, 2))


def _serve_in_processes(tokens, plan, network, projections, processes):
    """Tokens go to the processes that hold their experts, and outputs come back."""

    def serve(rows, experts):
        # Sorted by the process they came from, and only then by expert.
        order = ops.argsort(experts)
        groups = Groups(
            sizes=ops.segment_sum(ops.ones_like(experts), experts, num_own),
            assignment_of_row=ops.cast(order, "int32"),
            rows_of_token=ops.expand_dims(ops.cast(ops.argsort(order), "int32"), 1),
        )
        own_plan = GroupedPlan(groups, ops.ones((ops.shape(rows)[0], 1), "float32"))
        return _grouped_feed_forward(rows, own_plan, network, projections)

    groups, weights = plan
    num_own = groups.sizes.shape[0] // processes.num_processes
    rows = dispatch_rows(tokens, groups)
    num_served = int(ops.sum(groups.sizes))
    outputs = processes.serve(rows[:num_served], groups.sizes, serve)
    # Rows past the last group are padding.
    padding = ((0, ops.shape(rows)[0] - num_served), (0, 0))
    return combine_rows(ops.pad(outputs, padding), weights, groups)
