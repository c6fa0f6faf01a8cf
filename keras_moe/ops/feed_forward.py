"""The feed-forward network of one expert, plain or gated, as a grouped operation."""

from keras_moe.ops.grouped import feed_forward_step, run_grouped


def grouped_feed_forward(tokens, weights, groups, activation, up_kernels, down_kernel, biases=()):
    """Each token through the feed-forward networks of its experts, weighted and summed.

    With one up kernel the network is `act(x W + b) V + c`; with two, gate and up, it is
    `(act(x G) * (x U)) V`, Shazeer 2020 (arXiv:2002.05202). Only the pre-activations and the
    outputs of the rows are kept for the gradient; rows are gathered again, activations computed
    again.

    Args:
        tokens: (T, D) float tensor.
        weights: (T, K) float32 combine weights.
        groups: `ops.Groups` or `ops.ChosenGroups`, which rows belong to which expert and token.
        activation: function of one tensor.
        up_kernels: one or two tensors (E, D, H). With two, the first is the gate. Kernels and
            biases are converted to the dtype of the tokens one expert at a time; their gradients
            have the dtype they came in.
        down_kernel: (E, H, D').
        biases: one tensor (E, H) for each up kernel and one (E, D'), or none.

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
    step = feed_forward_step(activation, tuple(kernel.shape[-1] for kernel in kernels))
    return run_grouped(step, tokens, weights, kernels, biases, groups)
