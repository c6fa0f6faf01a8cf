"""Many tasks: one bank of experts, and a router for each task.

Axes: T tokens, D features, E experts, K experts of a token, S places for the experts that any task
chooses for a token.
"""

from typing import Any

import keras
from keras import ops

from keras_moe import losses, routers
from keras_moe._internal.checks import check_integer, check_tensors
from keras_moe._internal.serialization import config_of, register
from keras_moe.backend import backend
from keras_moe.layers import expert_bank
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.mixture_of_experts import MixtureOfExperts, _sequence_length
from keras_moe.ops.assignments import Assignments
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.selection import existing


@register
class MultiGateMixtureOfExperts(keras.layers.Layer):
    """Experts that tasks share, each task with a router of its own (MMoE).

    Tasks that agree use the same experts; tasks that conflict learn to use different ones. Each
    expert computes a token at most once, whatever the number of tasks: with dense routers all
    experts compute each token once, with sparse ones those that any task chooses.

    With `task_experts` this is a block of PLE (Progressive Layered Extraction): the router of a
    task chooses among the shared experts and those of its task. Blocks can be stacked: with
    `shared_output=True` a further router, over all experts, makes an input of the shared experts of
    the next block.

    Each task is a `MixtureOfExperts` in `tasks`, so `callbacks.ExpertMonitor`, `inspection` and the
    report treat tasks as layers of these names: `{layer name}_{task name}`.

    Args:
        experts: Bank of experts that all tasks share.
        num_tasks: Integer. Number of tasks.
        router: Router, its name, or a list with one of these for each task, and for the shared
            output if there is one. A single router is copied for each.
        task_experts: List of banks of experts, one for each task, or None.
        router_losses: List of losses of each routing, or None for the defaults of the router.
        shared_output: Boolean, with `task_experts`. Whether the outputs end with one that all
            experts make.
        task_names: List of strings, one for each task. None: "task_0" and so on.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If there is not one router, bank or name for each task, two banks or names are
            the same, or a router is a `SoftRouter`.

    Call arguments:
        inputs: (batch, ..., D) float tensor, or with `task_experts` a list of them: one for each
            task, then one for the shared experts.
        mask: (batch, ...) bool or integer tensor, False for padding, or None.
        training: Boolean. Whether router losses are added, noise drawn and assignments counted.

    Input shape:
        (batch, ..., D), or a list of `num_tasks + 1` such shapes.

    Output shape:
        List of `num_tasks` shapes (batch, ..., D'); with `shared_output=True` one more.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> layer = keras_moe.layers.MultiGateMixtureOfExperts(experts, num_tasks=2)
    >>> like, rating = layer(keras.random.normal((32, 16)))
    >>> like.shape, rating.shape
    ((32, 16), (32, 16))

    References: Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts", section 4; Tang et al. 2020, "Progressive Layered Extraction (PLE)",
    section 3.
    """

    def __init__(
        self,
        experts,
        num_tasks,
        router="dense",
        task_experts=None,
        router_losses=None,
        shared_output=False,
        task_names=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.experts = expert_bank.get(experts)
        self.num_tasks = check_integer("num_tasks", num_tasks)
        self.task_names = _one_for_each("task_names", task_names, num_tasks) or [
            f"task_{number}" for number in range(num_tasks)
        ]
        self.task_experts: Any = None
        if task_experts is not None:
            banks = _one_for_each("task_experts", task_experts, num_tasks)
            self.task_experts = [expert_bank.get(bank) for bank in banks]
        parts = [self.experts, *(self.task_experts or ())]
        if len(set(map(id, parts))) < len(parts):
            raise ValueError("`experts` and `task_experts` must be different objects")
        self.shared_output = bool(shared_output)
        if shared_output and task_experts is None:
            raise ValueError("`shared_output=True` needs `task_experts`")
        if len(set(self.task_names)) < num_tasks:
            raise ValueError(f"`task_names` must differ. Received: task_names={task_names}")
        if router_losses is not None:
            router_losses = tuple(losses.get(loss) for loss in router_losses)
        self.router_losses = router_losses
        # The banks that each router chooses from, in the order of its experts.
        own = [()] * num_tasks if task_experts is None else [(bank,) for bank in self.task_experts]
        banks = [(self.experts, *of_task) for of_task in own]
        names = list(self.task_names)
        if shared_output:
            banks.append((self.experts, *self.task_experts))
            names.append("shared")
        self.tasks = [
            MixtureOfExperts(
                of_task[0] if len(of_task) == 1 else JoinedExperts(of_task),
                router_of_task,
                router_losses,
                name=f"{self.name}_{name}",
                dtype=self.dtype_policy if kwargs.get("dtype") is not None else None,
            )
            for of_task, router_of_task, name in zip(banks, _routers(router, len(names)), names)
        ]
        if any(isinstance(task.router, routers.SoftRouter) for task in self.tasks):
            raise ValueError("`router` must choose experts. Received: a `SoftRouter`")
        self.supports_masking = True

    def build(self, inputs_shape):
        shapes = self._by_task(inputs_shape, is_shape=True)
        if not self.experts.built:
            self.experts.build((None, shapes[-1][-1]))
        for bank, shape in zip(self.task_experts or (), shapes):
            if not bank.built:
                bank.build((None, shape[-1]))
        banks = [*(self.task_experts or ()), self.experts]
        widths = [bank.compute_output_shape((None, shapes[-1][-1]))[-1] for bank in banks]
        if len(set(widths)) > 1:
            raise ValueError(
                f"All banks must return the same number of features. Received: {widths}"
            )
        for task, shape in zip(self.tasks, shapes):
            task.experts.built = True  # its banks are
            task.build(shape)

    def _by_task(self, inputs, is_shape=False):
        """One input for each task, and one for the shared experts and the last router."""
        single = is_shape and not isinstance(inputs[0], (list, tuple))
        if single or not isinstance(inputs, (list, tuple)):
            return [inputs] * (self.num_tasks + 1)
        if len(inputs) != self.num_tasks + 1 or self.task_experts is None:
            raise ValueError(
                "`inputs` must be one tensor or, with `task_experts`, one for each task and one "
                f"for the shared experts. Received: {len(inputs)} for {self.num_tasks} tasks"
            )
        return list(inputs)

    def call(self, inputs, mask=None, training=None):
        # Route: the router of each task chooses among the experts of its banks.
        # Keras makes a list of masks for a list of inputs.
        has_masks = isinstance(inputs, (list, tuple)) and isinstance(mask, (list, tuple))
        inputs, masks = self._by_task(inputs), mask if has_masks else [mask] * (self.num_tasks + 1)
        axes = "abcdefghij"[: len(inputs[0].shape)]
        check_tensors(**{f"inputs[{n}]": (each, axes, "float") for n, each in enumerate(inputs)})
        routed: list[Any] = [
            _route(task, each, of_task, training)
            for task, each, of_task in zip(self.tasks, inputs, masks)
        ]
        tokens = [tokens for tokens, _, _ in routed]
        tokens_of_bank = [*tokens[: self.num_tasks], tokens[-1]]
        if len(inputs) > len(self.tasks):  # there is no router for the input of shared experts
            tokens_of_bank[-1] = _flatten(self.tasks[0], inputs[-1], masks[-1])[0]

        # Compute: each bank computes for a token what any task chose of it. Combine: each task
        # sums these outputs by its own weights.
        totals: list[Any] = [0.0] * len(self.tasks)
        banks = [*(self.task_experts or [None] * self.num_tasks), self.experts]
        for bank, bank_tokens in zip(banks, tokens_of_bank):
            if bank is None:
                continue
            choices = {
                number: _choices(task, bank, routing)
                for number, (task, (_, routing, _)) in enumerate(zip(self.tasks, routed))
                if _first_expert(task, bank) is not None
            }
            outputs, weights = _compute(bank, bank_tokens, list(choices.values()))
            outputs = ops.cast(outputs, "float32")
            for number, of_task in zip(choices, weights):
                totals[number] = totals[number] + ops.einsum("ts,tsd->td", of_task, outputs)

        # Account: in training, each task adds its router losses and counts its assignments.
        returned = []
        for task, each, (tokens_of_task, routing, sequence_length), total in zip(
            self.tasks, inputs, routed, totals
        ):
            task._account(tokens_of_task, routing, sequence_length, training)
            shape = (*ops.shape(each)[:-1], total.shape[-1])
            returned.append(ops.cast(ops.reshape(total, shape), self.compute_dtype))
        return returned

    def compute_output_shape(self, inputs_shape):
        shapes = self._by_task(inputs_shape, is_shape=True)
        return [
            (*shape[:-1], self.experts.compute_output_shape((None, shapes[-1][-1]))[-1])
            for shape in shapes[: len(self.tasks)]
        ]

    def get_config(self):
        banks = self.task_experts
        return {
            **super().get_config(),
            "experts": config_of(self.experts),
            "num_tasks": self.num_tasks,
            "router": [config_of(task.router) for task in self.tasks],
            "task_experts": None if banks is None else [config_of(bank) for bank in banks],
            "router_losses": self.router_losses and list(map(config_of, self.router_losses)),
            "shared_output": self.shared_output,
            "task_names": self.task_names,
        }


class JoinedExperts(ExpertBank):
    """Several banks seen as one, whose experts are numbered in their order."""

    def __init__(self, banks, **kwargs):
        super().__init__(sum(bank.num_experts for bank in banks), **kwargs)
        self.banks = list(banks)

    def compute_output_shape(self, tokens_shape):
        return self.banks[0].compute_output_shape(tokens_shape)


def _one_for_each(name, values, number):
    if values is not None and len(values) != number:
        raise ValueError(
            f"`{name}` must have one for each task. Received: {len(values)} for {number} tasks"
        )
    return values


def _routers(router, number):
    """A router, a name or a config for each task."""
    if isinstance(router, (list, tuple)):
        return _one_for_each("router", router, number)
    if not isinstance(router, routers.Router):
        return [router] * number
    config = router.get_config()
    del config["name"]
    return [router, *(type(router).from_config(dict(config)) for _ in range(number - 1))]


def _flatten(task, inputs, mask):
    mask = task._check_call(inputs, mask)
    return task._flatten(inputs, mask), mask


def _route(task, inputs, mask, training):
    """The tokens of a task, their routing, and the length of a sequence."""
    tokens, mask = _flatten(task, inputs, mask)
    sequence_length = _sequence_length(task._leading(inputs))
    return tokens, task._route(tokens, mask, sequence_length, training), sequence_length


def _first_expert(task, bank):
    """The number of a bank's first expert among those of a task, None if the task has not any."""
    first = 0
    for each in getattr(task.experts, "banks", [task.experts]):
        if each is bank:
            return first
        first += each.num_experts
    return None


def _choices(task, bank, routing):
    """The experts (T, K) of a bank that a task chose, others out of range, and their weights.

    None for the experts if all serve, in order.
    """
    first = _first_expert(task, bank)
    if isinstance(task.router, routers.DenseRouter):
        return None, routing.weights[:, first : first + bank.num_experts]
    return routing.indices - first, routing.weights


def _compute(bank, tokens, choices):
    """Outputs (T, S, D') of the experts that were chosen, and for each choice weights (T, S)."""
    num_experts = bank.num_experts
    if any(experts is None for experts, _ in choices):
        outputs = bank.compute_all(tokens)
        places = ops.expand_dims(ops.arange(num_experts, dtype="int32"), 0)
    else:
        chosen = [existing(experts, num_experts) for experts, _ in choices]
        places = _without_repeats(ops.concatenate(chosen, axis=1))
        plan = GroupedPlan(Assignments.of(places, num_experts), ops.ones_like(places, "float32"))
        plan = plan.by_assignment()
        if not backend.token_shards():
            plan = plan.sort()
        num_places = places.shape[1]
        outputs = bank(ops.repeat(tokens, num_places, axis=0), plan)
        outputs = ops.reshape(outputs, (-1, num_places, outputs.shape[-1]))
    return outputs, [
        weights if experts is None else _weights_at(places, experts, weights)
        for experts, weights in choices
    ]


def _without_repeats(experts):
    """Experts (T, S) with -1 in the place of each that stands in an earlier place, too."""
    earlier = ops.expand_dims(experts, 1) == ops.expand_dims(experts, 2)  # (T, place, other)
    earlier = ops.logical_and(earlier, ops.tri(experts.shape[1], k=-1, dtype="bool"))
    return ops.where(ops.any(earlier, axis=2), -1, experts)


def _weights_at(places, experts, weights):
    """The weights (T, K) of experts (T, K) at the places (T, S) where these are, zero elsewhere."""
    matches = ops.expand_dims(places, 1) == ops.expand_dims(experts, 2)  # (T, K, S)
    matches = ops.logical_and(matches, ops.expand_dims(places >= 0, 1))
    return ops.sum(ops.where(matches, ops.expand_dims(weights, 2), 0.0), axis=1)
