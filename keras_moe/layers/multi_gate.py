"""Many tasks: one bank of experts, and a router for each task.

Axes: T tokens, D features, E experts of a bank, K experts of a token, S places for the experts that
any task chooses for a token.
"""

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_moe import losses
from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import Recomputable, reseeded
from keras_moe._internal.checks import check_integer, check_tensors, shortened
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.layers import expert_bank, sublayers
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.gate import Gate
from keras_moe.layers.tokens import Tokens
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.selection import mask_invalid, take_scores, weights_of_experts, without_repeats
from keras_moe.routers.logit_router import LogitRouter
from keras_moe.routers.router import Router


class TaskGate(Gate):
    """The gate of a task, which chooses among the experts of banks that tasks may share."""

    def __init__(self, banks, router, router_losses, **kwargs):
        super().__init__(**kwargs)
        self._banks = list(banks)
        self._set_gate(router, sum(bank.num_experts for bank in banks), router_losses)
        if not self.router.serves_tasks:
            rule = "`router` must choose experts by the tokens alone"
            raise ValueError(f"{rule}. Received: a `{type(self.router).__name__}`")

    @property
    def banks(self):
        return self._banks

    def build(self, inputs_shape):
        self._build_gate(inputs_shape[-1])

    def choices_of(self, bank, routing):
        """Experts (T, K) of a bank, out of range for those of others, and weights (T, E)."""
        number, place = self.router.num_experts, self.banks.index(bank)
        first = sum(each.num_experts for each in self.banks[:place])
        weights = routing.weights  # of all experts, in order
        if not self.router.serves_all:
            weights = weights_of_experts(routing.indices, weights, number)
        return routing.indices - first, weights[:, first : first + bank.num_experts]


