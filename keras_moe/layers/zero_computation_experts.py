"""Zero, identity and constant experts."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer
from keras_moe._internal.initializers import mark_stack
from keras_moe._internal.serialization import register
from keras_moe.layers import expert_bank
from keras_moe.layers.expert_bank import ExpertBank, in_floats
from keras_moe.layers.sublayers import freeze_parts
from keras_moe.ops.plans import GroupedPlan


@register
class ZeroComputationExperts(ExpertBank):
    """A bank of experts, followed by experts that do next to nothing.

    A token that needs no work goes to a zero expert, whose output is zero, to an identity expert,
    whose output is the token, or to a constant expert, `a x + b v` with a learned vector v and
    `a, b = softmax(x W)`. None of them moves a row. So easy tokens cost less than hard ones. A
    capacity, whose E counts all experts, limits those that compute; the others serve any number of
    tokens.

    The router sets the weights. Use one that does not divide them by their sum, such as
    `TopKRouter(num_experts, renormalize=False)`, as in LongCat-Flash: otherwise the weight of a
    zero expert counts in that sum.

    Args:
        experts: Bank of experts that compute.
        num_zero: Integer. Number of zero experts.
        num_identity: Integer. Number of identity experts.
        num_constant: Integer. Number of constant experts.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If a number is negative or all are zero, or the bank changes the number of
            features.

    Call arguments and output shape: as for `ExpertBank`. The plan numbers first the experts that
    compute, then zero, identity and constant ones; experts must not choose tokens.

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
        number = num_zero + num_identity + num_constant
        if not number:
            raise ValueError("There must be an expert without computation. Received: none")
        super().__init__(experts.num_experts + number, **kwargs)
        self.experts = experts
        if self.has_own_policy:
            experts.inherit_policy(self.dtype_policy)
        self.num_zero, self.num_identity = num_zero, num_identity
        self.num_constant = num_constant
        freeze_parts(self)

    def build(self, tokens_shape):
        self._fix_shape(tokens_shape)
        if not self.experts.built:
            self.experts.build(tokens_shape)
        features = tokens_shape[-1]
        width = self.experts.compute_output_shape(tokens_shape)[-1]
        if width != features:
            raise ValueError(
                "Experts next to identity experts must return as many features as they receive. "
                f"Received: {features} features in, {width} out"
            )
        if self.num_constant:
            shape = (self.num_constant, features)
            self.constant = mark_stack(self.add_weight(shape, "zeros", name="constant"))
            self.mixing_kernel = self.add_weight(
                name="mixing_kernel",
                shape=(features, self.num_constant, 2),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
            )

    def call(self, tokens: Tensor, plan: GroupedPlan) -> Tensor:
        computing = self.experts.num_experts
        if plan.places is not None:
            raise ValueError(
                "Experts without computation need a router whose tokens choose experts, such as "
                "`TopKRouter`. Received: a plan of experts that choose tokens"
            )
        tokens = self._compute(tokens)
        outputs = self._compute(self.experts(tokens, plan.of_first(computing)))
        first_identity = computing + self.num_zero
        first_constant = first_identity + self.num_identity
        weight = plan.weight_at(first_identity, first_constant)
        outputs = outputs + self._compute(weight) * tokens
        for number in range(self.num_constant):
            expert = first_constant + number
            weight = self._compute(plan.weight_at(expert, expert + 1))
            outputs = outputs + weight * self._constant(tokens, number)
        return outputs

    def _constant(self, tokens, number):
        kernel = self._compute(self.mixing_kernel)[:, number]
        shares = ops.softmax(ops.matmul(tokens, kernel), axis=-1)
        return shares[:, :1] * tokens + shares[:, 1:] * self._compute(self.constant)[number]

    def engine_on(self, platform, static_shapes):
        return self.experts.engine_on(platform, static_shapes)

    def inherit_policy(self, policy):
        if not self.has_own_policy and not self.built:
            self.has_own_policy = True
            self.dtype_policy = in_floats(policy)
            self.experts.inherit_policy(policy)

    @property
    def num_capacity_limited(self):
        return self.experts.num_capacity_limited
