"""PyTorch primitives."""

import contextlib

import keras
import torch
from keras import ops

from keras_moe.backend import torch_experts, torch_integers
from keras_moe.backend.base import Backend


class TorchBackend(Backend):
    def compiles_static_shapes(self):
        # PyTorch runs eagerly here, or records slices as they are.
        return False

    def knows_shapes(self):
        return self.knows_sizes()

    def knows_sizes(self):
        return not _is_traced()

    def is_exporting(self):
        return torch.jit.is_tracing() or torch.compiler.is_exporting()

    def may_recompute(self):
        return torch.is_grad_enabled() and not _is_traced()

    def is_recomputing(self):
        # As `torch.utils.checkpoint` finds out itself; there is no public way.
        return torch._C._current_graph_task_id() != -1

    def current_platform(self):
        return _platform_of(ops.convert_to_tensor(0).device)

    def on_its_platform(self, function, *operands):
        return function(_platform_of(operands[0].device), *operands)

    def without_autocast(self, tensor):
        kind = tensor.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return contextlib.nullcontext()
        return torch.autocast(kind, enabled=False)

    def differentiable(self, forward, backward, inputs, context, plain=None):
        plain = plain or (lambda inputs, context: forward(inputs, context, keep=False)[0])
        if _is_transformed():
            return plain(inputs, context)
        tensors = keras.tree.flatten(inputs)
        # In the function gradients are always off, and `needs_input_grad` does not ask whether.
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if self.is_exporting() or not keep:
            return forward(inputs, context, keep=False)[0]
        return _Differentiable.apply(forward, backward, plain, inputs, context, *tensors)

    def vjp(self, function, inputs):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            output = function(*inputs)
        return output.detach(), lambda cotangent: torch.autograd.grad(output, inputs, cotangent)

    def gather_rows(self, tensor, indices):
        if indices.ndim == 1:
            return torch.index_select(tensor, 0, indices)
        rows = torch.index_select(tensor, 0, indices.reshape(-1))
        return rows.reshape(*indices.shape, *tensor.shape[1:])

    def argmax(self, scores):
        return torch.argmax(scores, -1).to(torch.int32)

    def take_columns(self, matrix, columns):
        exists = _are_below(matrix.shape[1], columns)
        taken = torch.gather(matrix, 1, torch.where(exists, columns, 0).to(torch.int64))
        return torch.where(exists, taken, 0)

    def count_integers(self, integers, number):
        places = torch.where(_are_below(number, integers), integers, number).to(torch.int64)
        counts = torch.zeros(number + 1, dtype=torch.int32, device=integers.device)
        return counts.scatter_add(0, places, torch.ones_like(places, dtype=torch.int32))[:number]

    def sort(self, integers):
        return torch.sort(integers).values

    def lacks_stable_sort(self):
        return torch.jit.is_tracing()  # for ONNX

    def larger_size(self, least, size):
        # An export takes one of its own sizes for a constant where it becomes a tensor.
        symbolic = isinstance(size, torch.SymInt)
        return torch.sym_max(least, size) if symbolic else ops.maximum(least, size)

    def has_grouped_products(self, platform, dtype, widths):
        # Where `grouped_mm` is one fast kernel, which needs no sizes on the host; elsewhere it is a
        # loop over the groups. Rows must begin at multiples of 16 bytes.
        return (
            platform == "gpu"
            and dtype == "bfloat16"
            and all(width % 8 == 0 for width in widths)
            and hasattr(torch.nn.functional, "grouped_mm")
            and torch.cuda.is_available()
            and torch.cuda.get_device_capability() >= (9, 0)
        )

    def grouped_products(
        self, platform, rows, kernels, biases, sizes, then, extras=(), transposed=False
    ):
        ends = torch.cumsum(sizes, 0, dtype=torch.int32)
        products = []
        for kernel in kernels:
            kernel = kernel.to(rows.dtype)
            kernel = kernel.mT if transposed else kernel
            products.append(torch.nn.functional.grouped_mm(rows, kernel, offs=ends))
        if biases:
            expert = _expert_of_row(rows, ends, last=ends.shape[0] - 1)
            biases = [bias.to(rows.dtype)[expert] for bias in biases]
            products = [product + bias for product, bias in zip(products, biases)]
        return then(*products, *extras)

    def grouped_kernel_gradients(self, platform, lefts, right, sizes, kernel, bias, remake=None):
        (left,) = lefts
        ends = torch.cumsum(sizes, 0, dtype=torch.int32)
        of_kernel = torch.nn.functional.grouped_mm(left.T, right, offs=ends).to(kernel.dtype)
        if bias is None:
            return of_kernel, None
        num_experts = sizes.shape[0]
        # Rows after the last group are summed into a spare expert.
        totals = torch.zeros((num_experts + 1, right.shape[1]), device=right.device)
        totals.index_add_(0, _expert_of_row(right, ends, last=num_experts), right.float())
        return of_kernel, totals[:num_experts].to(bias.dtype)

    def unstack_sizes(self, sizes, num_rows):
        if not self.knows_sizes():  # one vector: a program would add sizes of its own one by one
            sizes = torch.cat([sizes, (num_rows - sizes.sum()).reshape(1).to(sizes.dtype)])
        if torch.jit.is_tracing():  # it would take numbers for constants
            return sizes.to(torch.int64).unbind()
        numbers = sizes.tolist()
        if torch.compiler.is_compiling():
            for number in numbers:
                torch._check(number >= 0)
            return numbers
        return [*numbers, num_rows - sum(numbers)]

    def split_rows(self, rows, sizes):
        return super().split_rows(rows, sizes) if torch.jit.is_tracing() else rows.split(sizes)

    def join_rows(self, parts):
        return torch.cat(parts)  # Keras would convert each part, an operation of a program

    def multiply_groups(self, rows, sizes, experts, kernels, bias=None, transposed=False):
        scale = kernels.scale
        if bias is not None and bias.dtype != rows.dtype:  # an operation, even if equal
            bias = bias.to(rows.dtype)

        def multiply(part, expert, output=None, digits=None):
            if kernels.is_packed and not transposed:
                product = kernels.multiply(part, expert)
                product = product if bias is None else product + bias[expert]
                return product if output is None else output.copy_(product)
            kernel = kernels.of(expert)
            if scale is None:
                if kernel.dtype != rows.dtype:
                    kernel = kernel.to(rows.dtype)
                if transposed:
                    return torch.mm(part, kernel.mT, out=output)
                if bias is None:
                    return torch.mm(part, kernel, out=output)
                return torch.addmm(bias[expert], part, kernel, out=output)
            of_columns = scale[expert].to(rows.dtype)
            if transposed:
                return torch_integers.multiply(part * of_columns, kernel, transposed, output)
            if digits is None:
                product = torch_integers.multiply(part, kernel, transposed, output)
            else:
                product = digits.multiply(kernel)
            if bias is None:
                return torch.mul(product, of_columns, out=output)
            return torch.addcmul(bias[expert], product, of_columns, out=output)

        if not self.knows_sizes():
            (expert,) = experts
            return multiply(rows, expert)
        outputs = rows.new_empty((rows.shape[0], kernels.shape[1 if transposed else 2]))
        digits = [None] * len(sizes)
        if scale is not None and not transposed:
            digits = torch_integers.digits_of_groups(rows, sizes)
        for each in zip(rows.split(sizes), experts, outputs.split(sizes), digits):
            multiply(*each)
        return outputs

    def stacked_gradients(self, trained):
        return _StackedGradients(trained)

    def num_replicas(self):
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_world_size() if is_distributed else 1

    def sum_over_replicas(self, values):
        if self.num_replicas() > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def gather_over_replicas(self, values):
        if self.num_replicas() == 1:
            return values
        sizes = values.new_zeros(self.num_replicas(), dtype=torch.int64)
        sizes[torch.distributed.get_rank()] = len(values)
        sizes = self.sum_over_replicas(sizes).tolist()
        # Collective operations want equal sizes.
        padded = values.new_zeros((max(sizes), *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def sum_of_counts(self, values):
        # In one operation.
        flat = self.sum_over_replicas(torch.cat([value.detach().reshape(-1) for value in values]))
        parts = flat.split([value.numel() for value in values])
        return [part.reshape(value.shape) for part, value in zip(parts, values)]

    expert_processes = staticmethod(torch_experts.expert_processes)
    split_experts = staticmethod(torch_experts.split_experts)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, plain, inputs, context, *tensors):
        ctx.structure = keras.tree.map_structure(lambda _: 0, inputs)
        inputs = keras.tree.pack_sequence_as(ctx.structure, tensors)
        output, saved = forward(inputs, context, keep=True)
        ctx.run_backward, ctx.plain = backward, plain
        ctx.context = context
        # All tensors in the list that PyTorch frees, and may offload or compute again.
        ctx.structure_of_saved = keras.tree.map_structure(lambda _: 0, saved)
        ctx.save_for_backward(*tensors, *keras.tree.flatten(saved))
        return output

    @staticmethod
    def backward(ctx, upstream):
        tensors = ctx.saved_tensors  # once: each access unpacks, and may compute again
        num_inputs = len(keras.tree.flatten(ctx.structure))
        tensors, saved = tensors[:num_inputs], tensors[num_inputs:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # `create_graph`
            # Views: an input may depend on another, which autograd would follow.
            tensors = [
                each.view_as(each) if each.requires_grad else each.detach().requires_grad_()
                for each in tensors
            ]
            output = ctx.plain(keras.tree.pack_sequence_as(ctx.structure, tensors), ctx.context)
            gradients = torch.autograd.grad(
                output, tensors, upstream, create_graph=True, allow_unused=True
            )
        else:
            inputs = keras.tree.pack_sequence_as(ctx.structure, tensors)
            saved = keras.tree.pack_sequence_as(ctx.structure_of_saved, saved)
            gradients = keras.tree.flatten(ctx.run_backward(inputs, ctx.context, saved, upstream))
        return None, None, None, None, None, *gradients


class _StackedGradients:
    """Gradients in place, those of experts without rows zero; see `stacked_gradients`."""

    def __init__(self, trained):
        self._gradients = [
            {name: torch.empty_like(x) if x.requires_grad else None for name, x in of.items()}
            for of in trained
        ]
        self._busy = set()

    def add(self, sizes, experts, factors):
        self._busy.update(experts)
        for (rows, gradient), of in zip(factors, self._gradients):
            kernel, bias = of.get("kernel"), of.get("bias")
            if kernel is not None:
                for expert, left, right in zip(experts, rows.split(sizes), gradient.split(sizes)):
                    if kernel.dtype == rows.dtype:
                        torch.mm(left.T, right, out=kernel[expert])
                    else:  # `out` must have the dtype of the factors.
                        kernel[expert] = torch.mm(left.T, right)
            if bias is not None:
                for expert, part in zip(experts, gradient.split(sizes)):
                    torch.sum(part, 0, dtype=bias.dtype, out=bias[expert])

    def result(self):
        for of in self._gradients:
            for gradient in of.values():
                if gradient is not None:
                    for expert in set(range(len(gradient))) - self._busy:
                        gradient[expert] = 0
        return self._gradients


def _is_traced():
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _is_transformed():
    """Whether `torch.func` or forward-mode derivatives are in force; no public function tells."""
    return not _is_traced() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def _platform_of(device):
    return "cpu" if device.type in ("cpu", "meta") else "gpu"


def _are_below(number, integers):
    return (integers >= 0) & (integers < number)


def _expert_of_row(rows, ends, last):
    """The expert of each row, (R,); `last` after the last group."""
    numbers = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    return torch.searchsorted(ends, numbers, right=True).clamp_(max=last)
