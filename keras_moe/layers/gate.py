"""The gate of a mixture: a router with its losses, its capacity and its counters.

Axes: T tokens, E experts, K experts per token.
"""

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import losses, routers
from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import Recomputable
from keras_moe._internal.checks import check_choice, check_number, check_tensors, shortened
from keras_moe._internal.keras_internals import (
    drops_losses,
    in_symbolic_scope,
    losses_added,
    names_below,
    unlocked,
    untrack,
)
from keras_moe._internal.serialization import load_draws, save_draws
from keras_moe.layers.capacity import Capacity, count_dropped
from keras_moe.layers.counters import Counters, Counts
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.tokens import Tokens
from keras_moe.ops.routing import Routing
from keras_moe.ops.sorting import as_dtype


@dataclasses.dataclass(eq=False)
class Observer:
    """Watches gates. It may also replay choices, or have inference counted.

    - `on_routing`: function of a routing and its tokens (T, D), called after each choice, or None.
    - `indices` (T, K): experts to replay instead of choosing, or None.
    - `counts`: whether inference is counted, in the counters of evaluations.
    """

    on_routing: Callable | None = None
    indices: Any = None
    counts: bool = False


class Gate(Recomputable):
    """Abstract: a layer with a router that chooses experts, its losses and its counters.

    The counters only grow: a report is the difference of two readings. Evaluation is counted where
    an observer asks for it, by counters of its own.
    """

    # Whether the config of this layer, rather than of a block around it, has its arguments.
    has_own_config = True
    router: Any
    capacity: Capacity | None

    def _set_gate(self, router, num_experts, router_losses=None, capacity_factor=None, **arguments):
        """Set the router for a number of experts, with its losses and capacity."""
        self.router = routers.get(router, num_experts, **arguments)
        if self.router.num_experts != num_experts:
            raise ValueError(
                "`router` and `experts` must have the same number of experts. Received: "
                f"router.num_experts={self.router.num_experts}, experts.num_experts={num_experts}. "
                "The number of experts per token is the router's `top_k`."
            )
        if router_losses is None:
            router_losses = self.router.default_losses
        self._router_losses = losses.get_list(router_losses)
        self._initial_loss_weights = [loss.weight for loss in self.router_losses]
        for loss in self.router_losses:
            if loss.needs_uneven_load and loss.scope in self.router.even_scopes:
                reason = "is always even"
            elif loss.needs_smooth_load and not self.router.has_smooth_load:
                reason = "has no gradient: use `LoadBalance`, or a router such as `NoisyTopKRouter`"
            else:
                continue
            warnings.warn(
                f"`{loss.name}` of `{self.name}` has no effect with a "
                f"`{type(self.router).__name__}`, whose load {reason}.",
                stacklevel=3,
            )
        self.capacity = Capacity.get(capacity_factor)
        if self.capacity is not None and not self.router.tokens_choose:
            raise ValueError(
                "`capacity_factor` limits how many tokens choose an expert. Received: "
                f"capacity_factor={shortened(capacity_factor)} with a "
                f"`{type(self.router).__name__}`, which is not a token-choice router"
            )
        # Owned by the layer, so that Keras carries its state through compiled steps.
        self._capacity_seed = keras.random.SeedGenerator() if self.capacity else None
        self._observers: tuple = ()

    @property
    def banks(self) -> list[ExpertBank]:
        """The banks that the router chooses experts from, in the order of their numbers."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `banks`")

    @property
    def top_k(self) -> int:
        """Experts per token, K, which `surgery.set_top_k` changes."""
        return self.router.top_k

    @property
    def router_losses(self) -> tuple:
        """The router losses. `set_router_loss_weight` changes their weights."""
        return self._router_losses

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Raise: a mixture is quantized and has LoRA in its parts."""
        rule = "Call `layer.experts.quantize(mode)` or `layer.experts.enable_lora(rank)`"
        raise NotImplementedError(f"{rule}. Received: the mixture `{self.name}`")

    enable_lora = quantize

    def _build_gate(self, features):
        """Build the router, for tokens of so many features, and the state of the gate."""
        if not self.router.built:
            self.router.build((None, features))
        initial = self.loss_weights_in_force
        self.router_loss_weights = self.add_weight(
            name="router_loss_weights",
            shape=(len(initial),),
            initializer=lambda shape, dtype: ops.array(initial, dtype),
            dtype="float32",
            trainable=False,
            autocast=False,
        )
        self._build_state()

    def _build_state(self):
        """Make the counters, and for each loss a list of its variables."""
        num_experts, zeros = self.router.num_experts, {"initializer": "zeros", "trainable": False}
        dtype = "float32" if self.router.counted_by_weight else "int32"
        sizes = num_experts, len(self.router_losses)
        self._training_counters = Counters.create("", *sizes, dtype)
        self._evaluation_counters = Counters.create("evaluation_", *sizes, dtype)
        self.loss_states = [
            [
                self.add_weight(name=name, shape=shape, dtype=dtype, autocast=False, **zeros)
                for name, (shape, dtype) in loss.state_shapes(num_experts).items()
            ]
            for loss in self.router_losses
        ]

    # A call

    def choose(
        self,
        tokens: Tokens,
        training: bool | None,
        token_ids: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Routing, Tensor]:
        """Return the routing of `Tokens`, and the experts (T, K) that process them, -1 for none.

        Losses are added and the call is counted.
        """
        observers = self.routing_observers
        for observer in observers:
            indices = observer.indices if indices is None else indices
        length = tokens.sequence_length
        context = {"mask": tokens.mask, "sequence_length": length}
        context |= {"token_ids": token_ids, "indices": indices}
        # Without None: Keras scans every argument.
        given = {name: each for name, each in context.items() if each is not None}
        earlier = losses_added(self.router) if training else []
        routing = self.router(tokens.vectors, training=training, is_padding_zero=True, **given)
        experts, num_dropped = routing.indices, None
        if self.capacity is not None:
            limited = sum(bank.num_capacity_limited for bank in self.banks)
            settings = length, training, self._capacity_seed, limited
            experts = self.capacity.drop_excess(routing, *settings)
            num_dropped, share = count_dropped(routing, experts)
            routing = routing._replace(dropped=share)
        is_counted = any(observer.counts for observer in observers) and not in_symbolic_scope()
        if training or is_counted:
            self._add_losses_and_count(routing, num_dropped, length, training, earlier)
        for observer in observers:
            if observer.on_routing is not None:
                observer.on_routing(routing, tokens.values)
        return routing, experts

    def _add_losses_and_count(self, routing, num_dropped, sequence_length, training, earlier):
        """Add the router losses in training, and count this call.

        `earlier` is what the router had added to the loss of the model before this call.
        """
        values = [
            self._compute_loss(loss, variables, routing, sequence_length, training)
            for loss, variables in zip(self._router_losses, self.loss_states)
        ]
        weights = ops.unstack(ops.convert_to_tensor(self.router_loss_weights)) if training else ()
        added = [weight * value for weight, value in zip(weights, values)]
        for loss in added:  # Keras adds it to the other losses, which have this dtype.
            self.add_loss(as_dtype(loss, keras.config.floatx()))
        if added and drops_losses():
            warnings.warn(
                f"The router losses of `{self.name}` are dropped: in training call "
                "`stateless_call` with `return_losses=True`, and add what it returns to the loss.",
                stacklevel=2,
            )
        if training:
            known = set(map(id, earlier))
            added += [loss for loss in losses_added(self.router) if id(loss) not in known]
        counters = self._training_counters if training else self._evaluation_counters
        counters.add(routing, num_dropped, values, added, training)

    def _compute_loss(self, loss, variables, routing, sequence_length, training):
        extra = {"sequence_length": sequence_length} if loss.scope == "sequence" else {}
        if variables:
            # Copies: PyTorch assigns in place, and the gradient may need the old value.
            state = [variable + 0 for variable in variables] if training else None
            value, state = loss.compute(routing, state, **extra)
            for variable, each in zip(variables, state or ()):
                variable.assign(each)
        else:
            value = loss.compute(routing, **extra)
        if value is None:
            rule = f"`{type(loss).__name__}.compute(routing)` must return a number"
            raise TypeError(f"{rule}. Received: None")
        value = ops.convert_to_tensor(value)
        # A vector would be added up silently.
        check_tensors(**{f"{type(loss).__name__}.compute(routing)": (value, "", "float")})
        return value

    # Observers and counts

    def add_observer(self, observer: Observer) -> None:
        """Let an observer see the routings of calls, while anything else refers to it."""
        self.remove_observer(observer)
        # The latest comes first: of nested contexts the inner one replays.
        self._observers = (weakref.ref(observer), *self._observers)

    @property
    def routing_observers(self) -> list[Observer]:
        return [each() for each in self._observers if each() is not None]

    def remove_observer(self, observer: Observer) -> None:
        """Remove an observer, if it is there."""
        others = (each for each in self._observers if each() not in (observer, None))
        self._observers = tuple(others)

    @property
    def expert_counts(self) -> keras.Variable:
        """Assignments (E,) in training; of a router `counted_by_weight` sums of their weights."""
        return self._training_counters.assignments

    def read_counts(self, evaluation: bool = False) -> Counts:
        """Return what the layer has counted so far: a `Counts` of NumPy arrays.

        `reading.since(earlier)` is the difference of two readings.

        Args:
            evaluation: Boolean. Whether to read the counters of evaluations.

        Raises:
            ValueError: If the layer is not built.
        """
        if not self.built:
            rule = "A layer must be built before it has counts; call it on some data first"
            raise ValueError(f"{rule}. Received: `{self.name}`, which is not built")
        return (self._evaluation_counters if evaluation else self._training_counters).read()

    # Weights of the losses

    @property
    def loss_weights_in_force(self) -> list[float]:
        """The current weight of each router loss, a list of floats."""
        if self.built:
            return ops.convert_to_numpy(self.router_loss_weights).tolist()
        return list(self._initial_loss_weights)

    def set_router_loss_weight(self, index: int, weight: float) -> None:
        """Set the weight of a router loss, without recompiling.

        Args:
            index: Integer, the position of the loss in `router_losses`.
            weight: Float of at least 0. Other weights and positions raise a ValueError.
        """
        weights = self.loss_weights_in_force
        check_choice("index", index, range(len(weights)))
        weights[index] = check_number("weight", weight)
        if self.built:
            self.router_loss_weights.assign(weights)
        else:
            self._initial_loss_weights = weights

    # Weights that are saved

    def restart_counters(self) -> None:
        """Make counters and states of the losses again, for another number of experts."""
        counters = *self._training_counters, *self._evaluation_counters
        with names_below(self.path), unlocked(self):
            for variable in [*counters, *sum(self.loss_states, [])]:
                untrack(self, variable)
            self._build_state()

    def save_own_variables(self, store):
        # Without the values, which are reported each epoch and which training does not read.
        for key, variable in self._saved_variables().items():
            store[key] = ops.convert_to_numpy(variable)
        for index, weight in enumerate(self.loss_weights_in_force):
            initial = self.router_losses[index].weight
            store[f"{self._loss_key(index)}_weight"] = np.array([initial, weight], "float32")
        save_draws(self, store)

    def load_own_variables(self, store):
        entries = load_draws(self, store)
        if self.built != ("expert_counts" in entries):
            raise ValueError(
                f"The weights of a mixture must be loaded into a mixture that is built. Received: "
                f"{sorted(entries) or 'no weights'} for `{self.name}`, which is "
                f"{'' if self.built else 'not '}built. `upcycle` converts dense layers."
            )
        for key, variable in self._saved_variables().items():
            # A checkpoint fits a layer with other losses: those keep their own state.
            fits = key in entries and entries[key].shape == tuple(variable.shape)
            if key in ("expert_counts", "dropped_count") or fits:
                variable.assign(entries[key])
        for index, loss in enumerate(self.router_losses):
            initial, weight = entries.get(f"{self._loss_key(index)}_weight", (None, None))
            # A weight set in the constructor wins over one that a schedule left in the file.
            if initial == np.float32(loss.weight):
                self.set_router_loss_weight(index, float(weight))

    def _saved_variables(self):
        if not self.built:
            return {}
        saved = dict(zip(("expert_counts", "dropped_count"), self._training_counters))
        for index, states in enumerate(self.loss_states):
            for number, variable in enumerate(states):
                saved[f"{self._loss_key(index)}_state_{number}"] = variable
        return saved

    def _loss_key(self, index):
        return f"router_loss_{index}_{self.router_losses[index].name}"
