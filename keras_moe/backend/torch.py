"""PyTorch primitives."""

import functools
import math

import optree
import torch
from keras import ops

from keras_moe._internal.keras_internals import in_stateless_scope
from keras_moe.backend import torch_groups, torch_processes
from keras_moe.backend.base import (
    LOW,
    Backend,
    is_any_derivative,
    named_platform,
    packed_order,
    refuse_second_derivative,
)
from keras_moe.backend.torch_groups import is_traced, sizes_on_host, split, without_autocast

# With fewer scores, one sort takes less time than the operations of several maxima.
MAX_SORTED = 2**13


class TorchBackend(Backend):
    devices = torch_processes.TorchDevices()

    def needs_static_shapes(self):
        # PyTorch runs eagerly here, or records slices as they are.
        return False

    def is_exporting(self):
        return torch.jit.is_tracing() or torch.compiler.is_exporting()

    def platform_of(self, tensor):
        return named_platform() or ("cpu" if tensor.device.type in ("cpu", "meta") else "gpu")

    def scope_of_call(self, layer, tensor):
        can_be_repeated = torch.is_grad_enabled() and not is_traced() and not in_stateless_scope()
        # As `torch.utils.checkpoint` finds out itself; there is no public way.
        if can_be_repeated and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "A layer must be recomputed by its own `keras.RematScope`. That of a layer around "
                "it, or `torch.utils.checkpoint`, would repeat random draws, counts and updates. "
                f"Received: a call of `{layer.name}` in a backward pass"
            )
        return without_autocast(tensor)

    def uncompiled(self, function):
        # Dynamo would trace hundreds of small operations for each size of a batch, and give up at
        # sizes of groups, which depend on the tokens.
        apart = torch.compiler.disable(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            is_compiled = torch.compiler.is_dynamo_compiling() and not self.is_exporting()
            return (apart if is_compiled else function)(*args, **kwargs)

        return call

    def differentiable(self, forward, backward, inputs, context):
        tensors, structure = _flatten(inputs)
        with without_autocast(tensors[0]):
            # Asked here, as gradients are always off in the `forward` of a function of autograd.
            save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            if is_any_derivative() or is_traced() or not save:
                return forward(inputs, context, save=False)[0]
            return _Differentiable.apply(forward, backward, structure, context, *tensors)

    def vjp(self, function, inputs):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            output, others = function(*inputs)

        def pullback(cotangent):
            if not output.requires_grad:  # a network of vectors and constants
                return [torch.zeros_like(each) for each in inputs]
            return torch.autograd.grad(output, inputs, cotangent, materialize_grads=True)

        return others, pullback

    def matmul(self, left, right, transposed=False):
        right = right.mT if transposed else right
        if right.dtype == left.dtype or is_traced() or left.device.type != "cpu":
            return left @ right.to(left.dtype)
        # Blocks of columns become floats in memory that stays in the cache.
        blocks = right.split(max(1, torch_groups.CPU_CHUNK_VALUES // right.shape[0]), 1)
        return torch.cat([left @ block.to(left.dtype) for block in blocks], 1)

    def layout(self, problem, platform):
        if is_any_derivative():
            return super().layout(problem, platform)
        if platform != "cpu" or is_traced():
            return torch_groups.AllGroups
        is_small = torch.is_grad_enabled() and torch_groups.is_small(problem)
        return torch_groups.SmallProblem if is_small else torch_groups.Chunks

    def gather_rows(self, tensor, indices):
        rows = torch.index_select(tensor, 0, indices.reshape(-1))
        return rows.reshape(*indices.shape, *tensor.shape[1:])

    def sum_chosen_rows(self, rows, places, weights=None):
        # One operation, which has no second derivatives, forward mode or `vmap`.
        is_plain = rows.is_cpu and rows.dtype == torch.float32 and not torch.is_grad_enabled()
        if not (is_plain and self.is_complete(places)) or is_traced() or is_any_derivative():
            return super().sum_chosen_rows(rows, places, weights)
        sum_bags = torch.nn.functional.embedding_bag
        return sum_bags(places, rows, per_sample_weights=weights, mode="sum")

    def softmax(self, logits, axis=-1):
        return torch.softmax(ops.convert_to_tensor(logits), axis)

    def top_k(self, scores, number):
        if not is_traced() and (not scores.is_cpu or scores.numel() <= MAX_SORTED):
            best = torch.argsort(scores, stable=True, dim=1, descending=True)[:, :number]
        else:
            rest = torch.nan_to_num(scores.clamp_min(LOW), math.inf, math.inf)
            chosen = [torch.argmax(rest, 1, keepdim=True)]
            for _ in range(number - 1):
                rest = rest.scatter(1, chosen[-1], -math.inf)
                chosen.append(torch.argmax(rest, 1, keepdim=True))
            best = torch.cat(chosen, 1)
        return self.mark_complete(best.to(torch.int32), scores.shape[1])

    def take_columns(self, matrix, columns):
        if self.is_complete(columns, matrix.shape[1]):
            return torch.gather(matrix, 1, columns.to(torch.int64))
        existing = columns.clamp(0, matrix.shape[1] - 1)
        taken = torch.gather(matrix, 1, existing.to(torch.int64))
        return taken.masked_fill(existing != columns, 0.0)

    def masked_fill(self, values, mask, number):
        values, mask = map(ops.convert_to_tensor, (values, mask))
        return values.masked_fill(mask, number)  # the number stays on the host

    def mark_complete(self, tensor, bound=0):
        if not (is_traced() or tensor.is_inference() or tensor.numel() == 0):
            tensor.complete = tensor._version, bound  # until something is written into it
        return tensor

    def is_complete(self, tensor, bound=math.inf):
        version, own_bound = getattr(tensor, "complete", (None, 0))
        return version is not None and version == tensor._version and own_bound <= bound

    def is_written(self, tensor):
        return not tensor.is_inference() and tensor._version > 0

    def count_integers(self, integers, number):
        # One more count, of all others.
        places = integers.reshape(-1).clamp(-1, number).to(torch.int64) % (number + 1)
        counts = torch.zeros(number + 1, dtype=torch.int32, device=integers.device)
        ones = torch.ones_like(places, dtype=torch.int32)
        return counts.scatter_add(0, places, ones)[:number]

    def order_and_rank(self, integers, bound):
        if torch.jit.is_tracing():  # for ONNX
            order = packed_order(lambda packed: torch.sort(packed).values, integers, bound)
        else:
            order = torch.argsort(integers, stable=True)
        numbers = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
        rank = numbers.scatter(0, order.to(torch.int64), numbers)
        return order.to(torch.int32), rank

    def larger_size(self, least, size):
        # An export takes a symbolic size for a constant where it becomes a tensor.
        symbolic = isinstance(size, torch.SymInt)
        return torch.sym_max(least, size) if symbolic else ops.maximum(least, size)

    def split_groups(self, rows, sizes):
        numbers = sizes_on_host(sizes, rows.shape[0])
        return split(rows, numbers), numbers


# On PyTorch `keras.tree` takes several times as long. A gradient may be None.
_flatten = functools.partial(optree.tree_flatten, none_is_leaf=True)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, backward, structure, context, *tensors):
        output, saved = forward(structure.unflatten(tensors), context, save=True)
        ctx.run_backward, ctx.structure, ctx.context = backward, structure, context
        # All tensors in the list that PyTorch frees, and may offload or compute again.
        saved, ctx.structure_of_saved = _flatten(saved)
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
            gradients, _ = _flatten(ctx.run_backward(inputs, ctx.context, saved, upstream))
        if torch.is_grad_enabled():
            gradients = _Gradients.apply(gradients, upstream, *tensors)
        return None, None, None, None, *gradients


class _Gradients(torch.autograd.Function):
    """Gradients whose derivative, if one follows, is an error."""

    @staticmethod
    def forward(ctx, gradients, *sources):
        return tuple(gradients)

    backward = staticmethod(refuse_second_derivative)
