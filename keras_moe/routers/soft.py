"""Nothing is chosen: experts run on mixtures of tokens."""

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_integer
from keras_moe.ops import plan_soft, soft_routing
from keras_moe.ops.scores import along_units, unit
from keras_moe.routers.logit_router import LogitRouter


@register
class SoftRouter(LogitRouter):
    """Each expert serves a few slots of each sequence, each a weighted mean of its tokens.

    Everything is differentiable and no token is dropped, whatever the number of experts; the cost
    is that of `num_experts * slots` tokens a sequence. Each output depends on the whole sequence:
    not for language models. Inputs (batch, D) are one sequence: there an output depends on the
    whole batch, in `predict` too.

    Args:
        num_experts: number of experts, E.
        slots: slots of each expert for each sequence, P.
        **kwargs: `input_jitter`, `logit_noise`, `kernel_initializer`, `kernel_regularizer` and
            `seed`, as in `TopKRouter`, and `name`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        sequence_length: tokens in each sequence. None: all are one.
        training: whether noise is drawn.

    Returns:
        An `ops.Routing` that names for each token the one expert it takes most from; all serve it.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts, router="soft")
    >>> layer(keras.random.normal((2, 10, 16))).shape
    (2, 10, 16)

    Reference: Puigcerver et al. 2023 (arXiv:2308.00951), eq. 1 to 3 and, for the unit norms and the
    scale, section 2.3.
    """

    causal = False
    default_losses = ()
    takes_capacity = False
    normalizes_kernel = True

    _attribute_checks = {"slots": check_positive_integer}
    _fixed_attributes = ("slots",)

    def __init__(self, num_experts=None, slots=1, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.slots = slots
        self.top_k = 1

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")

    def kernel_shape(self, features):
        return features, self._num_logits()

    def _num_logits(self):
        return self.num_experts * self.slots

    def project(self, tokens):
        return along_units(tokens, self.scale * unit(self.kernel, axis=0))

    def route(self, tokens, mask, training, sequence_length=None):
        logits, mask = self.checked_logits(tokens, mask, training)
        return soft_routing(logits, self.num_experts, mask, sequence_length)

    def plan(self, routing, **capacity):
        self.check_no_capacity(capacity)
        return plan_soft(routing)

    def get_config(self):
        return {**super().get_config(), "slots": self.slots}
