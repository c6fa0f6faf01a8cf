"""The feed-forward network of one expert, plain or gated, as a grouped operation."""

from keras import ops

from keras_moe import backend
from keras_moe.ops.grouped import Step, run_grouped


def grouped_feed_forward(
    tokens, weights, groups, activation, up_kernels, down_kernel, up_biases=(), down_bias=None
):
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
        up_biases: as many tensors (E, H) as there are up kernels, or none.
        down_bias: (E, D') or None.

    Returns:
        (T, D') in the dtype of `tokens`. A token with no row is zero.
    """
    num_ups = len(up_kernels)
    kernels = [*up_kernels, down_kernel, *up_biases]
    if down_bias is not None:
        kernels.append(down_bias)

    def unpack(kernels):
        ups, down, biases = kernels[:num_ups], kernels[num_ups], kernels[num_ups + 1 :]
        return ups, down, biases[: len(up_biases)], biases[len(up_biases) :]

    def hidden_of(*pre_activations):
        if num_ups == 1:
            return activation(pre_activations[0])
        gate, up = pre_activations
        return activation(gate) * up

    def forward(rows, kernels):
        ups, down, up_biases, down_biases = unpack(kernels)
        pre_activations = [ops.matmul(rows, up) for up in ups]
        if up_biases:
            pre_activations = [pre + bias for pre, bias in zip(pre_activations, up_biases)]
        output = ops.matmul(hidden_of(*pre_activations), down)
        return sum(down_biases, output), pre_activations

    def backward(rows, kernels, pre_activations, gradient):
        ups, down, up_biases, down_biases = unpack(kernels)
        hidden, pullback = backend.vjp(hidden_of, pre_activations)
        pre_gradients = pullback(ops.matmul(gradient, ops.transpose(down)))
        factors = [*((rows, pre) for pre in pre_gradients), (hidden, gradient)]
        bias_gradients = [_column_sums(pre) for pre in pre_gradients] if up_biases else []
        if down_biases:
            bias_gradients.append(_column_sums(gradient))
        row_gradient = sum(
            ops.matmul(pre, ops.transpose(up)) for pre, up in zip(pre_gradients, ups)
        )
        return row_gradient, factors, bias_gradients

    step = Step(
        forward,
        backward,
        saved_widths=tuple(kernel.shape[-1] for kernel in up_kernels),
        output_width=down_kernel.shape[-1],
    )
    return run_grouped(step, tokens, weights, kernels, groups)


def _column_sums(values):
    return ops.sum(ops.cast(values, "float32"), axis=0)
