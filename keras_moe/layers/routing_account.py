"""The account that a mixture keeps of its routing: router losses, their weights, and counters."""

import keras
from keras import ops as keras_ops

from keras_moe import losses, ops
from keras_moe._internal.named_arguments import Saved
from keras_moe._internal.validation import (
    check_flag,
    check_not_negative,
    check_text,
    is_whole,
    shortened,
)
from keras_moe.backend import backend
from keras_moe.losses.router_loss import check_is_loss, check_value


class RoutingAccount(Saved, keras.layers.Layer):
    """Abstract: a layer with a `router`, which adds its losses and counts the assignments.

    Attributes:
        router_losses: tuple of `losses.RouterLoss`.
        expert_counts: weight (E,), assignments of each expert in training since the last
            `reset_counts`. The other counters are `dropped_count`, `router_loss_totals`,
            `router_entropy_total` and `call_count`.
        resets: how often `reset_counts` has set them back, so that readers can tell.
        counts_in_evaluation: whether evaluation counts as well, which
            `inspection.count_in_evaluation` turns on. Otherwise inference writes to no weight.
        last_counts, last_losses: arrays of the counts (E,) and of the mean of each router loss, of
            the last epoch after which `callbacks.ExpertMonitor` has reset the counters. The counts
            are saved.
    """

    _attribute_checks = {
        "router_losses": lambda name, value: tuple(losses.get(loss) for loss in _as_list(value)),
        "counts_in_evaluation": check_flag,
    }
    _fixed_attributes: tuple[str, ...] = ("router_losses",)

    router_losses: tuple
    counts_in_evaluation = False
    last_counts = None
    last_losses = None
    resets = 0
    # Losses, and the weights that they were given before the layer is built.
    _early_loss_weights: tuple = ((), [])

    def _build_account(self, num_experts):
        num_losses = len(self.router_losses)
        initial = self.loss_weights_in_force
        self.router_loss_weights = self.add_weight(
            name="router_loss_weights",
            shape=(num_losses,),
            initializer=lambda shape, dtype: keras_ops.array(initial, dtype),
            dtype="float32",
            trainable=False,
            autocast=False,
        )
        self.expert_counts = self._counter("expert_counts", (num_experts,))
        self.dropped_count = self._counter("dropped_count", ())
        self.router_loss_totals = self._counter("router_loss_totals", (num_losses,))
        self.router_entropy_total = self._counter("router_entropy_total", ())
        self.call_count = self._counter("call_count", ())
        self._build_losses()

    def _build_losses(self):
        """Build the losses; stateful ones are copied, one per layer, and have weights in it."""
        built, self.loss_states = [], []
        for loss in self.router_losses:
            before = {id(variable) for variable in self.variables}
            of_layer = loss.build(self)
            check_is_loss(of_layer, f"`{type(loss).__name__}.build`")
            for each in (loss, of_layer):
                each.note_copied()
            built.append(of_layer)
            self.loss_states.append(
                [variable for variable in self.variables if id(variable) not in before]
            )
        self.router_losses = tuple(built)

    def _counter(self, name, shape):
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

    def _account(self, routing, sequence_length, training):
        """Add the losses and count, as `callbacks.ExpertMonitor` will report."""
        if training or self.counts_in_evaluation:
            values = []
            for index, loss in enumerate(self.router_losses):
                extra = {"sequence_length": sequence_length} if loss.per_sequence else {}
                compute = loss.compute if training else loss.evaluate
                values.append(check_value(loss, compute(routing, **extra)))
                if training:
                    weighted = self.router_loss_weights[index] * values[-1]
                    # Keras adds it to the other losses, which have this dtype.
                    self.add_loss(keras_ops.cast(weighted, keras.config.floatx()))
            self._count(routing, values, training)

    def _count(self, routing, loss_values, training):
        own_counts = keras_ops.cast(routing.counts, "float32")
        counted = [
            (self.expert_counts, own_counts),
            (self.dropped_count, routing.dropped * keras_ops.sum(own_counts)),
            (self.router_entropy_total, ops.router_entropy(routing)),
            (self.call_count, backend.after(own_counts, keras_ops.ones((), "float32"))),
        ]
        if loss_values:
            counted.append((self.router_loss_totals, keras_ops.stack(loss_values)))
        counters, values = zip(*counted)
        if training:  # A process may evaluate alone, and would wait for the others.
            values = backend.sum_of_counts(values)
        for counter, value in zip(counters, values):
            counter.assign_add(value)

    @property
    def loss_weights_in_force(self):
        """The weight that each router loss has now, a list of floats."""
        if not self.built:
            early_losses, weights = self._early_loss_weights
            if early_losses and early_losses == self.router_losses:
                return list(weights)
            return [loss.weight for loss in self.router_losses]
        return keras_ops.convert_to_numpy(self.router_loss_weights).tolist()

    def balance_advice(self):
        """What to try where the experts' load is uneven, by what balances it in this layer."""
        weighted = zip(self.router_losses, self.loss_weights_in_force)
        advice = [loss.balance_advice(weight) for loss, weight in weighted if loss.balances]
        by_router = self.router.balance_advice()
        if by_router is not None:
            advice.append(by_router)
        for text in advice:
            check_text("balance_advice(...)", text)
        if not advice:
            advice.append(
                "Nothing balances the load: add `losses.LoadBalance()` to its `router_losses`."
            )
        elif by_router is None:
            advice.append(
                "A selection bias balances without a loss: see `balancer` of `TopKRouter`."
            )
        return (
            f"{' '.join(advice)} If the features of the layer's inputs have means far from zero, "
            "centre them, by `keras.layers.Normalization` or `BatchNormalization` before the "
            "layer. A lower learning rate in the first steps and `logit_noise` in the router help "
            "as well."
        )

    def set_router_loss_weight(self, index, weight):
        """Give a loss of the layer another weight. Nothing is compiled again.

        Args:
            index: which of the `router_losses`.
            weight: number of at least 0.

        Raises:
            ValueError: If there is no such loss, or the weight is negative or not finite.
        """
        weight = check_not_negative("weight", weight)
        if not is_whole(index) or not 0 <= index < len(self.router_losses):
            raise ValueError(
                "`index` must be the place of a loss in `router_losses`. Received: "
                f"index={shortened(index)} for {shortened(self.router_losses)}. Count from 0."
            )
        weights = self.loss_weights_in_force
        weights[index] = weight
        if self.built:
            self.router_loss_weights.assign(weights)
        else:
            self._early_loss_weights = (self.router_losses, weights)

    def reset_counts(self):
        """Set everything that was counted back to zero; before the layer is built nothing was."""
        if not self.built:
            return
        self.resets += 1
        for counter in (
            self.expert_counts,
            self.dropped_count,
            self.router_loss_totals,
            self.router_entropy_total,
            self.call_count,
        ):
            counter.assign(keras_ops.zeros(counter.shape))


def _as_list(router_losses):
    if not isinstance(router_losses, (list, tuple)):
        raise TypeError(
            "`router_losses` must be a list or tuple of losses or names. Received: "
            f"router_losses={shortened(router_losses)} (of type {type(router_losses).__name__}). "
            "Pass, for example, `[losses.LoadBalance(0.01)]`, or `()` for none."
        )
    return list(router_losses)
