"""What routers that give each token its K best experts have in common."""

from functools import partial
from typing import Any

import keras
from keras import ops

from keras_moe._internal.named_arguments import check_config
from keras_moe._internal.shape_checks import check_shapes
from keras_moe._internal.validation import (
    check_choice,
    check_flag,
    check_method,
    check_positive_integer,
    check_positive_number,
    optional,
)
from keras_moe.backend import backend
from keras_moe.ops.routing import top_k_routing
from keras_moe.ops.scores import SCORES
from keras_moe.ops.selection import existing, top_k_indices
from keras_moe.routers import balancers
from keras_moe.routers.logit_router import LogitRouter


class SelectionRouter(LogitRouter):
    """Abstract: scores, an optional selection bias, and the best experts by their sum.

    The bias affects which experts are chosen, never their weights. A subclass may override
    `select(scores)`.

    Args:
        num_experts: number of experts, E.
        top_k: experts per token, K, from 1 to E.
        score: "softmax", "sigmoid" or "sqrt_softplus".
        renormalize: whether the weights of a token are divided by their sum. None: if K > 1.
        scaling_factor: what all weights are multiplied by.
        balancer: "loss_free", "quantile" or a balancer object, which moves the selection bias (E,)
            in training so that the load evens out. None: there is no selection bias.
        use_bias: whether a learned bias (E,) is added to the logits.
    """

    _attribute_checks = {
        "top_k": check_positive_integer,
        "score": partial(check_choice, choices=SCORES),
        "renormalize": partial(check_flag, optional=True),
        "scaling_factor": check_positive_number,
        "use_bias": check_flag,
        "balancer": optional(lambda name, value: balancers.get(value)),
        "updates_selection_bias": check_flag,
    }
    _fixed_attributes: tuple[str, ...] = ("use_bias", "balancer")

    def __init__(
        self,
        num_experts=None,
        top_k=2,
        score="softmax",
        renormalize=None,
        scaling_factor=1.0,
        balancer=None,
        use_bias=False,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_method(self, "select", "scores")
        self.top_k = top_k
        self.score = score
        self.renormalize = renormalize
        self.scaling_factor = scaling_factor
        self.use_bias = use_bias
        self.bias: Any = None
        self.balancer: Any = balancer
        if self.balancer is not None:
            # No loss should work against the task.
            self.default_losses = ()
        self.selection_bias: Any = None
        # Set to False to freeze the bias alone; `trainable` freezes all of the router.
        self.updates_selection_bias = True

    def build(self, tokens_shape):
        super().build(tokens_shape)
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.num_experts,), initializer="zeros")
        if self.balancer is not None:
            state = {"initializer": "zeros", "trainable": False, "shape": (self.num_experts,)}
            self.selection_bias = self.add_weight(name="selection_bias", **state)
            self._measured = self.add_weight(name="measured", **state)
            self._measurements = self.add_weight(
                name="measurements", **{**state, "shape": (), "dtype": "int32"}
            )

    def _made_by_build(self):
        names = {"bias": self.use_bias, "selection_bias": self.balancer is not None}
        return [*super()._made_by_build(), *(name for name, is_used in names.items() if is_used)]

    @property
    def shift_invariant(self):
        return self.score == "softmax"

    def balance_advice(self):
        return None if self.balancer is None else self.balancer.balance_advice()

    def select(self, scores):
        """Indices (T, K) of the experts with the best scores (T, E)."""
        return top_k_indices(scores, self.top_k)

    def route(self, tokens, mask, training, indices=None):
        logits, mask = self.checked_logits(tokens, mask, training)
        if self.use_bias:
            logits = logits + self.bias
        if indices is not None:
            indices = existing(ops.cast(indices, "int32"), self.num_experts)
            return self._weigh(logits, mask, lambda scores: indices)
        if self.balancer is None:
            return self._weigh(logits, mask, self.select)
        routing = self._weigh(
            logits, mask, lambda scores: self.select(scores + self.selection_bias)
        )
        if training and self.trainable and self.updates_selection_bias:
            self._balance(routing)
        return routing

    def _weigh(self, logits, mask, select):
        return top_k_routing(
            logits, self.top_k, mask, self.score, self.renormalize, self.scaling_factor, select
        )

    def _balance(self, routing):
        scores = ops.stop_gradient(SCORES[self.score](routing.logits))
        old_bias = ops.convert_to_tensor(self.selection_bias)
        measured = self.balancer.measure(routing, scores, old_bias)
        check_shapes({"balancer.measure(...)": (measured, "E", "float")}, E=self.num_experts)
        # Replicas and micro-batches of one optimizer step are one batch.
        replicas = backend.num_replicas()
        measured = self._measured + backend.sum_over_replicas(measured)
        count = self._measurements + replicas
        is_last = count >= self.balancer.accumulation_steps * replicas
        mean = measured / ops.cast(count, "float32")
        new_bias = self.balancer.update(old_bias, mean)
        check_shapes({"balancer.update(...)": (new_bias, "E", "float")}, E=self.num_experts)
        self.selection_bias.assign(ops.where(is_last, new_bias, old_bias))
        self._measured.assign(ops.where(is_last, 0.0, measured))
        self._measurements.assign(backend.after(measured, ops.where(is_last, 0, count)))

    @classmethod
    def from_config(cls, config):
        config = dict(check_config(cls, config))
        updates = config.pop("updates_selection_bias", True)
        router = super().from_config(config)
        router.updates_selection_bias = updates
        return router

    def get_config(self):
        balancer = self.balancer
        frozen = {} if self.updates_selection_bias else {"updates_selection_bias": False}
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "score": self.score,
            "renormalize": self.renormalize,
            "scaling_factor": self.scaling_factor,
            "use_bias": self.use_bias,
            "balancer": balancer and keras.saving.serialize_keras_object(balancer),
            **frozen,
        }
