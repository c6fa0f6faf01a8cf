"""PyTorch primitives."""

import torch


def compiles_static_shapes():
    """PyTorch runs eagerly here: shapes may depend on data."""
    return False


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, context, *inputs):
        output, ctx.saved = forward(inputs, context)
        ctx.run_backward = backward
        ctx.integers = context
        ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gradients = ctx.run_backward(ctx.saved_tensors, ctx.integers, ctx.saved, upstream)
        return None, None, None, *gradients


def differentiable(forward, backward, inputs, context):
    """`forward(inputs, context)[0]`, whose gradient for `inputs` is computed by `backward`.

    `forward` returns `(output, saved)`; `backward(inputs, context, saved, gradient)` returns one
    gradient for each input. `context` holds integer tensors, which have no gradient.
    """
    return _Differentiable.apply(forward, backward, context, *inputs)


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


def stack_entries(entries, like):
    """Tensors of the shapes and dtypes of `like`, (E, ...), from their entries.

    Args:
        entries: iterable of pairs: a number below E, and one entry (...) for each of the tensors.
            What no entry is given for is zero.
        like: list of tensors.
    """
    stacked = [
        torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in like
    ]
    for number, parts in entries:
        for whole, part in zip(stacked, parts):
            whole[number] = part
    return stacked


def sum_over_replicas(values):
    """The sum of `values` over the processes of `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values
