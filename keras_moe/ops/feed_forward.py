"""The feed-forward network of one expert, plain or gated, as a grouped operation."""

from keras_moe import backend
from keras_moe.ops.assignments import Assignments, Choices
from keras_moe.ops.grouped import feed_forward_step, run_grouped
from keras_moe.ops.platforms import named_platform
from keras_moe.ops.sharded import Exchange, run_sharded


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
):
    """Each token through the feed-forward networks of its experts, weighted and summed.

    With one up kernel the network is `act(x W + b) V + c`; with two, gate and up, it is
    `(act(x G) * (x U)) V`, Shazeer 2020 (arXiv:2002.05202). Only the pre-activations and the
    outputs of the rows are kept for the gradient; rows are gathered again, activations computed
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

    Returns:
        (T, D') in the dtype of `tokens`. A token with no row is zero.

    Raises:
        ValueError: If there are biases, but not one for each kernel.
    """
    kernels = [*up_kernels, down_kernel]
    if biases and len(biases) != len(kernels):
        raise ValueError(
            "There must be a bias for each kernel, or none. Received: "
            f"{len(biases)} biases, {len(kernels)} kernels. Pass zeros for those that are missing."
        )
    widths = tuple(kernel.shape[-1] for kernel in kernels)
    step = feed_forward_step(activation, widths, clip, up_shift)
    if isinstance(groups, (Assignments, Choices)):
        shards = backend.token_shards()
        exchange = Exchange(step, shards, expert_axis, named_platform() or shards.platform)
        return run_sharded(exchange, tokens, weights, kernels, list(biases), groups)
    return run_grouped(step, tokens, weights, kernels, biases, groups)
