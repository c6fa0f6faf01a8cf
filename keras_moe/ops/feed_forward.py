"""The feed-forward network of one expert, plain or gated, as a grouped operation."""

from keras_moe import backend
from keras_moe.ops.grouped import Step, run_grouped


def grouped_feed_forward(tokens, weights, groups, activation, up_kernels, down_kernel, biases=()):
    """Each token through the feed-forward networks of its experts, weighted and summed.

    With one up kernel the network is `act(x W + b) V + c`; with two, gate and up, it is
    `(act(x G) * (x U)) V`, Shazeer 2020 (arXiv:2002.05202). Only the pre-activations and the
    outputs of the rows are kept for the gradient; rows are gathered again, activations computed
    again.

    Args:
        tokens: (T, D) float tensor.
        weights: (T, K) float32 combine weights.
        groups: `ops.Groups`, which rows belong to which expert and token.
        activation: function of one tensor.
        up_kernels: one or two tensors (E, D, H). With two, the first is the gate.
        down_kernel: (E, H, D').
        biases: one tensor (E, H) for each up kernel and one (E, D'), or none.

    Returns:
        (T, D') in the dtype of `tokens`. A token with no row is zero.
    """

    def hidden_of(*pre_activations):
        if len(up_kernels) == 1:
            return activation(pre_activations[0])
        gate, up = pre_activations
        return activation(gate) * up

    def forward(rows, projections):
        *ups, down = projections
        pre_activations = [up(rows) for up in ups]
        return down(hidden_of(*pre_activations)), pre_activations

    def backward(rows, projections, pre_activations, gradient):
        *ups, down = projections
        hidden, pullback = backend.vjp(hidden_of, pre_activations)
        pre_gradients = pullback(down.pull(gradient))
        row_gradient = sum(up.pull(pre) for up, pre in zip(ups, pre_gradients))
        return row_gradient, [*((rows, pre) for pre in pre_gradients), (hidden, gradient)]

    step = Step(
        forward,
        backward,
        saved_widths=tuple(kernel.shape[-1] for kernel in up_kernels),
        output_width=down_kernel.shape[-1],
    )
    kernels = [*up_kernels, down_kernel]
    return run_grouped(step, tokens, weights, kernels, biases, groups)