@register
class MultiGateMixtureOfExperts(Recomputable):
    """Experts that tasks share, each task with its own router (MMoE).

    Each expert processes a token at most once, whatever the number of tasks. With `task_experts`
    this is a block of PLE: the router of a task chooses among the shared experts and its own.

    Each task has a gate in `tasks`: its router, losses and counters. `callbacks.ExpertMonitor`,
    `inspection` and the report treat these as layers named `{layer name}_{task name}`.

    Args:
        experts: Bank of experts that all tasks share.
        num_tasks: Integer. Number of tasks.
        router: Router, its name, or a list with one of these for each task, and for the shared
            output if there is one. A single router is copied for each.
        task_experts: List of banks of experts, one for each task, or None.
        router_losses: None for the `default_losses` of each router; `[]` for no losses; or a list
            of losses, which each router gets.
        shared_output: Boolean, with `task_experts`. Whether a further router, over all experts,
            makes an output for the shared experts of the next block.
        task_names: List of strings, one for each task. None: "task_0" and so on.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If there is not one router, bank or name for each task.

    Call arguments:
        inputs: (batch, ..., D) float tensor, or with `task_experts` a list of them: one for each
            task, then one for the shared experts.
        mask: (batch, ...) bool or integer tensor, False for padding, or None.
        training: Boolean. Whether router losses are added, noise drawn and assignments counted.

    Output shape:
        List of `num_tasks` shapes (batch, ..., D'); with `shared_output=True` one more.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> layer = keras_moe.layers.MultiGateMixtureOfExperts(experts, num_tasks=2)
    >>> like, rating = layer(keras.random.normal((32, 16)))
    >>> like.shape, rating.shape
    ((32, 16), (32, 16))

    References: Ma et al. 2018, "Multi-gate Mixture-of-Experts", section 4; Tang et al. 2020,
    "Progressive Layered Extraction (PLE)", section 3.
    """

    def __init__(
        self,
        experts: ExpertBank,
        num_tasks: int,
        router: str | Router | Sequence = "dense",
        task_experts: Sequence[ExpertBank] | None = None,
        router_losses: Sequence | None = None,
        shared_output: bool = False,
        task_names: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_tasks = check_integer("num_tasks", num_tasks)
        self.experts = expert_bank.get(experts)
        banks = _one_for_each("task_experts", task_experts, self.num_tasks)
        self.task_experts = [expert_bank.get(bank) for bank in banks]
        names = [f"task_{number}" for number in range(self.num_tasks)]
        self.task_names = _one_for_each("task_names", task_names, self.num_tasks) or names
        all_banks = [self.experts, *self.task_experts]
        if len(set(map(id, all_banks))) < len(all_banks):
            raise ValueError("`experts` and `task_experts` must be different objects")
        self.router_losses = router_losses and losses.get_list(router_losses)
        self.shared_output = bool(shared_output)
        if shared_output and not self.task_experts:
            raise ValueError("`shared_output=True` needs `task_experts`")

        # Each router chooses among the shared experts, then its own task's.
        own = [[bank] for bank in self.task_experts] or [[]] * self.num_tasks
        chosen_from = [[self.experts, *banks] for banks in own]
        names = list(self.task_names)
        if shared_output:
            chosen_from.append(all_banks)
            names.append("shared")
        valid = {name for name in names if isinstance(name, str) and name}
        if len(valid) < len(names):
            rule = "`task_names` must be different strings that are not empty"
            raise ValueError(f"{rule}. Received: {names}")
        gates = zip(chosen_from, _routers_of_tasks(router, len(names)), names)
        self.tasks = [
            TaskGate(banks, router, self.router_losses, name=f"{self.name}_{name}")
            for banks, router, name in gates
        ]
        if kwargs.get("dtype") is not None:
            for bank in all_banks:
                bank.inherit_policy(self.dtype_policy)
        sublayers.freeze_parts(self)

    def build(self, inputs_shape):
        *shapes, shared_shape = self._of_each_task(inputs_shape)
        widths = []
        for bank, shape in [*zip(self.task_experts, shapes), (self.experts, shared_shape)]:
            if not bank.built:
                bank.build((None, shape[-1]))
            widths.append(bank.compute_output_shape((None, shape[-1]))[-1])
        if len(set(widths)) > 1:
            rule = "All banks must return the same number of features"
            raise ValueError(f"{rule}. Received: {widths}")
        for task, shape in zip(self.tasks, [*shapes, shared_shape]):
            task.build(shape)

    @backend.uncompiled
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)

    def call(
        self, inputs: Tensor | list, mask: Tensor | list | None = None, training: bool | None = None
    ) -> list:
        # Flatten: tokens (T, D) of each task and, last, of the shared experts.
        flat = self._tokens(inputs, mask)

        # Choose: the gate of each task picks experts among the shared ones and its own.
        routings = [task.choose(tokens, training)[0] for task, tokens in zip(self.tasks, flat)]

        # Compute: each bank computes for a token the experts that any task chose, once.
        # Combine: each task sums the outputs of its banks by its own weights.
        totals: list = [0.0] * len(self.tasks)
        for bank, tokens in [*zip(self.task_experts, flat), (self.experts, flat[-1])]:
            numbers = [n for n, task in enumerate(self.tasks) if bank in task.banks]
            found = [self.tasks[number].choices_of(bank, routings[number]) for number in numbers]
            chosen, weights = zip(*found)
            if any(self.tasks[number].router.serves_all for number in numbers):
                values = tokens.values
                if tokens.mask is not None:
                    # A network may have no derivative at 0: NaN times 0 is NaN.
                    real = ops.expand_dims(tokens.mask, 1)
                    values = ops.where(real, values, ops.ones_like(values))
                outputs = bank.compute_all(values, training)
            else:
                # An expert that several tasks chose for a token has one place; the others are -1.
                chosen = mask_invalid(ops.concatenate(chosen, axis=1), bank.num_experts)
                chosen = without_repeats(chosen)
                ones = ops.ones_like(chosen, "float32")
                plan = GroupedPlan.of(chosen, ones, bank.num_experts)
                outputs = bank.compute_each(tokens.values, plan, training)
                weights = tuple(take_scores(each, chosen) for each in weights)
            outputs = ops.cast(outputs, "float32")
            for number, each in zip(numbers, weights):
                totals[number] += ops.einsum("ts,tsd->td", each, outputs)
        return [tokens.unflatten(total, self.compute_dtype) for tokens, total in zip(flat, totals)]

    def _tokens(self, inputs, mask):
        if not isinstance(inputs, (list, tuple)):
            return [Tokens.of(inputs, mask)] * (self.num_tasks + 1)
        inputs, masks = self._of_each_task(inputs), self._masks(inputs, mask)
        axes = "abcdefghij"[: len(inputs[0].shape)]
        check_tensors(**{f"inputs[{n}]": (each, axes, "float") for n, each in enumerate(inputs)})
        return [Tokens.of(*each) for each in zip(inputs, masks)]

    def _of_each_task(self, values):
        """Inputs or shapes: one for each task and, last, one for the shared experts."""
        is_list = isinstance(values, (list, tuple))
        if not is_list or isinstance(values[0], (int, type(None))):  # one tensor or shape
            return [values] * (self.num_tasks + 1)
        if len(values) != self.num_tasks + 1 or not self.task_experts:
            raise ValueError(
                "`inputs` must be one tensor or, with `task_experts`, one for each task and one "
                f"for the shared experts. Received: {len(values)} for {self.num_tasks} tasks"
            )
        return list(values)

    def _masks(self, inputs, mask):
        """A mask for each of `_of_each_task(inputs)`."""
        number = self.num_tasks + 1
        if not isinstance(inputs, (list, tuple)) or not isinstance(mask, (list, tuple)):
            return [mask] * number
        if len(mask) != number:
            rule = "`mask` must have one for each of the inputs"
            raise ValueError(f"{rule}. Received: {len(mask)} for {number}")
        return mask

    def compute_mask(self, inputs, previous_mask):
        return self._masks(inputs, previous_mask)[: len(self.tasks)]

    def compute_output_shape(self, inputs_shape):
        shapes = self._of_each_task(inputs_shape)
        features = self.experts.compute_output_shape((None, shapes[-1][-1]))[-1]
        return [(*shape[:-1], features) for shape in shapes[: len(self.tasks)]]

    def compute_output_spec(self, inputs, mask=None, *args, **kwargs):
        given = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        for each, mask_of_each in zip(given, self._masks(inputs, mask)):
            if mask_of_each is None:
                sublayers.warn_of_lost_mask(self, each)
        return super().compute_output_spec(inputs, mask, *args, **kwargs)

    @property
    def router(self) -> list[Router]:
        """The routers of all tasks, and of the shared output."""
        return [task.router for task in self.tasks]


def _one_for_each(name, values, number):
    if values and (isinstance(values, str) or len(values) != number):
        raise ValueError(
            f"`{name}` must have one for each task, of {number}. Received: {shortened(values)}"
        )
    return values or []


def _routers_of_tasks(identifier, number):
    """A list of one router for each task. Copies of one draw other weights and other noise."""
    if isinstance(identifier, (list, tuple)):
        instances = [id(each) for each in identifier if isinstance(each, Router)]
        if len(identifier) != number or len(set(instances)) < len(instances):
            rule = "A list of `router` must have one for each output, no instance twice"
            raise ValueError(f"{rule}. Received: {identifier} for {number} outputs")
        return list(identifier)
    if not isinstance(identifier, Router):
        return [identifier] * number
    return [identifier, *(_copy_of_router(identifier, copy) for copy in range(1, number))]


def _copy_of_router(router, number):
    config = router.get_config()
    del config["name"]
    if config.get("seed") is not None:
        config["seed"] += number
    copy = type(router).from_config(config)
    if isinstance(copy, LogitRouter):
        copy.kernel_initializer = reseeded(copy.kernel_initializer, number)
    return copy
