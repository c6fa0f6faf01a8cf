"""Processes of `torch.distributed`: replicas of a model, and experts that are split over them."""

import keras
import torch

from keras_moe.backend.base import Devices, other_key


class TorchDevices(Devices):
    def num_replicas(self):
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_world_size() if is_distributed else 1

    def sum(self, values):
        if self.num_replicas() > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def gather(self, values):
        if self.num_replicas() == 1:
            return values
        sizes = values.new_zeros(self.num_replicas(), dtype=torch.int64)
        sizes[torch.distributed.get_rank()] = len(values)
        sizes = self.sum(sizes).tolist()
        # Collective operations want equal sizes.
        own = values.new_zeros((max(sizes), *values.shape[1:]))
        own[: len(values)] = values
        parts = [torch.empty_like(own) for _ in sizes]
        torch.distributed.all_gather(parts, own)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def sum_counts(self, values):
        if self.num_replicas() == 1:
            return values
        # In one operation of doubles, which hold the integers of a step and its floats.
        flat = torch.cat([value.detach().reshape(-1).double() for value in values])
        parts = self.sum(flat).split([value.numel() for value in values])
        return [part.reshape(each.shape).to(each.dtype) for part, each in zip(parts, values)]

    def split_experts(self, experts, data):
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            rule = "`expert_parallel` needs `torchrun` and `torch.distributed.init_process_group()`"
            raise ValueError(f"{rule}. Received: no process group")
        world = torch.distributed.get_world_size()
        experts = experts or max(1, world // (data or 1))
        if world % experts or data not in (None, world // experts):
            rule = "On PyTorch there must be `data * experts` processes"
            raise ValueError(f"{rule}. Received: {experts=}, {data=}, {world} processes")
        rows = [list(range(first, first + experts)) for first in range(0, world, experts)]
        # Separate groups: `DistributedDataParallel` communicates at the same time.
        new_groups = torch.distributed.new_subgroups_by_enumeration
        replicas, _ = new_groups(list(map(list, zip(*rows))))
        return ExpertParallel(new_groups(rows)[0], replicas)

    def expert_processes(self):
        distribution = keras.distribution.distribution()
        if isinstance(distribution, ExpertParallel):
            # One process for a bank holds whole copies, as without a distribution.
            return distribution if distribution.num_processes > 1 else None
        if not isinstance(distribution, keras.distribution.DataParallel | None):
            rule = "On PyTorch experts need `expert_parallel`, or `DataParallel` to be copied"
            raise ValueError(f"{rule}. Received: a layer of experts under {distribution}")
        return None

    def sharing(self, bank):
        return bank.processes


class ExpertParallel:
    """A distribution in which each process holds an equal share of the experts and of a batch.

    Tokens are sent between the processes, not kernels.

    `process_group` holds all experts once. `replicas` hold the same experts as this process.
    """

    def __init__(self, process_group, replicas):
        self.process_group = process_group
        self.num_processes = torch.distributed.get_world_size(process_group)
        self._replicas = replicas
        self._rank = torch.distributed.get_rank(process_group)

    # Keras 3.16 asks a distribution about every layer and variable: each process makes its own.
    batch_dim_name = None

    def get_tensor_layout(self, path):
        return None

    def get_variable_layout(self, variable):
        return None

    @property
    def device_mesh(self):
        # `fit` would not average gradients: it does so for Keras's distributions only.
        raise ValueError(
            "Split experts are trained and evaluated in a loop over `data_parallel(model)`, as the "
            "page on loops and devices shows. Received: a call of `fit` or `evaluate`"
        )

    def own_experts(self, num_experts):
        """Range of the experts that this process holds."""
        if num_experts % self.num_processes:
            rule = "The number of processes must divide the number of experts"
            raise ValueError(f"{rule}. Received: {num_experts=}, {self.num_processes} processes")
        share = num_experts // self.num_processes
        return range(self._rank * share, (self._rank + 1) * share)

    def run(self, run, network, problem):
        """See `Devices.sharing`: tokens go to their experts' processes, and outputs come back."""
        plan = problem.plan
        own = plan.num_experts // self.num_processes
        trained = {key: self._shared(each) for key, each in problem.trained.items()}
        rows = plan.dispatch(problem.tokens)

        to_each = plan.sizes.to(torch.int64).reshape(self.num_processes, own)
        from_each = torch.empty_like(to_each)
        torch.distributed.all_to_all_single(from_each, to_each, group=self.process_group)
        there, back = to_each.sum(1).tolist(), from_each.sum(1).tolist()
        # Received rows are sorted by the process they came from, and only then by expert.
        experts = torch.arange(from_each.numel(), dtype=torch.int32, device=rows.device) % own
        experts = experts.repeat_interleave(from_each.reshape(-1)).unsqueeze(1)
        received = _LinearFunction.apply(rows[: sum(there)], self._exchange, there, back)
        weights = torch.ones_like(experts, dtype=torch.float32)
        key = other_key(problem.key, 7919 * torch.distributed.get_rank())
        plan_here = plan.of(experts, weights, own)
        problem = problem._replace(
            tokens=received, weights=weights, trained=trained, plan=plan_here, key=key
        )
        outputs = _LinearFunction.apply(run(network, problem), self._exchange, back, there)
        # Rows past the last group are padding.
        return plan.combine(torch.nn.functional.pad(outputs, (0, 0, 0, len(rows) - len(outputs))))

    def _exchange(self, rows, there, back):
        """Send `there[p]` rows to each process p and receive `back[p]` from it."""
        received = rows.new_empty((sum(back), *rows.shape[1:]))
        group = self.process_group
        torch.distributed.all_to_all_single(received, rows.contiguous(), back, there, group=group)
        return received

    def _shared(self, kernel):
        """Return the kernel. Its gradient is the mean over the processes that share the experts."""
        kernel = kernel.view_as(kernel)
        if kernel.requires_grad:
            kernel.register_hook(lambda each: _LinearFunction.apply(each, self._mean))
        return kernel

    def _mean(self, gradient):
        mean = (gradient / torch.distributed.get_world_size()).contiguous()
        torch.distributed.all_reduce(mean, group=self._replicas)
        return mean

    def whole(self, kernel):
        """Return the kernels of all experts, (E, ...). All processes must call this."""
        kernel = keras.ops.convert_to_tensor(kernel).detach().contiguous()
        parts = [torch.empty_like(kernel) for _ in range(self.num_processes)]
        torch.distributed.all_gather(parts, kernel, group=self.process_group)
        return torch.cat(parts)

    def data_parallel(self, model, **kwargs):
        """Wrap a built model in `DistributedDataParallel`, except for its experts."""
        # Processes that hold the same experts start from the weights of the first of them.
        experts = {
            id(weight.value): weight.value
            for layer in model._flatten_layers()
            if getattr(layer, "processes", None) is self
            for weight in layer.weights
        }
        for value in experts.values():
            torch.distributed.broadcast(value.detach(), group=self._replicas, group_src=0)
        names = [name for name, value in model.named_parameters() if id(value) in experts]
        # No public argument excludes weights from averaging and copying.
        parallel = torch.nn.parallel.DistributedDataParallel
        parallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return parallel(model, **kwargs)


class _LinearFunction(torch.autograd.Function):
    """A linear function of a tensor. Its transpose takes the other arguments in reverse order."""

    @staticmethod
    def forward(ctx, tensor, function, *others):
        ctx.transpose = function, *reversed(others)
        return function(tensor, *others)

    @staticmethod
    def backward(ctx, gradient):
        return _LinearFunction.apply(gradient, *ctx.transpose), *(None for _ in ctx.transpose)
