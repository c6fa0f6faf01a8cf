"""The layer users put into their models: router, plan, experts, account."""

import keras
from keras import ops as keras_ops

from keras_moe import losses, ops, routers
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.routers.router import routing_spec
from keras_moe.serialization import register, resolve
from keras_moe.validation import check_float_inputs, check_mask, check_positive_number


@register
class MixtureOfExperts(keras.layers.Layer):
    """Sends each token to a few experts, and costs what those few cost.

    A drop-in for the feed-forward layer of a Transformer, or for a `Dense` layer anywhere. All
    axes but the last are tokens. By default no token is ever dropped, so a token's output does not
    depend on what else is in the batch.

    In training the layer adds its router losses and counts the assignments of each expert in the
    weight `expert_counts` (E,); `callbacks.ExpertMonitor` reports them.

    Padding is left out of everything: where `mask` is False no expert runs, nothing is counted, no
    loss changes, and the output is zero.

    Args:
        experts: bank of experts: `FeedForwardExperts`, `GatedExperts` or `LayerExperts`.
        router: a router, or "top_k" for `routers.TopKRouter` with its defaults and as many experts
            as the bank has.
        router_losses: losses of the routing, objects or names.
        shared_expert: Keras layer that serves every token, its output added to that of the chosen
            experts, or None. DeepSeekMoE (arXiv:2401.06066), section 3.2.
        capacity_factor: None for no limit. A number gives each expert room for
            `ceil(capacity_factor * T * K / E)` of the T tokens, at least 1; first choices are
            served before second ones, then earlier tokens before later ones. An assignment that
            finds no room contributes zero.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If an argument is out of its range, or router and bank disagree on the number
            of experts.

    Call arguments:
        inputs: (batch, ..., D) float tensor with any number of leading axes.
        mask: (batch, ...) bool tensor, False for padding. Taken from the inputs, if not given.
        training: whether router losses are added, router noise drawn and assignments counted.
        return_routing: whether the routing is returned as well.

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

    def __init__(
        self,
        experts,
        router="top_k",
        router_losses=("load_balance", "router_z"),
        shared_expert=None,
        capacity_factor=None,
        **kwargs,
    ):
        if capacity_factor is not None:
            check_positive_number("capacity_factor", capacity_factor)
        super().__init__(**kwargs)
        self.experts = resolve("experts", experts, ExpertBank)
        self.router = routers.get(router, num_experts=self.experts.num_experts)
        if self.router.num_experts != self.experts.num_experts:
            raise ValueError(
                "Router and experts must have the same number of experts. Received: "
                f"router.num_experts={self.router.num_experts}, "
                f"experts.num_experts={self.experts.num_experts}. "
                "Give both the same number, or name the router by a string."
            )
        self.router_losses = [losses.get(loss) for loss in _as_list(router_losses)]
        if shared_expert is not None:
            shared_expert = resolve("shared_expert", shared_expert, keras.Layer)
        self.shared_expert = shared_expert
        self.capacity_factor = capacity_factor
        self.supports_masking = True
        # `callbacks.ExpertMonitor` turns this on while it watches an evaluation. Otherwise
        # inference writes to no weight.
        self.counts_in_evaluation = False
        # `inspection.record_routings` listens here.
        self.routing_listener = None

    def build(self, inputs_shape):
        if len(inputs_shape) < 2 or inputs_shape[-1] is None:
            raise ValueError(
                "`inputs` must have a batch axis and a last axis of known size. Received: "
                f"inputs.shape={tuple(inputs_shape)}. Pass (batch, ..., features), for example "
                "`keras.Input((None, 64))`."
            )
        tokens_shape = (None, inputs_shape[-1])
        for sublayer in (self.router, self.experts):
            if not sublayer.built:
                sublayer.build(tokens_shape)
        if self.shared_expert is not None:
            if not self.shared_expert.built:
                self.shared_expert.build(inputs_shape)
            self._check_shared_expert(inputs_shape)
        counter = {
            "initializer": "zeros",
            "dtype": "float32",
            "trainable": False,
            "autocast": False,
        }
        self.expert_counts = self.add_weight(
            name="expert_counts", shape=(self.experts.num_experts,), **counter
        )
        self.dropped_count = self.add_weight(name="dropped_count", shape=(), **counter)

    def call(self, inputs, mask=None, training=None, return_routing=False):
        leading = keras_ops.shape(inputs)[:-1]
        tokens, token_mask = self._flatten(inputs, mask)
        routing = self.router(tokens, mask=token_mask, training=training)
        plan = ops.plan_groups(routing, self._capacity(tokens))
        routing = routing._replace(dropped=ops.dropped_fraction(routing, plan))
        outputs = self.experts(tokens, plan)
        outputs = keras_ops.reshape(outputs, (*leading, outputs.shape[-1]))
        outputs = keras_ops.cast(outputs, self.compute_dtype)
        if self.shared_expert is not None:
            shared = self.shared_expert(keras_ops.reshape(tokens, keras_ops.shape(inputs)))
            if mask is not None:
                shared = keras_ops.where(keras_ops.expand_dims(mask, -1), shared, 0)
            outputs = outputs + keras_ops.cast(shared, self.compute_dtype)
        if training:
            for loss in self.router_losses:
                self.add_loss(loss(routing))
        if training or self.counts_in_evaluation:
            self._count(routing)
        if self.routing_listener is not None:
            self.routing_listener(routing)
        return (outputs, routing) if return_routing else outputs

    def _flatten(self, inputs, mask):
        check_float_inputs(inputs)
        tokens = keras_ops.reshape(inputs, (-1, inputs.shape[-1]))
        if mask is None:
            return tokens, None
        check_mask(mask.shape, inputs.shape)
        mask = keras_ops.reshape(keras_ops.cast(mask, "bool"), (-1,))
        # Padding may hold anything, NaN included; zeros are harmless in every product.
        zero = keras_ops.zeros((), tokens.dtype)
        return keras_ops.where(keras_ops.expand_dims(mask, 1), tokens, zero), mask

    def _capacity(self, tokens):
        if self.capacity_factor is None:
            return None
        return ops.expert_capacity(
            keras_ops.shape(tokens)[0],
            self.experts.num_experts,
            self.router.top_k,
            self.capacity_factor,
        )

    def _count(self, routing):
        counts = keras_ops.cast(routing.counts, "float32")
        self.expert_counts.assign_add(counts)
        self.dropped_count.assign_add(routing.dropped * keras_ops.sum(counts))

    def reset_counts(self):
        """Set `expert_counts` and `dropped_count` back to zero."""
        for counter in (self.expert_counts, self.dropped_count):
            counter.assign(keras_ops.zeros(counter.shape))

    def _check_shared_expert(self, inputs_shape):
        routed = self.experts.compute_output_shape(inputs_shape)
        shared = self.shared_expert.compute_output_shape(inputs_shape)
        if shared[-1] != routed[-1]:
            raise ValueError(
                "The shared expert must return as many features as the routed experts. Received: "
                f"{shared[-1]} features from shared_expert, {routed[-1]} from experts. "
                f"End the shared expert with a layer of width {routed[-1]}."
            )

    def compute_output_shape(self, inputs_shape):
        return self.experts.compute_output_shape(inputs_shape)

    def compute_output_spec(self, inputs, mask=None, training=None, return_routing=False):
        outputs = keras.KerasTensor(self.compute_output_shape(inputs.shape), self.compute_dtype)
        if not return_routing:
            return outputs
        num_tokens: int | None = 1
        for size in inputs.shape[:-1]:
            num_tokens = None if None in (num_tokens, size) else num_tokens * size
        return outputs, routing_spec(num_tokens, self.experts.num_experts, self.router.top_k)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        shared = self.shared_expert
        return {
            **super().get_config(),
            "experts": serialize(self.experts),
            "router": serialize(self.router),
            "router_losses": [serialize(loss) for loss in self.router_losses],
            "shared_expert": None if shared is None else serialize(shared),
            "capacity_factor": self.capacity_factor,
        }


def _as_list(router_losses):
    if not isinstance(router_losses, (list, tuple)):
        raise TypeError(
            "`router_losses` must be a list or tuple of losses or names. Received: "
            f"router_losses={router_losses!r} (of type {type(router_losses).__name__}). "
            "Pass `()` for none."
        )
    return list(router_losses)
