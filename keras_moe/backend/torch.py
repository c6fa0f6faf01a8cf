"""PyTorch primitives."""

import itertools

import keras
import torch
from keras import ops

from keras_moe.backend import torch_integers


def compiles_static_shapes():
    """PyTorch runs eagerly here, or records slices as they are: shapes may depend on data."""
    return False


def current_platform():
    """The platform of the device that Keras uses."""
    return _platform_of(keras.ops.convert_to_tensor(0).device)


def on_its_platform(function, *operands):
    """`function(platform, *operands)` for the platform of the first operand, a tensor."""
    return function(_platform_of(operands[0].device), *operands)


def _platform_of(device):
    return "cpu" if device.type in ("cpu", "meta") else "gpu"


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, inputs, context, *tensors):
        ctx.structure = keras.tree.map_structure(lambda _: 0, inputs)
        inputs = keras.tree.pack_sequence_as(ctx.structure, tensors)
        output, saved = forward(inputs, context, keep=True)
        ctx.run_backward = backward
        ctx.context = context
        # All tensors in the list that PyTorch frees, and may offload or compute again.
        ctx.structure_of_saved = keras.tree.map_structure(lambda _: 0, saved)
        ctx.save_for_backward(*tensors, *keras.tree.flatten(saved))
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        tensors = ctx.saved_tensors  # once: each access unpacks, and may compute again
        num_inputs = len(keras.tree.flatten(ctx.structure))
        inputs = keras.tree.pack_sequence_as(ctx.structure, tensors[:num_inputs])
        saved = keras.tree.pack_sequence_as(ctx.structure_of_saved, tensors[num_inputs:])
        gradients = ctx.run_backward(inputs, ctx.context, saved, upstream)
        return None, None, None, None, *keras.tree.flatten(gradients)


def differentiable(forward, backward, inputs, context):
    """The output of `forward`, whose gradient for `inputs` is computed by `backward`.

    `forward(inputs, context, keep)` returns `(output, saved)`; where `keep` is False, there is no
    backward pass, and nothing need be saved. `backward(inputs, context, saved, gradient)` returns
    gradients in the structure of `inputs`. `inputs` and `context` are structures of tensors; those
    of `context` have no gradient.
    """
    tensors = keras.tree.flatten(inputs)
    # Inside the function gradients are always off, and `needs_input_grad` does not ask whether.
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if is_exporting() or not keep:
        return forward(inputs, context, keep=False)[0]
    return _Differentiable.apply(forward, backward, inputs, context, *tensors)


