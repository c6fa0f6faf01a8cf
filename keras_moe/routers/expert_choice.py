"""Experts choose tokens."""

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_number
from keras_moe.ops import expert_choice_routing, plan_expert_choice
from keras_moe.routers.logit_router import LogitRouter


@register
class ExpertChoiceRouter(LogitRouter):
    """Each expert takes the same number of best tokens of each sequence.

    The load is balanced by construction and needs no loss. A token is served by any number of
    experts, perhaps by none. Because tokens compete, a token's experts depend on later tokens: a
    language model would see the future in training. Inputs (batch, D) are one sequence: there an
    output depends on the whole batch, in `predict` too.

    Args:
        num_experts: number of experts, E.
        capacity_factor: experts per token on average, positive. An expert takes
            `ceil(capacity_factor * S / E)` of the S real tokens of a sequence.
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
        An `ops.Routing` whose K is E: place e is expert e, or -1 if it did not choose the token.

    Example:

    >>> router = keras_moe.routers.ExpertChoiceRouter(num_experts=8, capacity_factor=2.0)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> keras.ops.convert_to_numpy(routing.counts).tolist()
    [8, 8, 8, 8, 8, 8, 8, 8]

    Reference: Zhou et al. 2022 (arXiv:2202.09368), section 3.2.
    """

    causal = False
    default_losses = ()
    takes_capacity = False

    _attribute_checks = {"capacity_factor": check_positive_number}
    _kept_attributes = ("top_k",)

    def __init__(self, num_experts=None, capacity_factor=2.0, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.capacity_factor = capacity_factor

    @property
    def top_k(self):
        """All experts, each of which may choose the token."""
        return self.num_experts

    @property
    def mean_top_k(self):
        return min(self.capacity_factor, self.num_experts)

    def route(self, tokens, mask, training, sequence_length=None):
        logits, mask = self.checked_logits(tokens, mask, training)
        return expert_choice_routing(logits, self.capacity_factor, mask, sequence_length)

    def plan(self, routing, **capacity):
        self.check_no_capacity(capacity)
        return plan_expert_choice(routing)

    def get_config(self):
        return {**super().get_config(), "capacity_factor": self.capacity_factor}
