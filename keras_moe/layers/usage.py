"""Router losses and usage counters of a layer with a router."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import losses
from keras_moe._internal.checks import check_number
from keras_moe._internal.keras_internals import drops_losses
from keras_moe._internal.serialization import load_draws, save_draws
from keras_moe.backend import backend
from keras_moe.ops.balance import router_entropy

_COUNTERS = (
    *("expert_counts", "dropped_count"),
    *("router_loss_totals", "router_entropy_total", "call_count"),
)


# Messages for attributes that a layer lacks.
_MISSING = dict.fromkeys(_COUNTERS, "A layer must be built, by a call, before it has counts")
_MISSING["enable_lora"] = "LoRA is enabled in the bank: `layer.experts.enable_lora(rank)`"

# PyTorch's modules find their sublayers by it.
_other_attribute = getattr(keras.Layer, "__getattr__", object.__getattribute__)


class RouterUsage(keras.layers.Layer):
    """Abstract: a layer with a `router` that adds router losses and counts assignments.

    Attributes:
        router_losses: Tuple of `losses.RouterLoss`.
        expert_counts: Weight (E,). Assignments of each expert in training since the last
            `reset_counts`. The other counters are `dropped_count`, `router_loss_totals`,
            `router_entropy_total` and `call_count`.
        resets: Integer. Number of calls of `reset_counts`; readers compare it to notice a reset.
        counts_in_evaluation: Boolean. Whether evaluation counts as well, which
            `inspection.count_in_evaluation` turns on. Otherwise inference writes to no weight.
        last_counts, last_losses: Arrays. The counts (E,), which are saved, and the mean of each
            router loss before the last reset by `callbacks.ExpertMonitor`.
    """

    expert_counts: Any
    router_losses: tuple
    counts_in_evaluation = False
    last_counts = None
    last_losses = None
    resets = 0
    # A function of a routing and the tokens, which `inspection` sets to record them.
    routing_listener: Any = None
    # Weights of the losses that were set before the layer was built.
    _early_loss_weights: Any = None

    def __getattr__(self, name):
        if name in _MISSING:
            raise AttributeError(_MISSING[name])
        return _other_attribute(self, name)

    def _build_usage(self, num_experts):
        initial = self.loss_weights_in_force
        losses_shape = (len(self.router_losses),)
        self.router_loss_weights = self.add_weight(
            name="router_loss_weights",
            shape=losses_shape,
            initializer=lambda shape, dtype: ops.array(initial, dtype),
            dtype="float32",
            trainable=False,
            autocast=False,
        )
        shapes = {"expert_counts": (num_experts,), "router_loss_totals": losses_shape}
        for name in _COUNTERS:
            setattr(self, name, counter(name, shapes.get(name, ())))
        self._build_losses()

    def _build_losses(self):
        """Add the variables of each loss, a list for each: the state is the layer's."""

        def add(name, shape, dtype):
            state = {"initializer": "zeros", "trainable": False, "autocast": False}
            return self.add_weight(name=name, shape=shape, dtype=dtype, **state)

        number = self.experts.num_experts
        self.loss_states = [
            [add(name, *each) for name, each in loss.state_shapes(number).items()]
            for loss in self.router_losses
        ]

    def _account(self, tokens, routing, sequence_length, training):
        """Add losses and count assignments in training, and call the listener."""
        if training or self.counts_in_evaluation:
            self._add_losses_and_count(routing, sequence_length, training)
        if self.routing_listener is not None:
            self.routing_listener(routing, tokens)

    def _add_losses_and_count(self, routing, sequence_length, training):
        values = []
        for index in range(len(self.router_losses)):
            values.append(self._compute_loss(index, routing, sequence_length, training))
            if training:
                weighted = self.router_loss_weights[index] * values[-1]
                # Keras adds it to the other losses, which have this dtype.
                self.add_loss(ops.cast(weighted, keras.config.floatx()))
        if training and values and drops_losses():
            warnings.warn(
                f"The router losses of `{self.name}` are dropped: in training call "
                "`stateless_call` with `return_losses=True`, and add what it returns to the loss.",
                stacklevel=2,
            )
        counts = ops.cast(routing.counts, "float32")
        added = [
            counts,
            routing.dropped * ops.sum(counts),
            ops.stack(values) if values else ops.zeros((0,), "float32"),
            router_entropy(routing),
            backend.control_dependency(counts, ops.ones((), "float32")),
        ]
        if training:  # A process may evaluate alone, and would wait for the others.
            added = backend.sum_of_counts(added)
        for name, value in zip(_COUNTERS, added):
            getattr(self, name).assign_add(value)

    def _compute_loss(self, index, routing, sequence_length, training):
        loss, variables = self.router_losses[index], self.loss_states[index]
        extra = {"sequence_length": sequence_length} if loss.scope == "sequence" else {}
        if not variables:
            return _scalar(loss, loss.compute(routing, **extra))
        # Copies: PyTorch assigns in place, and the gradient may need the old value.
        state = [variable + 0 for variable in variables] if training else None
        value, state = loss.compute(routing, state, **extra)
        for variable, each in zip(variables, state or ()):
            variable.assign(each)
        return _scalar(loss, value)

    @property
    def loss_weights_in_force(self) -> list[float]:
        """The present weight of each router loss, a list of floats."""
        if self.built:
            return ops.convert_to_numpy(self.router_loss_weights).tolist()
        return list(self._early_loss_weights or [loss.weight for loss in self.router_losses])

    def set_router_loss_weight(self, index: int | str, weight: float) -> None:
        """Set the weight of a router loss. Nothing is compiled again.

        Args:
            index: Integer, the place of the loss in `router_losses`, or its name for `losses.get`.
            weight: Float of at least 0.

        Raises:
            ValueError: If there is no such loss, or the weight is negative or not finite.
        """
        weights = self.loss_weights_in_force
        names = [each.name for each in self.router_losses]
        place: Any = index
        if isinstance(index, str):
            name = losses.get(index).name if index in losses.IDENTIFIERS else index
            place = names.index(name) if name in names else None
        if place not in range(-len(names), len(names)):
            rule = f"`index` must be the place or the name of one of the router losses {names}"
            raise ValueError(f"{rule}. Received: index={index!r}")
        weights[place] = check_number("weight", weight)
        if self.built:
            self.router_loss_weights.assign(weights)
        else:
            self._early_loss_weights = weights

    def reset_counts(self) -> None:
        """Set all counters to zero."""
        if not self.built:
            return
        self.resets += 1
        for name in _COUNTERS:
            variable = getattr(self, name)
            variable.assign(ops.zeros(variable.shape))

    def save_own_variables(self, store):
        # Without the totals that `ExpertMonitor` resets each epoch and that training does not read.
        for key, variable in self._saved_variables().items():
            store[key] = ops.convert_to_numpy(variable)
        for index, weight in enumerate(self.loss_weights_in_force):
            initial = self.router_losses[index].weight
            store[f"{self._loss_key(index)}_weight"] = np.array([initial, weight], "float32")
        if self.last_counts is not None:
            store["last_counts"] = self.last_counts
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
            if key in ("expert_counts", "dropped_count") or _fits(variable, entries.get(key)):
                variable.assign(entries[key])
        for index, loss in enumerate(self.router_losses):
            initial, weight = entries.get(f"{self._loss_key(index)}_weight", (None, None))
            # A weight set in the constructor wins over one that a schedule left in the file.
            if initial == np.float32(loss.weight):
                self.set_router_loss_weight(index, float(weight))
        counts = entries.get("last_counts")
        has_counts = self.built and _fits(self.expert_counts, counts)
        self.last_counts = np.asarray(counts) if has_counts else None
        self.last_losses = None

    def _saved_variables(self):
        if not self.built:
            return {}
        saved = {each.name: each for each in (self.expert_counts, self.dropped_count)}
        for index, states in enumerate(self.loss_states):
            for number, variable in enumerate(states):
                saved[f"{self._loss_key(index)}_state_{number}"] = variable
        return saved

    def _loss_key(self, index):
        return f"router_loss_{index}_{self.router_losses[index].name}"


def counter(name, shape):
    """A variable (shape) that counts, float32."""
    # Under `tf.distribute` each replica counts alone, and reading gives the sum, which
    # `add_weight` cannot express.
    return keras.Variable(
        "zeros",
        shape=shape,
        dtype="float32",
        trainable=False,
        autocast=False,
        aggregation="sum",
        synchronization="on_read",
        name=name,
    )


def _scalar(loss, value):
    """The value of a loss, which may be user-defined: a vector would be added up silently."""
    value = ops.convert_to_tensor(value)
    if len(value.shape) or not keras.backend.is_float_dtype(value.dtype):
        raise ValueError(
            "A router loss must compute one float. Received: a tensor of shape "
            f"{tuple(value.shape)} and dtype {value.dtype} from `{type(loss).__name__}`"
        )
    return value


def _fits(variable, entry):
    return entry is not None and tuple(entry.shape) == tuple(variable.shape)
