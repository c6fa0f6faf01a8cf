"""Functions of PyTorch's autograd."""

import contextlib
import functools

import optree
import torch

from keras_moe.backend.base import refuse_second_derivative


def without_autocast(tensor):
    """A context of `torch.autocast` in which operations compute in the dtype of their tensors."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


# On PyTorch `keras.tree` takes several times as long. A gradient may be None.
flatten = functools.partial(optree.tree_flatten, none_is_leaf=True)


class Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, structure, context, *tensors):
        output, saved = forward(structure.unflatten(tensors), context, save=True)
        ctx.run_backward, ctx.structure, ctx.context = backward, structure, context
        # All tensors in the list that PyTorch frees, and may offload or compute again.
        saved, ctx.structure_of_saved = flatten(saved)
        ctx.save_for_backward(*tensors, *saved)
        return output

    @staticmethod
    @torch.compiler.disable
    def backward(ctx, upstream):
        tensors = ctx.saved_tensors  # once: each access unpacks, and may compute again
        num_inputs = ctx.structure.num_leaves
        tensors, saved = tensors[:num_inputs], tensors[num_inputs:]
        with torch.no_grad(), without_autocast(upstream):
            inputs = ctx.structure.unflatten(tensors)
            saved = ctx.structure_of_saved.unflatten(saved)
            gradients, _ = flatten(ctx.run_backward(inputs, ctx.context, saved, upstream))
        return None, None, None, None, *_once(gradients, upstream, *tensors)


class Product(torch.autograd.Function):
    """The product of the rows of a chunk."""

    @staticmethod
    def forward(ctx, chunk, kernels, rows, values, bias):
        ctx.chunk, ctx.kernels = chunk, kernels._replace(values=None)
        ctx.save_for_backward(rows, values, bias)
        return chunk.product(rows, kernels, bias)

    @staticmethod
    def backward(ctx, upstream):
        rows, values, bias = ctx.saved_tensors
        _, _, needs_rows, needs_values, needs_bias = ctx.needs_input_grad
        with torch.no_grad(), without_autocast(upstream):
            d_rows = d_values = d_bias = None
            if needs_rows:
                kernels = ctx.kernels._replace(values=values)
                d_rows = ctx.chunk.product(upstream, kernels, transposed=True)
            if needs_values:
                total = torch.empty_like(values)
                d_values = ctx.chunk.gradient("kernel", rows, upstream, total)
            if needs_bias:
                d_bias = ctx.chunk.gradient("bias", rows, upstream, torch.empty_like(bias))
        return None, None, *_once((d_rows, d_values, d_bias), upstream, rows, values)


def _once(gradients, *sources):
    """Return gradients whose derivative, where a second one may follow, is an error."""
    return _Once.apply(gradients, *sources) if torch.is_grad_enabled() else gradients


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients, *sources):
        return tuple(gradients)

    backward = staticmethod(refuse_second_derivative)


class Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transpose, value, inputs):
        ctx.transpose = transpose
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient, ctx.transpose(gradient)
