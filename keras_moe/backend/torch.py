"""PyTorch primitives."""

import keras
import torch


def compiles_static_shapes():
    """PyTorch runs eagerly here: shapes may depend on data."""
    return False


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep, forward, backward, context, *inputs):
        output, saved = forward(inputs, context, keep)
        ctx.run_backward = backward
        ctx.integers = context
        # All tensors in the list that PyTorch frees, and may offload or compute again.
        ctx.structure = keras.tree.map_structure(lambda _: 0, saved)
        ctx.save_for_backward(*inputs, *keras.tree.flatten(saved))
        ctx.num_inputs = len(inputs)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        inputs = ctx.saved_tensors[: ctx.num_inputs]
        saved = keras.tree.pack_sequence_as(ctx.structure, ctx.saved_tensors[ctx.num_inputs :])
        gradients = ctx.run_backward(inputs, ctx.integers, saved, upstream)
        return None, None, None, None, *gradients


def differentiable(forward, backward, inputs, context):
    """The output of `forward`, whose gradient for `inputs` is computed by `backward`.

    `forward(inputs, context, keep)` returns `(output, saved)`; where `keep` is False, nobody needs
    what is saved. `backward(inputs, context, saved, gradient)` returns one gradient for each input.
    `context` holds integer tensors, which have no gradient.
    """
    # Inside the function gradients are always off, and `needs_input_grad` does not ask whether.
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _Differentiable.apply(keep, forward, backward, context, *inputs)


def compile_once(function):
    """The function itself: PyTorch runs it eagerly."""
    return function


def vjp(function, inputs):
    """`function(*inputs)` and its pullback, for functions of tensors only."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        output = function(*inputs)

    def pullback(cotangent):
        return torch.autograd.grad(output, inputs, cotangent)

    return output.detach(), pullback


def gather_rows(tensor, indices):
    """Rows of `tensor` (R, ...) at integer `indices` of any shape."""
    rows = torch.index_select(tensor, 0, indices.reshape(-1))
    return rows.reshape(*indices.shape, *tensor.shape[1:])


def unstack_sizes(sizes):
    """The entries of `sizes` (E,) one by one, usable as bounds of a slice."""
    return sizes.tolist()


def multiply_groups(rows, sizes, experts, kernel, bias=None, transposed=False):
    """Groups of rows that stand one behind another, each through the affine map of its expert.

    Args:
        rows: (R, D), or (R, H) if `transposed`.
        sizes: list of the sizes of the groups.
        experts: list of the expert of each group.
        kernel: (E, D, H), of any float dtype.
        bias: (E, H) or None.
        transposed: whether to multiply by the transposed kernel.

    Returns:
        (R, H), or (R, D), in the dtype of the rows.
    """
    kernel = kernel.mT if transposed else kernel
    outputs = rows.new_empty((rows.shape[0], kernel.shape[2]))
    for expert, part, output in zip(experts, rows.split(sizes), outputs.split(sizes)):
        factor = kernel[expert].to(rows.dtype)
        if bias is None:
            torch.mm(part, factor, out=output)
        else:
            torch.addmm(bias[expert].to(rows.dtype), part, factor, out=output)
    return outputs


def stack_gradients(runs, kernels, biases):
    """The gradients of kernels and biases; those of experts without rows are zero.

    Args:
        runs: iterable of the sizes and experts of some groups, and for each of the kernels the rows
            that its map took in and the gradients of those that it gave out. No expert comes twice.
        kernels: list of tensors (E, D, H).
        biases: as many tensors (E, H), or none.

    Returns:
        List of tensors like the kernels, then like the biases; of `None` if all are frozen.
    """
    if not any(parameter.requires_grad for parameter in (*kernels, *biases)):
        for _ in runs:
            pass
        return [None] * (len(kernels) + len(biases))
    kernel_gradients = [torch.empty_like(kernel) for kernel in kernels]
    bias_gradients = [torch.empty_like(bias) for bias in biases]
    idle = set(range(kernels[0].shape[0]))
    for sizes, experts, factors in runs:
        idle.difference_update(experts)
        for (rows, gradient), of_kernel in zip(factors, kernel_gradients):
            for expert, left, right in zip(experts, rows.split(sizes), gradient.split(sizes)):
                if of_kernel.dtype == rows.dtype:
                    torch.mm(left.T, right, out=of_kernel[expert])
                else:  # `out` must have the dtype of the factors.
                    of_kernel[expert] = torch.mm(left.T, right)
        for (_, gradient), of_bias in zip(factors, bias_gradients):
            for expert, part in zip(experts, gradient.split(sizes)):
                torch.sum(part, 0, dtype=of_bias.dtype, out=of_bias[expert])
    gradients = [*kernel_gradients, *bias_gradients]
    for whole in gradients:
        for expert in idle:
            whole[expert] = 0
    return gradients


def num_replicas():
    """How many processes of `torch.distributed` share a step, an integer."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def sum_over_replicas(values):
    """The sum of `values` over the processes of `torch.distributed`."""
    if num_replicas() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def gather_over_replicas(values):
    """The rows of `values` (R, ...) of all processes, one behind the other."""
    if num_replicas() == 1:
        return values
    sizes = sum_over_replicas(_at_own_rank(values.new_tensor(len(values), dtype=torch.int64)))
    # Collective operations want equal sizes.
    padded = values.new_zeros((int(sizes.max()), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist())])


def _at_own_rank(value):
    """A vector of zeros, one for each process, with `value` at this one."""
    values = value.new_zeros(num_replicas())
    values[torch.distributed.get_rank()] = value
    return values


def sum_of_counts(values):
    """A list of float tensors, each summed over the processes, in one operation."""
    flat = sum_over_replicas(torch.cat([value.detach().reshape(-1) for value in values]))
    parts = flat.split([value.numel() for value in values])
    return [part.reshape(value.shape) for part, value in zip(parts, values)]
