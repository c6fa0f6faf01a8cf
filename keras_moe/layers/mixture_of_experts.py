"""The mixture of experts: route, plan, compute, combine.

Axes: T tokens, all leading axes of the inputs flattened; D features of a token; E experts; K
experts of a token.
"""

import math

import keras
from keras import ops as keras_ops

from keras_moe import losses, ops, routers
from keras_moe._internal.checks import check_indices, check_tensors, shortened
from keras_moe._internal.keras_internals import get_keras_mask
from keras_moe._internal.serialization import config_of, register, resolve
from keras_moe.backend import backend
from keras_moe.layers import expert_bank, sublayers
from keras_moe.layers.capacity import Capacity
from keras_moe.layers.recomputation import Recomputable, effects_once
from keras_moe.layers.usage import RouterUsage
from keras_moe.ops.assignments import at_least


@register
class MixtureOfExperts(RouterUsage, Recomputable):
    """Sends each token to a few experts, and costs what those few cost.

    A drop-in for the feed-forward layer of a Transformer, or for a `Dense` layer anywhere. All
    axes but the last are tokens. By default no token is ever dropped, so a token's output does not
    depend on what else is in the batch.

    In training the layer adds its router losses and counts the assignments of each expert in the
    weight `expert_counts` (E,). `callbacks.ExpertMonitor` reports and resets them after each
    epoch; those of the last epoch are in `last_counts`, which is saved.

    Padding, where the mask is False, runs no expert, is not counted, changes no loss, and its
    output is zero.

    Args:
        experts: Bank of experts: `FeedForwardExperts`, `GatedExperts`, `LayerExperts` or
            `ZeroComputationExperts`.
        router: Router, or the name of one in `routers.BY_NAME`. A router without a number of
            experts gets that of the bank.
        router_losses: List of losses of the routing, objects or names in `losses.BY_NAME`. None:
            the `default_losses` of the router, for most `("load_balance", "router_z")`; none for a
            router that balances by other means.
        shared_expert: Keras layer that serves every token, its output added to that of the chosen
            experts, or None. DeepSeekMoE (arXiv:2401.06066), section 3.2.
        capacity_factor: Positive float, `Capacity`, or None for no limit. A number gives each
            expert, in training, `ceil(capacity_factor * T * K / E)` slots, at least 1; first
            choices are served before second ones, then earlier tokens before later ones. An
            assignment without a slot contributes zero. Experts without computation have no limit.
        gated_shared_expert: Boolean. Whether the shared expert's output is multiplied by a gate of
            each token, `sigmoid(x g)` with a learned g (D, 1), as in Qwen1.5-MoE.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`. A bank without a `dtype`
            of its own takes that of its first layer; `LayerExperts` keep theirs.

    Raises:
        ValueError: If an argument is out of its range, or router and bank disagree on the number
            of experts.
        TypeError: If an argument is of another type.

    Call arguments:
        inputs: (batch, ..., D) float tensor with any number of leading axes. The axes between the
            first and the last are a sequence; of (batch, D) the whole batch is one.
        mask: (batch, ...) bool or integer tensor, False or 0 for padding. Default: the Keras mask
            of the inputs.
        training: Boolean. Whether router losses are added, router noise drawn and assignments
            counted.
        return_routing: Boolean. Whether the routing is returned as well.
        token_ids: (batch, ...) integer tensor of vocabulary ids, for `routers.HashRouter`.
        indices: (T, K) integer tensor of experts to replay instead of choosing, such as the
            `indices` of a recorded routing, -1 for none. Weights come from the live scores. The
            numbers in an array are checked; in a tensor, those that are no expert's count as -1.
        router_inputs: (batch, ..., D'') float tensor that the router sees instead of `inputs`.

    Input shape:
        (batch, ..., D).

    Output shape:
        (batch, ..., D'), with the experts' D'; with `return_routing=True` also an `ops.Routing`.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=256)
    ... )
    >>> outputs, routing = layer(keras.random.normal((2, 10, 64)), return_routing=True)
    >>> outputs.shape, routing.indices.shape
    ((2, 10, 64), (20, 2))

    References: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021 (arXiv:2101.03961).
    """

    # Whether its own `get_config` has the experts, and not that of a block around it.
    has_own_config = True

    def __init__(
        self,
        experts,
        router="top_k",
        router_losses=None,
        shared_expert=None,
        capacity_factor=None,
        gated_shared_expert=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        backend.separate_losses(self)
        self.experts = expert_bank.get(experts)
        if kwargs.get("dtype") is not None:
            self.experts.take_policy(self.dtype_policy)
        self.router = routers.get(router, num_experts=self.experts.num_experts)
        self.router.bind(self.experts.num_experts)
        if self.router.num_experts != self.experts.num_experts:
            raise ValueError(
                "`router` and `experts` must have the same number of experts. Received: "
                f"router.num_experts={self.router.num_experts}, "
                f"experts.num_experts={self.experts.num_experts}. How many experts serve a token "
                "is the router's `top_k`."
            )
        if router_losses is None:
            router_losses = self.router.default_losses
        elif not isinstance(router_losses, (list, tuple)):
            raise TypeError(
                "`router_losses` must be a list of losses or names. Received: "
                f"router_losses={shortened(router_losses)}"
            )
        self.router_losses = tuple(losses.get(loss) for loss in router_losses)
        self.shared_expert = shared_expert
        if shared_expert is not None:
            self.shared_expert = resolve("shared_expert", shared_expert, keras.Layer)
        self.capacity = Capacity.get(capacity_factor)
        if self.capacity is not None and not self.router.takes_capacity:
            raise ValueError(
                "`capacity_factor` limits how many tokens choose an expert. Received: "
                f"capacity_factor={shortened(capacity_factor)} with a "
                f"`{type(self.router).__name__}`, whose tokens do not choose"
            )
        # Owned by the layer, so that Keras carries its state through compiled steps.
        self._capacity_seed = keras.random.SeedGenerator() if self.capacity else None
        self.gated_shared_expert = gated_shared_expert
        self.shared_gate = None
        if gated_shared_expert:
            if shared_expert is None:
                raise ValueError("`gated_shared_expert=True` needs a `shared_expert`")
            self.shared_gate = _Gate(
                1,
                "sigmoid",
                use_bias=False,
                dtype=expert_bank.in_floats(self.dtype_policy),
                name="shared_gate",
            )
        self.supports_masking = True
        sublayers.freeze_parts(self)
        # A function of routing and tokens (T, D), which `inspection` sets to record them.
        self.routing_listener = None

    def build(self, inputs_shape, router_inputs_shape=None):
        if len(inputs_shape) < 2 or inputs_shape[-1] is None:
            raise ValueError(
                "`inputs` must have the shape (batch, ..., features), features known. Received: "
                f"inputs.shape={tuple(inputs_shape)}"
            )
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: inputs_shape[-1]})
        router_features = (router_inputs_shape or inputs_shape)[-1]
        if not self.router.built:
            self.router.build((None, router_features))
        if not self.experts.built:
            self.experts.build((None, inputs_shape[-1]))
        if self.shared_expert is not None:
            self._build_shared_expert(inputs_shape)
        self._build_usage(self.experts.num_experts)

    def _build_shared_expert(self, inputs_shape):
        shape = sublayers.build_and_measure("shared_expert", self.shared_expert, inputs_shape)
        width = self.compute_output_shape(inputs_shape)[-1]
        if shape[-1] != width:
            raise ValueError(
                "`shared_expert` must return as many features as `experts`. Received: "
                f"{shape[-1]} features from shared_expert, {width} from experts"
            )
        self._shared_arguments = sublayers.accepted_arguments(self.shared_expert, ("mask",))
        if self.shared_gate is not None and not self.shared_gate.built:
            self.shared_gate.build(inputs_shape)

    def __call__(self, *args, **kwargs):
        # Keras turns arrays into tensors, whose numbers are not looked at.
        check_indices("indices", kwargs.get("indices"), self.router.num_experts)
        return super().__call__(*args, **kwargs)

    @effects_once
    def call(
        self,
        inputs,
        mask=None,
        training=None,
        return_routing=False,
        token_ids=None,
        indices=None,
        router_inputs=None,
    ):
        # Flatten: (batch, ..., D) inputs are T = batch * ... tokens. Padding becomes zero.
        shape = keras_ops.shape(inputs)
        sequence_length = _sequence_length(shape)
        mask = self._check_call(inputs, mask, router_inputs)
        tokens, token_mask = _flatten(inputs, mask), None
        router_tokens = tokens if router_inputs is None else _flatten(router_inputs, mask)
        if mask is not None:
            token_mask = keras_ops.reshape(mask, (-1,))

        # Route: the router chooses K experts for each token, and weights for their outputs.
        routing = self.router(
            router_tokens,
            mask=token_mask,
            training=training,
            sequence_length=sequence_length,
            token_ids=token_ids,
            indices=indices,
        )

        # Plan: sort the assignments of tokens to experts by expert. A capacity may drop some.
        plan = self._plan(routing, sequence_length, training)
        routing = routing._replace(dropped=plan.dropped_fraction(routing.counts))

        # Compute: each expert computes its tokens; their outputs are weighted and summed.
        outputs = self._compute_experts(tokens, plan)
        outputs = keras_ops.reshape(outputs, (*shape[:-1], outputs.shape[-1]))
        outputs = keras_ops.cast(outputs, self.compute_dtype)
        if self.shared_expert is not None:
            outputs = outputs + self._compute_shared(keras_ops.reshape(tokens, shape), mask)

        # Account: in training, add the router losses and count the assignments.
        self._add_losses_and_count(routing, sequence_length, training)
        if self.routing_listener is not None:
            self.routing_listener(routing, tokens)
        return (outputs, routing) if return_routing else outputs

    def _check_call(self, inputs, mask, router_inputs):
        """Check the shapes of a call, and return the mask as bools, or None."""
        # Keras passes a mask on by itself only if the inputs are the only tensor of a call.
        mask = get_keras_mask(inputs) if mask is None else mask
        axes = "abcdefghij"[: len(inputs.shape) - 1]
        given = {"inputs": (inputs, f"{axes}D", "float")}
        if router_inputs is not None:
            given["router_inputs"] = (router_inputs, f"{axes}R", "float")
        if mask is not None:
            mask = keras_ops.convert_to_tensor(mask)
            given["mask"] = (mask, axes, "mask")
        check_tensors(None, **given)
        return None if mask is None else keras_ops.cast(mask, "bool")

    def _plan(self, routing, sequence_length, training):
        limits = {}
        if self.capacity is not None:
            limits = self.capacity.limits(routing, sequence_length, training, self._capacity_seed)
            if limits and self.experts.num_limited < self.experts.num_experts:
                limits = {"num_limited": self.experts.num_limited, **limits}
        return self.router.plan(routing, **limits)

    def _compute_experts(self, tokens, plan):
        if not isinstance(plan, ops.SoftPlan):
            return self.experts(tokens, plan)
        slots, slot_plan = plan.dispatch(tokens, self.experts.num_experts)
        return plan.combine(self.experts(slots, slot_plan))

    def _compute_shared(self, inputs, mask):
        arguments = {"mask": mask} if self._shared_arguments else {}
        shared = self.shared_expert(inputs, **arguments)
        sublayers.check_output("shared_expert", shared, self.compute_output_shape(inputs.shape))
        shared = keras_ops.cast(shared, self.compute_dtype)
        if self.shared_gate is not None:
            shared = shared * self.shared_gate(inputs)
        if mask is not None:
            shared = keras_ops.where(keras_ops.expand_dims(mask, -1), shared, 0)
        return shared

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def compute_output_shape(self, inputs_shape, router_inputs_shape=None):
        tokens_shape = (None, inputs_shape[-1])
        width = self.experts.compute_output_shape(tokens_shape)[-1]
        return (*inputs_shape[:-1], width)

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        training=None,
        return_routing=False,
        token_ids=None,
        indices=None,
        router_inputs=None,
    ):
        self._check_call(inputs, mask, router_inputs)
        outputs = keras.KerasTensor(self.compute_output_shape(inputs.shape), self.compute_dtype)
        sizes = inputs.shape[:-1]
        num_tokens = None if None in sizes else math.prod(sizes)
        features = (inputs if router_inputs is None else router_inputs).shape[-1]
        tokens = keras.KerasTensor((num_tokens, features), inputs.dtype)
        routing = self.router.compute_output_spec(tokens, token_ids=token_ids, indices=indices)
        return (outputs, routing) if return_routing else outputs

    def get_config(self):
        return {
            **super().get_config(),
            "experts": config_of(self.experts),
            "router": config_of(self.router),
            "router_losses": [config_of(loss) for loss in self.router_losses],
            "shared_expert": config_of(self.shared_expert),
            "gated_shared_expert": self.gated_shared_expert,
            "capacity_factor": config_of(self.capacity),
        }


class _Gate(keras.layers.Dense):
    def quantize(self, mode, type_check=True, config=None):
        """Do nothing: it has one column. Keras calls this for every layer."""


def _flatten(inputs, mask):
    """Tokens (T, D) of inputs (batch, ..., D), zero where a mask (batch, ...) is False."""
    if mask is not None:
        # Padding may hold anything, NaN included, which no product with a zero weight removes.
        zero = keras_ops.zeros((), inputs.dtype)
        inputs = keras_ops.where(keras_ops.expand_dims(mask, -1), inputs, zero)
    return keras_ops.reshape(inputs, (-1, inputs.shape[-1]))


def _sequence_length(shape):
    """Tokens between the first axis and the last, at least 1; None where each row is a token."""
    return at_least(1, math.prod(shape[1:-1])) if len(shape) > 2 else None
