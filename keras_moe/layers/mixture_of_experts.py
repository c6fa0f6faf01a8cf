"""The layer users put into their models: router, plan, experts, account."""

import math

import keras
from keras import ops as keras_ops

from keras_moe import routers
from keras_moe._internal.misplaced_arguments import ON_LAYER, check_place
from keras_moe._internal.named_arguments import check_is_made
from keras_moe._internal.serialization import config_of, register, resolve
from keras_moe._internal.shape_checks import (
    check_inputs_shape,
    check_limits,
    check_planned,
    check_returned,
)
from keras_moe._internal.tensor_checks import (
    check_array,
    check_float_inputs,
    check_host_numbers,
    check_is_float,
    check_mask,
    fits,
)
from keras_moe._internal.validation import (
    check_computes_in_floats,
    check_flag,
    check_instance,
    check_training,
    optional,
    shortened,
)
from keras_moe.backend import backend
from keras_moe.layers import expert_bank
from keras_moe.layers.capacity import Capacity
from keras_moe.layers.expert_bank import check_is_layer_of_tokens, in_floats
from keras_moe.layers.masks import mask_of
from keras_moe.layers.mixture_state import load_state, save_state
from keras_moe.layers.recomputation import Recomputable, effects_once
from keras_moe.layers.routing_account import RoutingAccount
from keras_moe.layers.sublayers import (
    accepted_arguments,
    build_and_measure,
    freeze_parts,
    width_of,
)
from keras_moe.ops.assignments import at_least
from keras_moe.ops.soft import SoftPlan


