"""Zero, identity and constant experts."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import mark_stack
from keras_moe._internal.checks import check_integer
from keras_moe._internal.serialization import register
from keras_moe.layers import expert_bank
from keras_moe.layers.expert_bank import ExpertBank, in_floats
from keras_moe.layers.sublayers import freeze_parts
from keras_moe.ops.plans import ExpertChoicePlan, GroupedPlan


@register
class ZeroComputationExperts(ExpertBank):
    """A bank of experts, and further experts that compute almost nothing.

    The output of a zero expert is zero, of an identity expert the token, and of a constant expert
    `a x + b v` with a learned vector v and `a, b = softmax(x W)`. A capacity is computed for all
    experts, but does not limit these. Use a router that does not divide weights by their sum, such
    as `TopKRouter(num_experts, renormalize=False)`. Otherwise the weight of a zero expert lowers
    the others.

    Args:
        experts: Bank of experts that compute.
        num_zero: Integer. Number of zero experts.
        num_identity: Integer. Number of identity experts.
        num_constant: Integer. Number of constant experts.

    Raises:
        ValueError: If a number is negative, the bank changes the number of features, or experts
            choose tokens.

    Other arguments, call arguments and output shape: as for `ExpertBank`. The bank's experts come
    first, then zero, identity and constant ones.

    Example:

    >>> bank = keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=32)
    >>> bank = keras_moe.layers.ZeroComputationExperts(bank, num_zero=1, num_identity=1)
    >>> layer = keras_moe.layers.MixtureOfExperts(bank)
    >>> layer.router.num_experts
    10

    References: Jin et al. 2024, MoE++ (arXiv:2410.07348), section 3.1; LongCat-Flash
    (arXiv:2509.01322), section 2.1.
    """

    fixed_arguments = ("num_experts",)

    def __init__(
        self,
        experts: ExpertBank,
        num_zero: int = 0,
        num_identity: int = 0,
        num_constant: int = 0,
        **kwargs: Any,
    ):
        experts = expert_bank.get(experts)
        num_zero = check_integer("num_zero", num_zero, minimum=0)
        num_identity = check_integer("num_identity", num_identity, minimum=0)
        num_constant = check_integer("num_constant", num_constant, minimum=0)
        super().__init__(experts.num_experts + num_zero + num_identity + num_constant, **kwargs)
        self.experts = experts
        if self.has_own_policy:
            experts.inherit_policy(self.dtype_policy)
        self.num_zero, self.num_identity, self.num_constant = num_zero, num_identity, num_constant
        freeze_parts(self)

    def build(self, tokens_shape):
        self._fix_shape(tokens_shape)
        if not self.experts.built:
            self.experts.build(tokens_shape)
        features = tokens_shape[-1]
        width = self.experts.compute_output_shape(tokens_shape)[-1]
        if width != features:
            rule = "Experts next to identity experts must return as many features as they receive"
            raise ValueError(f"{rule}. Received: {features} features in, {width} out")
        if self.num_constant:
            shape = (self.num_constant, features)
            self.constant = mark_stack(self.add_weight(shape, "zeros", name="constant"))
            self.mixing_kernel = self.add_weight(
                name="mixing_kernel",
                shape=(features, self.num_constant, 2),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
            )

    def call(self, tokens: Tensor, plan: GroupedPlan, training: bool | None = None) -> Tensor:
        computing = self.experts.num_experts
        if isinstance(plan, ExpertChoicePlan):
            rule = "Experts without computation need a router whose tokens choose, as `TopKRouter`"
            raise ValueError(f"{rule}. Received: a plan of experts that choose tokens")
        tokens = self._compute(tokens)
        outputs = self.experts(tokens, plan.of_first(computing), training=training)
        outputs = self._compute(outputs)
        first_identity = computing + self.num_zero
        first_constant = first_identity + self.num_identity
        weight = plan.weight_at(first_identity, first_constant)
        outputs = outputs + self._compute(weight) * tokens
        for number in range(self.num_constant):
            expert = first_constant + number
            weight = self._compute(plan.weight_at(expert, expert + 1))
            kernel = self._compute(self.mixing_kernel)[:, number]
            a, b = ops.split(ops.softmax(ops.matmul(tokens, kernel), axis=-1), 2, axis=-1)
            constant = a * tokens + b * self._compute(self.constant)[number]
            outputs = outputs + weight * constant
        return outputs

    def _take_policy(self, policy):
        self.dtype_policy = in_floats(policy)
        self.experts.inherit_policy(policy)

    @property
    def num_capacity_limited(self):
        return self.experts.num_capacity_limited
