"""Routers that give each token its K best experts."""

import math
from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import reseeded
from keras_moe._internal.checks import check_choice, check_integer, check_number, check_tensors
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.ops.routing import Routing, weigh
from keras_moe.ops.selection import (
    SCORES,
    chosen_experts,
    cosine_logits,
    l2_normalize,
    take_scores,
    top_k_indices,
)
from keras_moe.routers import balancers
from keras_moe.routers.logit_router import LogitRouter


@register
class TopKRouter(LogitRouter):
    """Each token goes to the `top_k` experts with the highest scores.

    With `top_k=1` the combine weight is the score itself, as in Switch Transformer
    (arXiv:2101.03961). With more, the chosen scores are divided by their sum, as in Mixtral
    (arXiv:2401.04088).

    A subclass may override `project(tokens)` for other logits, or `select(scores)` for a different
    choice.

    Args:
        top_k: Integer. Experts per token, K, at most E. With a single expert it becomes 1.
        score: "softmax", "sigmoid" or "sqrt_softplus".
        renormalize: Boolean. Whether the weights of a token are divided by their sum. None: if K >
            1. With softmax, K = 1 and True, all weights are 1: only router losses train the router.
        scaling_factor: Float. All weights are multiplied by it.
        balancer: "loss_free", "quantile", or a `LossFreeBias` or `QuantileBias`, which balance the
            load without a loss: their `selection_bias` (E,) is added to the scores to choose
            experts, never to their weights. None: no such bias.
        use_bias: Boolean. Whether a learned bias (E,) is added to the logits, as in gpt-oss.
        updates_selection_bias: Boolean. Whether training changes `selection_bias`. It may be set as
            an attribute, as `trainable`: compile the model afterwards.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=8, top_k=2)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> routing.indices.shape, routing.probs.shape
    ((32, 2), (32, 8))
    """

    replays_indices = True
    surgeries: tuple = ("cut", "merge", "copy")
    changeable_arguments = ("updates_selection_bias",)

    def __init__(
        self,
        num_experts: int | None = None,
        top_k: int = 2,
        score: str = "softmax",
        renormalize: bool | None = None,
        scaling_factor: float = 1.0,
        balancer: str | balancers.SelectionBalancer | None = None,
        use_bias: bool = False,
        updates_selection_bias: bool = True,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.score = check_choice("score", score, SCORES)
        self.renormalize = renormalize if renormalize is None else bool(renormalize)
        self.scaling_factor = check_number("scaling_factor", scaling_factor, above=0)
        self.balancer = None if balancer is None else balancers.get(balancer)
        if self.balancer is not None:
            # No loss should work against the task.
            self.default_losses = ()
        self.use_bias = bool(use_bias)
        self.bias: Any = None
        self.selection_bias: Any = None
        self.updates_selection_bias = bool(updates_selection_bias)
        self.check_num_experts()

    def build(self, tokens_shape):
        super().build(tokens_shape)
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.num_experts,), initializer="zeros")
        if self.balancer is not None:
            state: dict = {"initializer": "zeros", "trainable": False, "shape": (self.num_experts,)}
            self.selection_bias = self.add_weight(name="selection_bias", **state)
            self._measured = self.add_weight(name="measured", **state)
            state |= {"shape": (), "dtype": "int32"}
            self._measurements = self.add_weight(name="measurements", **state)

    @property
    def shift_invariant(self):
        return self.score == "softmax"

    def balance_advice(self):
        return None if self.balancer is None else self.balancer.advice()

    def select(self, scores: Tensor) -> Tensor:
        """Return indices (T, K) of the experts with the best scores (T, E)."""
        return top_k_indices(scores, self.top_k)

    def route(self, tokens, mask, training, indices=None, **context):
        logits = self.logits(tokens, training)
        if self.use_bias:
            logits = logits + self.bias
        scores = SCORES[self.score](logits)
        if indices is None:
            biased = scores if self.selection_bias is None else scores + self.selection_bias
            indices = ops.convert_to_tensor(self.select(ops.stop_gradient(biased)))
        weights, probs = weigh(
            indices, logits, scores, self.score, self.renormalize, self.scaling_factor
        )
        return Routing(indices, weights, probs, logits, mask)

    def update(self, routing):
        if self.balancer is None or not self.updates_selection_bias:
            return
        scores = ops.stop_gradient(SCORES[self.score](routing.logits))
        old_bias = ops.convert_to_tensor(self.selection_bias)
        measured = self.balancer.measure(routing, scores, old_bias)
        check_tensors({"E": self.num_experts}, **{"balancer.measure(...)": (measured, "E")})
        # Replicas and micro-batches of one optimizer step are one batch.
        replicas = backend.devices.num_replicas()
        measured = self._measured + backend.devices.sum(measured)
        count = self._measurements + replicas
        is_last = count >= self.balancer.accumulation_steps * replicas
        mean = measured / ops.cast(count, "float32")
        new_bias = self.balancer.update(old_bias, mean)
        check_tensors({"E": self.num_experts}, **{"balancer.update(...)": (new_bias, "E")})
        self.selection_bias.assign(ops.where(is_last, new_bias, old_bias))
        self._measured.assign(ops.where(is_last, 0.0, measured))
        self._measurements.assign(
            backend.control_dependency(measured, ops.where(is_last, 0, count))
        )