@register
class MixtureOfExperts(RoutingAccount, Recomputable):
    """Sends each token to a few experts, and costs what those few cost.

    A drop-in for the feed-forward layer of a Transformer, or for a `Dense` layer anywhere. All
    axes but the last are tokens. By default no token is ever dropped, so a token's output does not
    depend on what else is in the batch.

    In training the layer adds its router losses and counts the assignments of each expert in the
    weight `expert_counts` (E,). `callbacks.ExpertMonitor` reports them after each epoch, and begins
    anew: those of the last epoch are in `last_counts`, which is saved.

    Padding is left out of everything: where `mask` is False no expert runs, nothing is counted, no
    loss changes, and the output is zero.

    Args:
        experts: bank of experts, required: `FeedForwardExperts`, `GatedExperts`, `LayerExperts` or
            `ZeroComputationExperts`.
        router: a router, or the name of one in `routers.BY_NAME`, which then has its defaults. One
            that was made without a number of experts gets that of the bank.
        router_losses: losses of the routing, objects or names in `losses.BY_NAME`. None: the
            `default_losses` of the router, for most `("load_balance", "router_z")`; none for a
            router that balances by other means.
        shared_expert: Keras layer that serves every token, its output added to that of the chosen
            experts, or None. DeepSeekMoE (arXiv:2401.06066), section 3.2.
        capacity_factor: None for no limit. A number gives each expert, in training,
            `ceil(capacity_factor * T * K / E)` slots for T tokens, at least 1; first choices are
            served before second ones, then earlier tokens before later ones. An assignment that
            finds no slot contributes zero. Experts without computation have no limit. `Capacity`
            has further options.
        gated_shared_expert: whether the shared expert's output is multiplied by a gate of each
            token, `sigmoid(x g)` with a learned g (D, 1), as in Qwen1.5-MoE and its successors.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`. A bank that was made
            without a `dtype` takes that of its first layer; `LayerExperts` keep theirs.

    Raises:
        ValueError: If an argument is out of its range, or router and bank disagree on the number
            of experts.
        TypeError: If an argument belongs to the bank or the router.

    Call arguments:
        inputs: (batch, ..., D) float tensor with any number of leading axes. The axes between the
            first and the last are a sequence; of (batch, D) the whole batch is one.
        mask: (batch, ...) bool or integer tensor, False or 0 for padding. Taken from the inputs, if
            not given.
        training: whether router losses are added, router noise drawn and assignments counted.
        return_routing: whether the routing is returned as well.
        token_ids: (batch, ...) integer tensor of vocabulary ids, for `routers.HashRouter`.
        indices: (T, K) integer tensor of experts to replay instead of choosing, such as the
            `indices` of a recorded routing, -1 for none. Weights come from the live scores. Those
            in a NumPy array are checked; in a tensor, numbers that are no expert's count as -1.
        router_inputs: tensor of the shape of `inputs` that the router sees instead of them, as
            where it has a normalization of its own (Gemma 4).

    Returns:
        (batch, ..., D'), with the experts' D'; with `return_routing=True` also an `ops.Routing`,
        whose tokens are the leading axes flattened.

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
    _refused_arguments = tuple(ON_LAYER)
    _attribute_checks = {
        "experts": check_instance(expert_bank.ExpertBank),
        "router": check_instance(routers.Router),
        "shared_expert": optional(check_is_layer_of_tokens),
        "gated_shared_expert": check_flag,
        "capacity": lambda name, value: Capacity.get(value),
    }
    _kept_attributes = ("gated_shared_expert",)
    _fixed_attributes = ("experts", "router", "shared_expert")

    def __init__(
        self,
        experts=None,
        router="top_k",
        router_losses=None,
        shared_expert=None,
        capacity_factor=None,
        gated_shared_expert=False,
        **kwargs,
    ):
        check_place(self, ON_LAYER, kwargs)
        super().__init__(**kwargs)
        check_computes_in_floats(self)
        backend.separate_losses(self)
        self.experts = expert_bank.get(experts)
        if kwargs.get("dtype") is not None:
            self.experts.take_policy(self.dtype_policy)
        self.router = routers.get(router, num_experts=self.experts.num_experts)
        self._bind_router()
        self.router_losses = self.router.default_losses if router_losses is None else router_losses
        self.gated_shared_expert = gated_shared_expert
        if shared_expert is not None:
            shared_expert = resolve("shared_expert", shared_expert, keras.Layer)
        self.shared_expert = shared_expert
        self._check_what_is_gated()
        self.shared_gate = None
        if gated_shared_expert:
            self.shared_gate = _Gate(
                1,
                "sigmoid",
                use_bias=False,
                dtype=in_floats(self.dtype_policy),
                name="shared_gate",
            )
        self.capacity = capacity_factor
        takes_capacity = check_flag("takes_capacity", self.router.takes_capacity)
        if self.capacity is not None and not takes_capacity:
            raise ValueError(
                "A capacity limits how many tokens choose an expert. Received: "
                f"capacity_factor={shortened(capacity_factor)} with a "
                f"`{type(self.router).__name__}`, whose "
                "tokens do not choose. Leave `capacity_factor` out."
            )
        # Of the layer, so that Keras carries its state through compiled steps.
        self._capacity_seed = keras.random.SeedGenerator() if self.capacity else None
        self.supports_masking = True
        freeze_parts(self)
        # A function of routings and tokens (T, D), which `inspection.recording.listening` sets.
        self.routing_listener = None

    def build(self, inputs_shape):
        check_inputs_shape(inputs_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: inputs_shape[-1]})
        self._bind_router()
        self._check_what_is_gated()
        tokens_shape = (None, inputs_shape[-1])
        expert_bank.check_shared(self.experts, inputs_shape)
        for sublayer in (self.router, self.experts):
            if not sublayer.built:
                sublayer.build(tokens_shape)
        if self.shared_expert is not None:
            self._build_shared_expert(inputs_shape)
        self._build_account(self.experts.num_experts)

    def _check_what_is_gated(self):
        if self.gated_shared_expert and self.shared_expert is None:
            raise ValueError(
                "Only a shared expert can be gated. Received: gated_shared_expert=True, "
                "shared_expert=None. Pass a `shared_expert`, or leave `gated_shared_expert` out."
            )

    def _bind_router(self):
        self.router.bind(self.experts.num_experts)
        if self.router.num_experts != self.experts.num_experts:
            raise ValueError(
                "Router and experts must have the same number of experts. Received: "
                f"router.num_experts={self.router.num_experts}, "
                f"experts.num_experts={self.experts.num_experts}. "
                "Leave `num_experts`, the first argument of the router, out, or give both the same "
                "number. How many experts serve a token is `top_k`."
            )

    def __call__(self, *args, **kwargs):
        check_is_made(self)
        # Checked here, because Keras turns arrays into tensors before `call`.
        self.router.check_arrays(**kwargs)
        check_training(kwargs.get("training"))
        if args:
            check_array("inputs", args[0])
        check_host_numbers(**kwargs)
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
        check_flag("return_routing", return_routing)
        shape = keras_ops.shape(inputs)
        mask = mask_of(inputs, mask)
        self._check_call(inputs, mask, router_inputs)
        tokens, token_mask = self._flatten(inputs, mask)
        sequence_length = _sequence_length(shape)
        seen = tokens
        if router_inputs is not None:
            seen = keras_ops.reshape(router_inputs, (-1, router_inputs.shape[-1]))
        routing = self.router(
            seen,
            mask=token_mask,
            training=training,
            sequence_length=sequence_length,
            token_ids=token_ids,
            indices=indices,
        )
        plan = self._plan(routing, sequence_length, training)
        routing = routing._replace(dropped=plan.dropped_fraction(routing.counts))
        if isinstance(plan, SoftPlan):
            outputs = plan.combine(self.experts(*plan.dispatch(tokens, self.experts.num_experts)))
        else:
            outputs = self.experts(tokens, plan)
        outputs = keras_ops.reshape(outputs, (*shape[:-1], outputs.shape[-1]))
        outputs = keras_ops.cast(outputs, self.compute_dtype)
        if self.shared_expert is not None:
            outputs = outputs + self._shared(keras_ops.reshape(tokens, shape), mask)
        self._account(routing, sequence_length, training)
        if self.routing_listener is not None:
            self.routing_listener(routing, tokens)
        return (outputs, routing) if return_routing else outputs

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def _plan(self, routing, sequence_length, training):
        limits = {}
        if self.capacity is not None:
            limits = self.capacity.limits(routing, sequence_length, training, self._capacity_seed)
            check_limits(self.capacity, limits)
            if limits and self.experts.num_limited < self.experts.num_experts:
                limits = {"num_limited": self.experts.num_limited, **limits}
        plan = self.router.plan(routing, **limits)
        check_planned(self.router, plan)
        return plan

    def _shared(self, inputs, mask):
        arguments = {"mask": mask} if self._shared_arguments else {}
        shared = self.shared_expert(inputs, **arguments)
        check_returned("shared_expert", shared, (*inputs.shape[:-1], self._shared_width))
        if self.shared_gate is not None:
            shared = shared * self.shared_gate(inputs)
        if mask is not None:
            shared = keras_ops.where(keras_ops.expand_dims(mask, -1), shared, 0)
        return keras_ops.cast(shared, self.compute_dtype)

    def _check_call(self, inputs, mask, router_inputs):
        check_float_inputs(inputs)
        if mask is not None:
            check_mask(mask, inputs.shape)
        if router_inputs is None:
            return
        check_is_float("router_inputs", router_inputs)
        if not fits(router_inputs.shape, inputs.shape):
            raise ValueError(
                "`router_inputs` must have the shape of the inputs. Received: "
                f"router_inputs.shape={tuple(router_inputs.shape)}, "
                f"inputs.shape={tuple(inputs.shape)}. Pass another view of the same tokens."
            )

    def _flatten(self, inputs, mask):
        tokens = keras_ops.reshape(inputs, (-1, inputs.shape[-1]))
        if mask is None:
            return tokens, None
        mask = keras_ops.reshape(keras_ops.cast(mask, "bool"), (-1,))
        # Padding may hold anything, NaN included; zeros are harmless in every product.
        zero = keras_ops.zeros((), tokens.dtype)
        return keras_ops.where(keras_ops.expand_dims(mask, 1), tokens, zero), mask

    def save_own_variables(self, store):
        save_state(self, store)

    def load_own_variables(self, store):
        load_state(self, store)

    def _build_shared_expert(self, inputs_shape):
        routed = width_of(self.experts, inputs_shape)
        shared = build_and_measure("shared_expert", self.shared_expert, inputs_shape)
        if shared[-1] != routed:
            raise ValueError(
                "The shared expert must return as many features as the routed experts. Received: "
                f"{shared[-1]} features from shared_expert, {routed} from experts. "
                f"End the shared expert with a layer of width {routed}."
            )
        self._shared_width = shared[-1]
        self._shared_arguments = accepted_arguments(self.shared_expert, ("mask",))
        if self.shared_gate is not None and not self.shared_gate.built:
            self.shared_gate.build(inputs_shape)

    def compute_output_shape(self, inputs_shape):
        check_inputs_shape(inputs_shape)
        return (*inputs_shape[:-1], width_of(self.experts, inputs_shape))

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
        check_flag("return_routing", return_routing)
        self._check_call(inputs, mask, router_inputs)
        outputs = keras.KerasTensor(self.compute_output_shape(inputs.shape), self.compute_dtype)
        num_tokens: int | None = 1
        for size in inputs.shape[:-1]:
            num_tokens = None if None in (num_tokens, size) else num_tokens * size
        tokens = keras.KerasTensor((num_tokens, inputs.shape[-1]), inputs.dtype)
        routing = self.router.compute_output_spec(tokens, token_ids=token_ids, indices=indices)
        return (outputs, routing) if return_routing else outputs

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "experts": config_of(self.experts),
            "router": config_of(self.router),
            "router_losses": [serialize(loss) for loss in self.router_losses],
            "shared_expert": config_of(self.shared_expert),
            "gated_shared_expert": self.gated_shared_expert,
            "capacity_factor": self.capacity and serialize(self.capacity),
        }


class _Gate(keras.layers.Dense):
    def quantize(self, mode, type_check=True, config=None):
        """Do nothing: it has one column. Keras calls this for every layer."""


def _sequence_length(shape):
    """Tokens between the first axis and the last; None where each row is a token.

    Never 0: where there are no tokens there are no sequences, and not any number of them.
    """
    return at_least(1, math.prod(shape[1:-1])) if len(shape) > 2 else None
