"""Routers whose tokens do not choose: all experts serve, experts choose, or slots mix tokens."""

from typing import Any

from keras import ops

from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import register
from keras_moe.ops.expert_choice import expert_choice_routing
from keras_moe.ops.routing import _make_routing
from keras_moe.ops.scores import cosine_logits, l2_normalize, softmax
from keras_moe.ops.soft import soft_routing
from keras_moe.routers.logit_router import LogitRouter


@register
class DenseRouter(LogitRouter):
    """All experts serve each token, weighted by a softmax: `y = sum_e p_e f_e(x)`.

    The best choice for a handful of small experts. A `TopKRouter` with `top_k=num_experts` computes
    the same from the same weights, and can choose fewer later.

    Arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.

    References: Jacobs et al. 1991, "Adaptive mixtures of local experts"; Jordan and Jacobs 1994,
    "Hierarchical mixtures of experts and the EM algorithm".
    """

    default_losses = ()
    serves_all = True
    counted_by_weight = True

    @property  # type: ignore[misc]
    def top_k(self) -> int:
        """All experts."""
        return self.num_experts

    def route(self, tokens, mask, training, **context):
        logits, mask = self.logits(tokens, mask, training)
        probs = softmax(logits)
        experts = ops.arange(self.num_experts, dtype="int32")
        indices = ops.broadcast_to(experts, ops.shape(probs))
        return _make_routing(indices, probs, probs, logits, mask)


@register
class ExpertChoiceRouter(LogitRouter):
    """Each expert takes the same number of best tokens of each sequence.

    The load is balanced by construction and needs no loss. A token is served by any number of
    experts, perhaps by none. A token's experts depend on later tokens: a language model would see
    the future in training. Inputs (batch, D) are one sequence, in `predict` too.

    Args:
        capacity_factor: Float above 0. Experts per token on average. An expert takes
            `ceil(capacity_factor * S / E)` of the S real tokens of a sequence.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`. K
    is E: place e is expert e, or -1 if it did not choose the token.

    Example:

    >>> router = keras_moe.routers.ExpertChoiceRouter(num_experts=8, capacity_factor=2.0)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> keras.ops.convert_to_numpy(routing.counts).tolist()
    [8, 8, 8, 8, 8, 8, 8, 8]

    Reference: Zhou et al. 2022 (arXiv:2202.09368), section 3.2.
    """

    causal = False
    default_losses = ()
    tokens_choose = False

    def __init__(self, num_experts: int | None = None, capacity_factor: float = 2.0, **kwargs: Any):
        super().__init__(num_experts, **kwargs)
        self.capacity_factor = check_number("capacity_factor", capacity_factor, above=0)

    @property  # type: ignore[misc]
    def top_k(self) -> int:
        """All experts, each of which may choose the token."""
        return self.num_experts

    @property
    def mean_top_k(self):
        return min(self.capacity_factor, self.num_experts)

    def route(self, tokens, mask, training, sequence_length=None, **context):
        logits, mask = self.logits(tokens, mask, training)
        return expert_choice_routing(logits, self.capacity_factor, mask, sequence_length)

    def get_config(self):
        return {**super().get_config(), "capacity_factor": self.capacity_factor}


@register
class SoftRouter(LogitRouter):
    """Each expert serves a few slots of each sequence, each a weighted mean of its tokens.

    Everything is differentiable and no token is dropped; the experts compute `num_experts * slots`
    rows a sequence. Each output depends on the whole sequence: not for language models. Inputs
    (batch, D) are one sequence, in `predict` too.

    Args:
        slots: Integer. Slots of each expert for each sequence, P.

    Other arguments, errors, call arguments and returns: as for `LogitRouter`, without `indices`.
    The routing names for each token the one expert it takes most from; all serve it.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts, router="soft")
    >>> layer(keras.random.normal((2, 10, 16))).shape
    (2, 10, 16)

    Reference: Puigcerver et al. 2023 (arXiv:2308.00951), eq. 1 to 3 and, for the unit norms and the
    scale, section 2.3.
    """

    top_k = 1
    causal = False
    default_losses = ()
    tokens_choose = False

    def __init__(self, num_experts: int | None = None, slots: int = 1, **kwargs: Any):
        super().__init__(num_experts, **kwargs)
        self.slots = check_integer("slots", slots)

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")

    def kernel_shape(self, features):
        return features, self.num_experts * self.slots

    def project(self, tokens):
        return cosine_logits(tokens, self.scale * l2_normalize(self.kernel, axis=0))

    def route(self, tokens, mask, training, sequence_length=None, **context):
        logits, mask = self.logits(tokens, mask, training)
        return soft_routing(logits, self.num_experts, mask, sequence_length)

    def get_config(self):
        return {**super().get_config(), "slots": self.slots}
