"""The interface of expert banks."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import BaseLayer
from keras_moe._internal.checks import check_integer
from keras_moe._internal.serialization import resolve
from keras_moe.backend import backend
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.soft import SoftPlan
from keras_moe.ops.sorting import as_dtype


class ExpertBank(BaseLayer):
    """Abstract: E experts that process the tokens which a plan assigns to them.

    A subclass implements `call(tokens, plan)`, and `compute_output_shape(tokens_shape)` if D' is
    not D.

    Args:
        num_experts: Integer. Number of experts, E.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If a number is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        plan: `ops.GroupedPlan`. Which experts process which token.

    Output shape:
        (T, D'): the weighted sum of each token's expert outputs, zero for a token without experts.
    """

    def __init__(self, num_experts: int, **kwargs: Any):
        # Keras would cast the float32 weights of the plan to the compute dtype.
        super().__init__(autocast=False, **kwargs)
        self.num_experts = check_integer("num_experts", num_experts)
        self.has_own_policy = kwargs.get("dtype") is not None

    @backend.uncompiled
    def __call__(self, tokens, plan=None, **kwargs):
        if plan is None:
            rule = "A bank is called with the plan of a router: use `MixtureOfExperts(bank)`"
            raise TypeError(f"{rule}. Received: no plan")
        if isinstance(plan, SoftPlan):  # Slots are tokens of the bank.
            slots, plan_of_slots = plan.dispatch(tokens, self.num_experts)
            return plan.combine(self(slots, plan_of_slots, **kwargs))
        # A plan of fewer experts or tokens would leave the others out.
        given = self.num_experts, tokens.shape[0]
        planned = plan.num_experts, plan.num_tokens
        if any(None not in pair and pair[0] != pair[1] for pair in zip(given, planned)):
            rule = "`plan` must be of as many experts and tokens as the bank receives"
            raise ValueError(f"{rule}. Received: {planned} for {given}")
        return super().__call__(tokens, plan, **kwargs)

    def compute_all(self, tokens: Tensor, training: bool | None = None) -> Tensor:
        """Return the outputs (T, E, ...) of all experts for each token (T, ...)."""
        numbers = ops.arange(self.num_experts, dtype="int32")
        experts = ops.broadcast_to(numbers, (ops.shape(tokens)[0], self.num_experts))
        plan = GroupedPlan.of(experts, ops.ones_like(experts, "float32"), self.num_experts)
        return self.compute_each(tokens, plan, training)

    def compute_each(
        self, tokens: Tensor, plan: GroupedPlan, training: bool | None = None
    ) -> Tensor:
        """Return outputs (T, K, ...) of a plan's assignments before weights; zero without a row."""
        top_k = plan.weights.shape[1]
        repeated = ops.repeat(tokens, top_k, axis=0)
        outputs = self(repeated, plan.by_assignment(), training=training)
        return ops.reshape(outputs, (-1, top_k, *outputs.shape[1:]))

    def compute_output_shape(self, tokens_shape):
        return tuple(tokens_shape)

    def compute_output_spec(self, tokens, plan, training=None):
        return keras.KerasTensor(self.compute_output_shape(tokens.shape), self.compute_dtype)

    def rematerialized_call(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return the call itself: the layer around the bank is recomputed with the bank in it."""
        return call

    def inherit_policy(self, policy: keras.DTypePolicy) -> None:
        """Take the dtype policy of the layer around the bank, unless the bank has its own."""
        if not self.has_own_policy and not self.built:
            self.has_own_policy = True
            self._take_policy(policy)

    def _take_policy(self, policy):
        """Set the policy of the bank and of banks in it; other layers keep their own."""

    @property
    def num_capacity_limited(self) -> int:
        """Number of experts, the first ones, that a capacity limits."""
        return self.num_experts

    def _compute(self, tensor):
        return as_dtype(tensor, self.compute_dtype)

    def _fix_shape(self, tokens_shape):
        """Let Keras refuse tokens of another shape, as from a second layer that shares the bank."""
        axes = dict(enumerate(tokens_shape[1:], start=1))
        self.input_spec = keras.layers.InputSpec(ndim=len(tokens_shape), axes=axes)


def get(identifier, argument="experts"):
    """Return a bank of experts from an instance or a config."""
    example = (
        "`FeedForwardExperts(num_experts=8, hidden_dim=256)` or `LayerExperts([layer, layer])`"
    )
    return resolve(argument, identifier, ExpertBank, example=example)


def in_floats(policy):
    """Return the policy that a quantized policy was made from, or any other policy itself."""
    if policy.quantization_mode is None:
        return policy
    return keras.dtype_policies.get(policy.name.rpartition("_from_")[2])