def is_exporting():
    """Whether the code is traced into a program that has no gradients and changes no state."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def may_recompute():
    """Whether what is computed now may be computed again in the backward pass, unannounced."""
    return torch.is_grad_enabled() and not _is_traced()


def is_recomputing():
    """Whether the code runs inside of a backward pass, as `torch.utils.checkpoint` makes it."""
    # The way in which that module finds out itself; there is no public one.
    return torch._C._current_graph_task_id() != -1


def larger_size(least, size):
    """An export takes one of its own sizes for a constant where it becomes a tensor."""
    symbolic = isinstance(size, torch.SymInt)
    return torch.sym_max(least, size) if symbolic else ops.maximum(least, size)


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
    if indices.ndim == 1:
        return torch.index_select(tensor, 0, indices)
    rows = torch.index_select(tensor, 0, indices.reshape(-1))
    return rows.reshape(*indices.shape, *tensor.shape[1:])


def lacks_stable_sort():
    """Whether the code is traced for ONNX, which sorts equals in any order."""
    return torch.jit.is_tracing()


def sort(integers):
    """A vector of integers in ascending order."""
    return torch.sort(integers).values


def unstack_sizes(sizes, num_rows):
    """The entries of `sizes` (E,) one by one, then how many of the rows are behind the last group.

    They are sizes for `split_rows`, and bounds of slices.
    """
    if not knows_sizes():  # one vector: a program would add sizes of its own one by one
        sizes = torch.cat([sizes, (num_rows - sizes.sum()).reshape(1).to(sizes.dtype)])
    if torch.jit.is_tracing():  # it would take numbers for constants
        return sizes.to(torch.int64).unbind()
    numbers = sizes.tolist()
    if torch.compiler.is_compiling():
        for number in numbers:
            torch._check(number >= 0)
        return numbers
    return [*numbers, num_rows - sum(numbers)]


def split_rows(rows, sizes):
    """The rows of each of the groups that stand one behind another, of all rows (R, ...).

    Args:
        rows: (R, ...).
        sizes: list of what `unstack_sizes` gave, or sums of neighbours.
    """
    if torch.jit.is_tracing():  # ONNX would split by constants
        bounds = [0, *itertools.accumulate(sizes)]
        return [rows[start:end] for start, end in itertools.pairwise(bounds)]
    return rows.split(sizes)


def join_rows(parts):
    """Parts of rows (R, ...) one behind another, all of one dtype."""
    return torch.cat(parts)  # Keras would convert each part, an operation of a program


def knows_shapes():
    """Whether an integer in a shape is one: what is traced or compiled may have symbols there."""
    return knows_sizes()


def knows_sizes():
    """Whether the entries of sizes are known integers: not in what is traced or exported."""
    return not _is_traced()


def _is_traced():
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def argmax(scores):
    """Where the largest of the last axis is, int32; the first of equals."""
    return torch.argmax(scores, -1).to(torch.int32)


def multiply_groups(rows, sizes, experts, kernels, bias=None, transposed=False):
    """Groups of rows that stand one behind another, each through the affine map of its expert.

    Args:
        rows: (R, D), or (R, H) if `transposed`.
        sizes: list of the sizes of the groups.
        experts: list of the expert of each group.
        kernels: `Kernels` of all experts.
        bias: (E, H) or None.
        transposed: whether to multiply by the transposed kernel.

    Returns:
        (R, H), or (R, D), in the dtype of the rows.
    """
    scale = kernels.scale
    if bias is not None and bias.dtype != rows.dtype:  # an operation of a program, even if equal
        bias = bias.to(rows.dtype)

    def multiply(part, expert, output=None, digits=None):
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

    if not knows_sizes():
        (expert,) = experts
        return multiply(rows, expert)
    outputs = rows.new_empty((rows.shape[0], kernels.shape[1 if transposed else 2]))
    digits = [None] * len(sizes)
    if scale is not None and not transposed:
        digits = torch_integers.digits_of_groups(rows, sizes)
    for each in zip(rows.split(sizes), experts, outputs.split(sizes), digits):
        multiply(*each)
    return outputs


class StackedGradients:
    """Gradients of stacked kernels and biases, put in place for some experts at a time.

    Args:
        trained: list of a dict for each projection, which may have a "kernel" and a "bias".
    """

    def __init__(self, trained):
        self._gradients = [
            {
                name: torch.empty_like(each) if each.requires_grad else None
                for name, each in of.items()
            }
            for of in trained
        ]
        self._busy = set()

    def add(self, sizes, experts, factors):
        """Put the gradients of some experts in place; no expert comes twice.

        Args:
            sizes, experts: lists, of the groups of rows.
            factors: for each projection its input rows, and the gradient of its output rows.
        """
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
        """The gradients in the structure of `trained`; those of experts without rows are zero."""
        for of in self._gradients:
            for gradient in of.values():
                if gradient is not None:
                    for expert in set(range(len(gradient))) - self._busy:
                        gradient[expert] = 0
        return self._gradients


stacked_gradients = StackedGradients


def take_columns(matrix, columns):
    """Entries (T, K) of a matrix (T, E) at integer columns (T, K); 0 where none has that number."""
    exists = _are_below(matrix.shape[1], columns)
    taken = torch.gather(matrix, 1, torch.where(exists, columns, 0).to(torch.int64))
    return torch.where(exists, taken, 0)


def count_integers(integers, number):
    """How often each of 0, 1, ..., `number` - 1 is in a vector of integers, (number,) int32."""
    places = torch.where(_are_below(number, integers), integers, number).to(torch.int64)
    counts = torch.zeros(number + 1, dtype=torch.int32, device=integers.device)
    return counts.scatter_add(0, places, torch.ones_like(places, dtype=torch.int32))[:number]


def _are_below(number, integers):
    return (integers >= 0) & (integers < number)


def has_grouped_products(platform, dtype, widths):
    """Whether `grouped_mm` is one fast kernel, which needs no sizes on the host.

    Elsewhere it is a loop over the groups.
    """
    return (
        platform == "gpu"
        and dtype == "bfloat16"
        # Rows must begin at multiples of 16 bytes.
        and all(width % 8 == 0 for width in widths)
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (9, 0)
    )


def grouped_products(platform, rows, kernels, biases, sizes, then, extras=(), transposed=False):
    """`then` of each product of all rows with the kernels of their experts, and of the extras.

    Args:
        platform: not used; there is one kernel.
        rows: (R, D) grouped by expert.
        kernels: list of tensors (E, D, H), or (E, H, D) if `transposed`, of any float dtype.
        biases: as many tensors (E, H), or none.
        sizes: (E,) int32 sizes of the groups.
        then: elementwise function of the products and the extras, which returns a tuple.
        extras: tensors (R, H).
        transposed: whether to multiply by the transposed kernels.

    Returns:
        What `then` returns: a tuple of tensors (R, H), of which rows behind the last group may be
        anything.
    """
    ends = torch.cumsum(sizes, 0, dtype=torch.int32)
    products = []
    for kernel in kernels:
        kernel = kernel.to(rows.dtype)
        kernel = kernel.mT if transposed else kernel
        products.append(torch.nn.functional.grouped_mm(rows, kernel, offs=ends))
    if biases:
        expert = _expert_of_row(rows, ends)
        products = [
            product + bias.to(rows.dtype)[expert] for product, bias in zip(products, biases)
        ]
    return then(*products, *extras)


def remakes_factors(platform):
    """Whether `grouped_kernel_gradients` takes a function for its left factor: it does not."""
    return False


def grouped_kernel_gradients(platform, lefts, right, sizes, kernel, bias, remake=None):
    """The gradient of a kernel (E, D, H), and that of a bias (E, H) or None.

    Args:
        platform: not used; there is one kernel.
        lefts: tuple of one tensor (R, D), what was multiplied.
        right: (R, H) the gradient of the products.
        sizes: (E,) int32 sizes of the groups.
        kernel: (E, D, H), for its dtype.
        bias: (E, H), for its dtype, or None.
        remake: None, as nothing is remade.
    """
    (left,) = lefts
    ends = torch.cumsum(sizes, 0, dtype=torch.int32)
    of_kernel = torch.nn.functional.grouped_mm(left.T, right, offs=ends).to(kernel.dtype)
    if bias is None:
        return of_kernel, None
    num_experts = sizes.shape[0]
    # Rows behind the last group are summed into a spare expert.
    totals = torch.zeros((num_experts + 1, right.shape[1]), device=right.device)
    totals.index_add_(0, _expert_of_row(right, ends, num_experts), right.float())
    return of_kernel, totals[:num_experts].to(bias.dtype)


def _expert_of_row(rows, ends, last=None):
    """The expert of each row, (R,); `last`, by default the last expert, behind the last group."""
    numbers = torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype)
    last = ends.shape[0] - 1 if last is None else last
    return torch.searchsorted(ends, numbers, right=True).clamp_(max=last)


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