@register
class CosineRouter(TopKRouter):
    """Logits are cosines between a projection of the token and a direction of each expert.

    `logits = scale * cos(x W, direction_e)` with a learned scale that starts at 2 and is at most
    100. Norms are ignored, which keeps tokens from clustering around the expert directions.

    Args:
        projection_dim: Integer. Width of the projection.

    Other arguments, errors, call arguments and returns: as for `TopKRouter`.

    Reference: Chi et al. 2022, X-MoE (arXiv:2204.09179), eq. 5 and 6; scale and cap as in Tutel.
    """

    normalizes_kernel = True

    def __init__(self, num_experts: int | None = None, *, projection_dim: int = 256, **kwargs: Any):
        super().__init__(num_experts, **kwargs)
        self.projection_dim = check_integer("projection_dim", projection_dim)

    def build(self, tokens_shape):
        super().build(tokens_shape)
        shape, initializer = (self.projection_dim, self.num_experts), self.kernel_initializer
        self.directions = self._add_kernel("directions", shape, reseeded(initializer, 1))
        self.log_scale = self.add_weight(
            name="log_scale", shape=(), initializer=keras.initializers.Constant(math.log(2.0))
        )

    def kernel_shape(self, features):
        return features, self.projection_dim

    def project(self, tokens):
        scale = ops.exp(ops.minimum(self.log_scale, math.log(100.0)))
        directions = scale * l2_normalize(self.directions, axis=0)
        return cosine_logits(super().project(tokens), directions)


@register
class GroupLimitedRouter(TopKRouter):
    """Each token goes to the best experts in its best groups of experts.

    If each group of neighbouring experts is on one device, a token goes to few devices. The score
    of a group is the sum of its two best scores, bias included.

    Args:
        num_groups: Integer. Number of groups; divides E.
        top_groups: Integer. Groups from which a token may choose, of at least `top_k` experts.

    Other arguments, errors, call arguments and returns: as for `TopKRouter`.

    Reference: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, node-limited routing; DeepSeek-V2
    (arXiv:2405.04434) takes the best expert of a group instead of the sum of two.
    """

    def __init__(
        self,
        num_experts: int | None = None,
        *,
        num_groups: int = 4,
        top_groups: int = 2,
        top_k: int = 2,
        score: str = "sigmoid",
        **kwargs: Any,
    ):
        super().__init__(None, top_k, score, **kwargs)
        self.num_groups = check_integer("num_groups", num_groups)
        self.top_groups = check_integer("top_groups", top_groups)
        if num_experts is not None:
            self.bind(num_experts)

    def check_num_experts(self):
        super().check_num_experts()
        number = self.num_experts
        if number is None:
            return
        in_groups = self.top_groups * number // self.num_groups
        if number % self.num_groups or not self.top_k <= in_groups <= number:
            raise ValueError(
                "`num_groups` must divide `num_experts`, and `top_groups` of them hold at least "
                f"`top_k` experts. Received: num_experts={number}, num_groups={self.num_groups}, "
                f"top_groups={self.top_groups}, top_k={self.top_k}"
            )

    def select(self, scores):
        scores = _group_limited_scores(scores, self.num_groups, self.top_groups)
        return top_k_indices(scores, self.top_k)


@backend.jit_when_eager
def _group_limited_scores(scores, num_groups, top_groups):
    """Scores (T, E), minus infinity for the experts outside a token's best groups.

    A group is as good as the sum of its two best experts. DeepSeek-V3 (arXiv:2412.19437),
    section 2.1.2, there called nodes. Not zero: an expert bias makes scores negative, and an
    excluded expert would beat one of the best groups.
    """
    size = scores.shape[-1] // num_groups
    grouped = ops.reshape(scores, (-1, size))
    best = top_k_indices(grouped, min(2, size))
    of_groups = ops.sum(take_scores(grouped, best), axis=-1)
    chosen = top_k_indices(ops.reshape(of_groups, (-1, num_groups)), top_groups)
    is_in_best = ops.repeat(chosen_experts(chosen, num_groups), size, axis=1)
    return ops.where(is_in_best, scores, float("-inf"))
