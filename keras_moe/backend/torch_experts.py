"""Experts spread over the processes of `torch.distributed`: tokens travel, kernels stay."""

import keras
import torch


class ExpertParallel:
    """Each process holds an equal share of the experts of every bank, and its share of a batch.

    Made by `split_experts`.

    Args:
        process_group: group of all processes.
    """

    def __init__(self, process_group):
        self.process_group = process_group
        self.num_processes = torch.distributed.get_world_size(process_group)
        self._rank = torch.distributed.get_rank(process_group)

    def get_tensor_layout(self, path):
        """None: outputs stay as they are. Keras asks every layer."""
        return None

    def own_experts(self, num_experts):
        """The numbers of the experts that this process holds, a range."""
        if num_experts % self.num_processes:
            raise ValueError(
                "The number of processes must divide the number of experts. Received: "
                f"num_experts={num_experts}, {self.num_processes} processes. Change one of them."
            )
        share = num_experts // self.num_processes
        return range(self._rank * share, (self._rank + 1) * share)

    def serve(self, rows, sizes, function):
        """What the experts of all processes make of rows.

        Args:
            rows: (R, D), grouped by expert.
            sizes: (E,) integers, the sizes of the groups, R together.
            function: `function(rows, experts)` serves rows (R', D) by the experts of this process;
                `experts` (R',) are their numbers among those.

        Returns:
            (R, D').
        """
        to_each = sizes.to(torch.int64).reshape(self.num_processes, -1)
        from_each = torch.empty_like(to_each)
        torch.distributed.all_to_all_single(from_each, to_each, group=self.process_group)
        there, back = to_each.sum(1).tolist(), from_each.sum(1).tolist()
        own = torch.arange(to_each.shape[1], dtype=torch.int32, device=rows.device)
        experts = own.repeat(self.num_processes).repeat_interleave(from_each.reshape(-1))
        received = _Exchange.apply(rows, there, back, self.process_group)
        return _Exchange.apply(function(received, experts), back, there, self.process_group)

    def mean_gradient(self, kernel):
        """The kernel, whose gradient is divided by the number of processes.

        It adds up over the tokens of all of them, while those of other weights are averaged.
        """
        return _MeanGradient.apply(kernel, self.num_processes)

    def whole(self, kernel):
        """The kernels of all experts, (E, ...). All processes must ask."""
        kernel = keras.ops.convert_to_tensor(kernel).detach().contiguous()
        parts = [torch.empty_like(kernel) for _ in range(self.num_processes)]
        torch.distributed.all_gather(parts, kernel, group=self.process_group)
        return torch.cat(parts)

    def data_parallel(self, model, **kwargs):
        """`torch.nn.parallel.DistributedDataParallel` of a built model, for all but its experts.

        Args:
            model: a built Keras model.
            **kwargs: arguments of `DistributedDataParallel`.
        """
        experts = {
            id(weight.value)
            for layer in model._flatten_layers()
            if getattr(layer, "processes", None) is self
            for weight in layer.weights
        }
        names = [name for name, value in model.named_parameters() if id(value) in experts]
        parallel = torch.nn.parallel.DistributedDataParallel
        parallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return parallel(model, **kwargs)


class _Exchange(torch.autograd.Function):
    """Send `there[p]` rows to each process p, and receive `back[p]` from it."""

    @staticmethod
    def forward(ctx, rows, there, back, group):
        ctx.plan = back, there, group
        received = rows.new_empty((sum(back), *rows.shape[1:]))
        torch.distributed.all_to_all_single(received, rows.contiguous(), back, there, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient, *ctx.plan), None, None, None


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, number):
        ctx.number = number
        return kernel.view_as(kernel)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.number, None


def split_experts(experts, process_group):
    """Experts split over all processes, for `keras.distribution.set_distribution`.

    Args:
        experts: number of processes that share the experts of a bank, which must be all. None: all.
        process_group: group of all processes, which only tokens on their way to experts use. None:
            a new one.

    Raises:
        ValueError: If `torch.distributed` is not initialized, or there are other processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "`expert_parallel` needs processes that know each other. Received: no process group. "
            "Start the program by `torchrun` and call `torch.distributed.init_process_group()`."
        )
    number = torch.distributed.get_world_size(process_group)
    world = torch.distributed.get_world_size()
    if number != world or experts not in (None, world):
        raise ValueError(
            "On PyTorch the experts are split over all processes. Received: "
            f"experts={experts}, a process group of {number}, {world} processes. Leave both out."
        )
    # A group of its own: `DistributedDataParallel` talks at the same time.
    return ExpertParallel(process_group or torch.distributed.new_group())


def expert_processes():
    """The `ExpertParallel` that was set, or None."""
    distribution = keras.distribution.distribution()
    return distribution if isinstance(distribution, ExpertParallel) else None
