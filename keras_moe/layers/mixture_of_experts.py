"""The mixture of experts: route, plan, compute, combine.

Axes: T tokens, all leading axes of the inputs flattened; D features of a token; E experts; K
experts of a token.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops as keras_ops

from keras_moe import losses, routers
from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_indices, check_integer, check_tensors, shortened
from keras_moe._internal.keras_internals import get_keras_mask, set_keras_mask
from keras_moe._internal.serialization import config_of, register, resolve
from keras_moe.layers import expert_bank, sublayers
from keras_moe.layers.capacity import Capacity
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.recomputation import Recomputable, effects_once
from keras_moe.layers.usage import RouterUsage
from keras_moe.ops.routing import Routing
from keras_moe.ops.sorting import at_least
from keras_moe.routers.router import Router

_MISPLACED = {
    "num_experts": "the bank of experts",
    "hidden_dim": "the bank of experts",
    "balancer": "the router",
    "score": "the router",
    "capacity": "`layers.Capacity`, or `capacity_factor` of the mixture",
}


@register
class MixtureOfExperts(RouterUsage, Recomputable):
    """Routes each token to its top-K experts; the cost grows with K, not with E.

    A drop-in for the feed-forward layer of a Transformer, or for a `Dense` layer anywhere. All
    axes but the last are tokens. By default no token is ever dropped, so a token's output does not
    depend on what else is in the batch.

    In training the layer adds its router losses and counts the assignments of each expert in the
    weight `expert_counts` (E,). `callbacks.ExpertMonitor` reports and resets them after each
    epoch; the last epoch's counts are in `last_counts`, which is saved.

    Padding, where the mask is False, runs no expert, is not counted, changes no loss, and its
    output is zero.

    Args:
        experts: Bank of experts, such as `FeedForwardExperts`, `GatedExperts`, `LayerExperts` or a
            subclass of `StackedExperts`.
        router: Router, or a name for `routers.get`. A router without a number of experts gets the
            number of the bank.
        router_losses: List of losses of the routing, objects or names for `losses.get`. None: the
            `default_losses` of the router, for most `("load_balance", "router_z")`; none for a
            router that balances by other means.
        shared_expert: Keras layer that serves every token, its output added to the chosen experts'
            output, or None. DeepSeekMoE (arXiv:2401.06066), section 3.2.
        capacity_factor: Positive float, `Capacity`, or None for no limit. A number gives each
            expert, in training, `ceil(capacity_factor * T * K / E)` slots, at least 1; first
            choices are served before second ones, then earlier tokens before later ones. An
            assignment without a slot contributes zero. Experts without computation have no limit.
            A factor of at least E / K drops nothing.
        gated_shared_expert: Boolean. Whether the shared expert's output is multiplied by a gate of
            each token, `sigmoid(x g)` with a learned g (D, 1), as in Qwen1.5-MoE.
        token_axes: Integer. Number of leading axes that count tokens; the others are the shape of
            one. 1: each sample of a batch, such as an image (height, width, channels), is routed as
            a whole, to experts in `LayerExperts`. None: all axes but the last.
        top_k: Integer. Experts per token, if `router` is a name whose router has a `top_k`. With a
            router object, leave it out.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`. A bank without a
            `dtype` takes the dtype of its first layer; `LayerExperts` keep theirs.

    Raises:
        ValueError: If an argument is out of its range, or router and bank disagree on the number
            of experts.
        TypeError: If an argument is of another type.

    Call arguments:
        inputs: (batch, ..., D) float tensor with any number of leading axes. The axes between the
            first and the last are a sequence; of (batch, D) the whole batch is one.
        mask: (batch, ...) bool or integer tensor, False or 0 for padding. Default: the Keras mask
            of the inputs, which `+` and other operations drop.
        training: Boolean. Whether router losses are added, router noise drawn and assignments
            counted.
        return_routing: Boolean. Whether the routing is returned as well.
        token_ids: (batch, ...) integer tensor of vocabulary ids, for `routers.HashRouter`.
        indices: (T, K) integer tensor of experts to replay instead of choosing, such as the
            `indices` of a recorded routing, -1 for none. Weights come from the live scores. An
            expert that is named twice serves and counts twice. The numbers in an array are checked;
            in a tensor, invalid ones count as -1.
        router_inputs: (batch, ..., D'') float tensor that the router sees instead of `inputs`, such
            as wider features (LatentMoE), or a summary of a whole sample.
        return_expert_outputs: Boolean. Whether the outputs of the single experts are returned as
            well, before they are weighted and summed.

    Output shape:
        (batch, ..., D'), with the experts' D'. With `return_routing=True` also an `ops.Routing`.
        With `return_expert_outputs=True` also (batch, ..., K, D'), in the order of the routing's
        `indices`, zero where an assignment is padding or dropped; its sum over K, weighted by the
        routing's `weights`, is the first output without a shared expert.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=256)
    ... )
    >>> outputs, routing = layer(keras.random.normal((2, 10, 64)), return_routing=True)
    >>> outputs.shape, routing.indices.shape
    ((2, 10, 64), (20, 2))

    References: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021 (arXiv:2101.03961).
    """

    # Whether this layer's `get_config` has the experts, rather than a block's around it.
    has_own_config = True
    shares_experts = False

    def __init__(
        self,
        experts: ExpertBank,
        router: str | Router = "top_k",
        router_losses: Sequence | None = None,
        shared_expert: keras.Layer | None = None,
        capacity_factor: float | Capacity | None = None,
        gated_shared_expert: bool = False,
        token_axes: int | None = None,
        top_k: int | None = None,
        **kwargs: Any,
    ):
        for name in _MISPLACED.keys() & kwargs.keys():
            raise TypeError(
                f"`{name}` is an argument of {_MISPLACED[name]}. Received: {name}={kwargs[name]} "
                "for the mixture around it"
            )
        super().__init__(**kwargs)
        self.experts = expert_bank.get(experts)
        if kwargs.get("dtype") is not None:
            self.experts.inherit_policy(self.dtype_policy)
        by_name = top_k is not None and isinstance(router, str)
        arguments = {"top_k": check_integer("top_k", top_k)} if by_name else {}
        self.router = routers.get(router, self.experts.num_experts, **arguments)
        if top_k is not None and self.router.top_k != min(top_k, self.experts.num_experts):
            raise ValueError(
                "`top_k` must be left out or agree with the `router`. Received: "
                f"top_k={top_k}, router.top_k={self.router.top_k}"
            )
        self._names_top_k = top_k is not None
        if self.router.num_experts != self.experts.num_experts:
            raise ValueError(
                "`router` and `experts` must have the same number of experts. Received: "
                f"router.num_experts={self.router.num_experts}, "
                f"experts.num_experts={self.experts.num_experts}. How many experts serve a token "
                "is the router's `top_k`."
            )
        if router_losses is None:
            router_losses = self.router.default_losses
        self.router_losses = losses.get_list(router_losses)
        self.shared_expert: Any = shared_expert
        if shared_expert is not None:
            self.shared_expert = resolve("shared_expert", shared_expert, keras.Layer)
        self.capacity = Capacity.get(capacity_factor)
        if self.capacity is not None and not self.router.tokens_choose:
            raise ValueError(
                "`capacity_factor` limits how many tokens choose an expert. Received: "
                f"capacity_factor={shortened(capacity_factor)} with a "
                f"`{type(self.router).__name__}`, which is not a token-choice router"
            )
        # Owned by the layer, so that Keras carries its state through compiled steps.
        self._capacity_seed = keras.random.SeedGenerator() if self.capacity else None
        self.gated_shared_expert = bool(gated_shared_expert)
        self.shared_gate = None
        if gated_shared_expert:
            if shared_expert is None:
                raise ValueError("`gated_shared_expert=True` needs a `shared_expert`")
            policy = expert_bank.in_floats(self.dtype_policy)
            self.shared_gate = _Gate(1, "sigmoid", use_bias=False, dtype=policy, name="shared_gate")
        self.token_axes = None if token_axes is None else check_integer("token_axes", token_axes)
        sublayers.freeze_parts(self)
        # Experts (T, K) to replay, which `inspection` sets.
        self.replayed_indices = None

    @property
    def top_k(self):
        return self.router.top_k

    @property
    def capacity_factor(self):
        return None if self.capacity is None else self.capacity.factor

    def build(self, inputs_shape, router_inputs_shape=None):
        token_shape = self._token_shape(inputs_shape)
        axes = {axis - len(token_shape): size for axis, size in enumerate(token_shape)}
        self.input_spec = keras.layers.InputSpec(min_ndim=len(token_shape) + 1, axes=axes)
        if not self.router.built:
            seen = token_shape
            if router_inputs_shape is not None:
                seen = self._token_shape(router_inputs_shape)
            self.router.build((None, math.prod(seen)))
        if not self.experts.built:
            self.experts.build((None, *token_shape))
        for part in (self.router,) if self.shares_experts else (self.router, self.experts):
            if part.is_used and part.weights:
                warnings.warn(
                    f"`{part.name}` is in two layers, of which `{self.name}` is the second: they "
                    "share its weights. If that is not meant, make one for each.",
                    stacklevel=2,
                )
        if not self.router.tokens_choose and self._num_axes(inputs_shape) == 1:
            warnings.warn(
                f"Experts choose among all samples of the batch with the "
                f"`{type(self.router).__name__}` of `{self.name}`: outputs depend on the rest of "
                "the batch, in `predict` too.",
                stacklevel=2,
            )
        if self.shared_expert is not None:
            self._build_shared_expert(inputs_shape)
        self._build_usage(self.experts.num_experts)
        self.router.is_used = self.experts.is_used = True

    def _build_shared_expert(self, inputs_shape):
        shape = sublayers.build_and_measure(
            "shared_expert", self.shared_expert, inputs_shape, self.token_axes
        )
        expected, num_axes = self.compute_output_shape(inputs_shape), self._num_axes(inputs_shape)
        if tuple(shape[num_axes:]) != tuple(expected[num_axes:]):
            raise ValueError(
                "`shared_expert` must return as many features as `experts`. Received: "
                f"shape {tuple(shape)} from shared_expert, {tuple(expected)} from experts"
            )
        self._shared_takes_mask = bool(sublayers.accepted_arguments(self.shared_expert, ("mask",)))
        if self.shared_gate is not None:
            if len(expected) > num_axes + 1:
                raise ValueError(
                    "`gated_shared_expert=True` needs tokens that are vectors. "
                    f"Received: outputs of shape {expected}, token_axes={self.token_axes}"
                )
            if not self.shared_gate.built:
                self.shared_gate.build(inputs_shape)

    def _num_axes(self, inputs_shape):
        """Number of the leading axes, which count tokens."""
        return self.token_axes or len(inputs_shape) - 1

    def _token_shape(self, inputs_shape):
        num_axes = self._num_axes(inputs_shape)
        shape = tuple(inputs_shape[num_axes:])
        if None in shape or not shape or not num_axes:
            raise ValueError(
                "`inputs` must have at least one axis of tokens and a known shape of each token. "
                f"Received: inputs.shape={tuple(inputs_shape)}, token_axes={self.token_axes}"
            )
        return shape

    def __call__(self, *args, **kwargs):
        if "indices" in kwargs:  # Keras turns arrays into tensors, whose numbers are not looked at.
            check_indices("indices", kwargs["indices"], self.router.num_experts)
        for name in ("router_inputs", "mask"):
            if isinstance(kwargs.get(name), (list, tuple)):
                kwargs[name] = np.asarray(kwargs[name])
        returned = super().__call__(*args, **kwargs)
        if isinstance(returned, tuple):
            self._pass_mask_on(*returned)
        return returned

    def compute_mask(self, inputs, previous_mask):
        if previous_mask is None:
            return None
        # One of parts of a sample goes on if the outputs have these parts.
        num_axes = len(previous_mask.shape)
        shape = tuple(self.compute_output_shape(inputs.shape))
        is_kept = num_axes < len(shape) and shape[:num_axes] == tuple(inputs.shape[:num_axes])
        return previous_mask if is_kept else None

    def _pass_mask_on(self, outputs, *others):
        """Give the mask of the outputs to a routing and to the outputs of single experts."""
        mask, num_axes = get_keras_mask(outputs), self._num_axes(outputs.shape)
        if mask is None or len(mask.shape) != num_axes:
            return
        for each in others:
            if isinstance(each, Routing):
                for field in (each.indices, each.weights, each.probs, each.logits):
                    set_keras_mask(field, keras_ops.reshape(mask, (-1,)))
            else:  # An expert is one more axis, and losses take masks of all axes but the last.
                mask_of_each = keras_ops.expand_dims(mask, -1)
                set_keras_mask(each, keras_ops.repeat(mask_of_each, each.shape[num_axes], axis=-1))

    @effects_once
    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
        token_ids: Tensor | None = None,
        indices: Tensor | None = None,
        router_inputs: Tensor | None = None,
        return_expert_outputs: bool = False,
    ) -> Tensor | tuple:
        # Flatten: inputs (batch, ..., D) are T = batch * ... tokens. Padding becomes zero.
        mask = self._check_call(inputs, mask, router_inputs, token_ids)
        leading, sequence_length = self._leading(inputs)
        tokens = self._flatten(inputs, mask)

        # Route: the router chooses K experts for each token, and weights for their outputs.
        seen = tokens if router_inputs is None else self._flatten(router_inputs, mask)
        routing = self._route(seen, mask, sequence_length, training, token_ids, indices)

        # Plan: which expert serves which token. A capacity may drop some; the bank sorts them.
        plan = self._plan(routing, sequence_length, training)
        routing = routing._replace(dropped=plan.dropped_fraction(routing.counts))

        # Compute: each expert computes its tokens; their outputs are weighted and summed.
        if return_expert_outputs:
            expert_outputs = plan.serve_each(self.experts, tokens, routing)
            outputs = _weighted_sum(expert_outputs, routing.weights)
            expert_outputs = self._unflatten(expert_outputs, leading)
        else:
            outputs = plan.serve(self.experts, tokens)
        outputs = self._unflatten(outputs, leading)
        if self.shared_expert is not None:
            clean = keras_ops.reshape(tokens, keras_ops.shape(inputs))
            outputs = outputs + self._compute_shared(clean, mask)

        # Account: in training, add the router losses and count the assignments.
        self._account(tokens, routing, sequence_length, training)
        returned = [outputs]
        if return_routing:
            returned.append(routing._replace(details=()))  # They served the plan.
        if return_expert_outputs:
            returned.append(expert_outputs)
        return tuple(returned) if len(returned) > 1 else outputs

    def _check_call(self, inputs, mask, router_inputs=None, token_ids=None):
        """Check the shapes of a call, and return the mask as bools, or None."""
        num_axes = len(inputs.shape) - len(self._token_shape(inputs.shape))  # at least one
        # Keras passes a mask on by itself only if the inputs are the only tensor of a call.
        of_inputs = get_keras_mask(inputs)
        if of_inputs is not None:
            mask = of_inputs if mask is None else mask
            if len(mask.shape) == len(of_inputs.shape) != num_axes:
                mask = None  # of parts of a sample, which only its experts could use
        letters = "abcdefghij"
        axes, sample = letters[:num_axes], letters[num_axes : len(inputs.shape)].upper()
        given = {"inputs": (inputs, axes + sample, "float")}
        if router_inputs is not None:
            own = "RSTUVW"[: len(router_inputs.shape) - num_axes if self.token_axes else 1]
            given["router_inputs"] = (router_inputs, axes + own, "float")
        if mask is not None:
            mask = keras_ops.convert_to_tensor(mask)
            given["mask"] = (mask, axes, "mask")
        if token_ids is not None:
            given["token_ids"] = (keras_ops.convert_to_tensor(token_ids), axes, "int")
        check_tensors(None, **given)
        return None if mask is None else keras_ops.cast(mask, "bool")

    def _leading(self, inputs):
        """The sizes of the axes that count tokens, and the length of a sequence.

        A sequence is all axes but the first, at least 1; None where each token is by itself.
        """
        shape = keras_ops.shape(inputs)
        leading = shape[: self._num_axes(shape)]
        return leading, at_least(1, math.prod(leading[1:])) if len(leading) > 1 else None

    def _route(self, tokens, mask, sequence_length, training, token_ids=None, indices=None):
        return self.router(
            keras_ops.reshape(tokens, (-1, math.prod(tokens.shape[1:]))),
            mask=None if mask is None else keras_ops.reshape(mask, (-1,)),
            training=training,
            sequence_length=sequence_length,
            token_ids=token_ids,
            indices=self.replayed_indices if indices is None else indices,
        )

    def _plan(self, routing, sequence_length, training):
        plan = self.router.plan(routing)
        if self.capacity is not None:
            limited = self.experts.num_capacity_limited
            plan = self.capacity.admit(
                plan, routing, sequence_length, training, self._capacity_seed, limited
            )
        return plan

    def _flatten(self, inputs, mask):
        """Tokens (T, ...) of inputs, zero where a mask (batch, ...) is False."""
        if mask is not None:
            # Padding may hold anything, NaN included, which no product with a zero weight removes.
            inputs = _zero_padding(inputs, mask)
        return keras_ops.reshape(inputs, (-1, *inputs.shape[self.token_axes or -1 :]))

    def _unflatten(self, values, leading):
        values = keras_ops.reshape(values, (*leading, *values.shape[1:]))
        return keras_ops.cast(values, self.compute_dtype)

    def _compute_shared(self, inputs, mask):
        arguments = {"mask": mask} if self._shared_takes_mask else {}
        shared = self.shared_expert(inputs, **arguments)
        sublayers.check_output("shared_expert", shared, self.compute_output_shape(inputs.shape))
        shared = keras_ops.cast(shared, self.compute_dtype)
        if self.shared_gate is not None:
            shared = shared * self.shared_gate(inputs)
        return shared if mask is None else _zero_padding(shared, mask)

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def compute_output_shape(self, inputs_shape, router_inputs_shape=None):
        outputs_shape = self.experts.compute_output_shape((None, *self._token_shape(inputs_shape)))
        return (*inputs_shape[: self._num_axes(inputs_shape)], *outputs_shape[1:])

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        training=None,
        return_routing=False,
        token_ids=None,
        indices=None,
        router_inputs=None,
        return_expert_outputs=False,
    ):
        if self._check_call(inputs, mask, router_inputs, token_ids) is None:
            sublayers.warn_of_lost_mask(self, inputs)
        shape, num_axes = self.compute_output_shape(inputs.shape), self._num_axes(inputs.shape)
        sizes = inputs.shape[:num_axes]
        tokens = keras.KerasTensor((None if None in sizes else math.prod(sizes), None))
        routing = self.router.compute_output_spec(tokens, token_ids=token_ids, indices=indices)
        returned = [keras.KerasTensor(shape, self.compute_dtype)]
        returned += [routing] if return_routing else []
        if return_expert_outputs:
            shape = (*sizes, routing.indices.shape[1], *shape[num_axes:])
            returned.append(keras.KerasTensor(shape, self.compute_dtype))
        return tuple(returned) if len(returned) > 1 else returned[0]

    def get_config(self):
        return {
            **super().get_config(),
            "experts": config_of(self.experts),
            "router": config_of(self.router),
            "router_losses": [config_of(loss) for loss in self.router_losses],
            "shared_expert": config_of(self.shared_expert),
            "gated_shared_expert": self.gated_shared_expert,
            "capacity_factor": config_of(self.capacity),
            "token_axes": self.token_axes,
            "top_k": self.router.top_k if self._names_top_k else None,  # surgery may change it
        }


class _Gate(keras.layers.Dense):
    def quantize(self, mode, type_check=True, config=None):
        """Do nothing: it has one column. Keras calls this for every layer."""


def _zero_padding(values, mask):
    """Values (batch, ..., ...), zero where a mask (batch, ...) is False."""
    for _ in range(len(values.shape) - len(mask.shape)):
        mask = keras_ops.expand_dims(mask, -1)
    return keras_ops.where(mask, values, keras_ops.zeros((), values.dtype))


def _weighted_sum(expert_outputs, weights):
    """(T, ...), the float32 sums of outputs (T, K, ...) by weights (T, K)."""
    outputs = keras_ops.cast(expert_outputs, "float32")
    for _ in range(len(outputs.shape) - 2):
        weights = keras_ops.expand_dims(weights, -1)
    return keras_ops.sum(outputs * weights, axis=1)
