"""The mixture of experts: choose, plan, compute and combine.

Axes: T tokens, all leading axes of the inputs flattened; D features of a token; E experts; K
experts of a token.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_indices, check_integer, host_values, shortened
from keras_moe._internal.serialization import config_of, register, resolve
from keras_moe.backend import backend
from keras_moe.layers import expert_bank, sublayers
from keras_moe.layers.capacity import Capacity
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.feed_forward_experts import FeedForwardExperts
from keras_moe.layers.gate import Gate
from keras_moe.layers.layer_experts import LayerExperts
from keras_moe.layers.tokens import Tokens, check_call, pass_mask_on, token_shape, zero_padding
from keras_moe.ops.routing import Routing
from keras_moe.ops.soft import SoftPlan
from keras_moe.routers.router import Router


@register
class MixtureOfExperts(Gate):
    """Routes each token to its top-K experts; the cost grows with K, not with E.

    It can replace the feed-forward layer of a Transformer, or any `Dense` layer. Alias:
    `layers.MoE`. By default no token is dropped, so outputs do not depend on the rest of the batch.

    In training the layer adds its router losses and counts the assignments of each expert in the
    weight `expert_counts` (E,), which `callbacks.ExpertMonitor` reports after each epoch. Padding,
    where the mask is False, is not routed, not counted and in no loss. Its output is 0.

    Args:
        experts: Bank of experts, such as `GatedExperts`; a list of Keras layers or models, for
            `LayerExperts`; or an integer, `num_experts`.
        router: Router, or a name for `routers.get`. Its number of experts is the bank's by default.
        router_losses: None for the router's `default_losses`, for most `("load_balance",
            "router_z")`; `[]` for no losses; or a list of losses or their names, see `losses.get`.
        shared_expert: Keras layer that processes every token, its output added to that of the
            chosen experts, or None. DeepSeekMoE (arXiv:2401.06066), section 3.2.
        capacity_factor: Positive float, the factor of a `Capacity` with its defaults; a `Capacity`;
            or None for no limit. Zero-computation experts are never limited.
        gated_shared_expert: Boolean. Whether the shared expert's output is multiplied by a gate of
            each token, `sigmoid(x g)` with a learned g (D, 1), as in Qwen1.5-MoE.
        token_axes: Integer. Number of leading axes that count tokens; the others are a token's
            shape. 1: each sample of a batch, such as an image (height, width, channels), is routed
            as a whole, to experts in `LayerExperts`. None: all axes but the last.
        top_k: Integer. Experts per token, if `router` is a name whose router has a `top_k`. With a
            router object, leave it out.
        num_experts: Integer. Number of `FeedForwardExperts`, which the layer then makes itself.
        hidden_dim: Integer. Their hidden width.
        activation: String, function or Keras layer. Their activation, by default "gelu".
        output_dim: Integer. Number of output features, by default as many as the inputs have.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`. A bank without a
            `dtype` takes the dtype of its first layer; `LayerExperts` keep theirs.

    Raises:
        ValueError: If an argument is out of its range, or router and bank disagree on the number
            of experts.

    Call arguments:
        inputs: (batch, ..., D) float tensor with any number of leading axes. The axes between the
            first and the last are a sequence; of (batch, D) the whole batch is one.
        mask: (batch, ...) bool or integer tensor, False or 0 for padding. Default: the Keras mask
            of the inputs, which is lost by `+` and some other operations.
        training: Boolean. Whether router losses are added, noise drawn and assignments counted.
        return_routing: Boolean. Whether the routing is returned as well. In a functional model it
            has only the fields of tokens: without `counts`, `dropped` and `load`.
        token_ids: (batch, ...) integer tensor of vocabulary ids, for `routers.HashRouter`.
        indices: (T, K) integer tensor of experts to use instead of new choices, such as the
            `indices` of a recorded routing, -1 for none. Weights come from the current scores. The
            numbers in an array are checked; in a tensor, invalid ones count as -1.
        router_inputs: (batch, ..., D'') float tensor that the router gets instead of `inputs`, such
            as wider features (LatentMoE), or a summary of a whole sample.
        return_expert_outputs: Boolean. Whether each expert's output is returned as well.

    Output shape:
        (batch, ..., D'), with the experts' D'. With `return_routing=True` also an `ops.Routing`.
        With `return_expert_outputs=True` also (batch, ..., K, D'), in the order of the routing's
        `indices`, zero where an assignment is padding or dropped; its sum over K, weighted by the
        routing's `weights`, is the first output without a shared expert.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(num_experts=8, hidden_dim=256)
    >>> outputs, routing = layer(keras.random.normal((2, 10, 64)), return_routing=True)
    >>> outputs.shape, routing.indices.shape
    ((2, 10, 64), (20, 2))

    References: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021 (arXiv:2101.03961).
    """

    # The config holds a bank instead.
    fixed_arguments = ("num_experts", "hidden_dim", "activation", "output_dim")

    def __init__(
        self,
        experts: ExpertBank | Sequence[keras.Layer] | int | None = None,
        router: str | Router = "top_k",
        router_losses: Sequence | None = None,
        shared_expert: keras.Layer | None = None,
        capacity_factor: float | Capacity | None = None,
        gated_shared_expert: bool = False,
        token_axes: int | None = None,
        top_k: int | None = None,
        num_experts: int | None = None,
        hidden_dim: int | None = None,
        activation: str | Callable | None = None,
        output_dim: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if isinstance(router, (int, np.integer)):
            rule = f"`router` must not be a number: did you mean `hidden_dim={router}`?"
            raise TypeError(f"{rule} Received: router={router}")
        self.experts = _bank_of(experts, num_experts, hidden_dim, activation, output_dim)
        if kwargs.get("dtype") is not None:
            self.experts.inherit_policy(self.dtype_policy)
        number = self.experts.num_experts
        by_name = top_k is not None and isinstance(router, str)
        arguments = {"top_k": check_integer("top_k", top_k)} if by_name else {}
        self._set_gate(router, number, router_losses, capacity_factor, **arguments)
        if top_k is not None and self.router.top_k != min(top_k, number):
            rule = "`top_k` must be left out or agree with the `router`"
            raise ValueError(f"{rule}. Received: top_k={top_k}, router.top_k={self.router.top_k}")
        self._names_top_k = top_k is not None
        self.shared_expert: Any = shared_expert
        if shared_expert is not None:
            self.shared_expert = resolve("shared_expert", shared_expert, keras.Layer)
        elif gated_shared_expert:
            raise ValueError("`gated_shared_expert=True` needs a `shared_expert`")
        self.gated_shared_expert, self.shared_gate = bool(gated_shared_expert), None
        if gated_shared_expert:
            policy = expert_bank.in_floats(self.dtype_policy)
            self.shared_gate = _SharedGate(dtype=policy, name="shared_gate")
        self.token_axes = None if token_axes is None else check_integer("token_axes", token_axes)
        sublayers.freeze_parts(self)

    @property
    def banks(self):
        return [self.experts]

    @property
    def capacity_factor(self) -> float | None:
        """The factor of the capacity in training, or None."""
        return None if self.capacity is None else self.capacity.factor

    def build(self, inputs_shape, router_inputs_shape=None):
        of_token = token_shape(inputs_shape, self.token_axes)
        axes = {axis - len(of_token): size for axis, size in enumerate(of_token)}
        self.input_spec = keras.layers.InputSpec(min_ndim=len(of_token) + 1, axes=axes)
        num_axes = len(inputs_shape) - len(of_token)
        if not self.router.tokens_choose and num_axes == 1:
            warnings.warn(
                f"Experts choose among all samples of the batch with the "
                f"`{type(self.router).__name__}` of `{self.name}`: outputs depend on the rest of "
                "the batch, in `predict` too.",
                stacklevel=2,
            )
        seen_shape = router_inputs_shape or inputs_shape
        self._build_gate(math.prod(token_shape(seen_shape, num_axes, "router_inputs")))
        if not self.experts.built:
            self.experts.build((None, *of_token))
        if self.shared_expert is not None:
            self._build_shared_expert(inputs_shape)

    def _build_shared_expert(self, inputs_shape):
        shape = sublayers.build_and_measure(
            "shared_expert", self.shared_expert, inputs_shape, self.token_axes
        )
        expected = self.compute_output_shape(inputs_shape)
        num_axes = self.token_axes or len(inputs_shape) - 1
        if tuple(shape[num_axes:]) != tuple(expected[num_axes:]):
            rule = "`shared_expert` must return as many features as `experts`"
            received = f"shape {tuple(shape)} from shared_expert, {tuple(expected)} from experts"
            raise ValueError(f"{rule}. Received: {received}")
        if self.shared_gate is not None:
            if len(expected) > num_axes + 1:
                rule = "`gated_shared_expert=True` needs tokens that are vectors"
                received = f"outputs of shape {expected}, token_axes={self.token_axes}"
                raise ValueError(f"{rule}. Received: {received}")
            if not self.shared_gate.built:
                self.shared_gate.build(inputs_shape)

    @backend.uncompiled
    def __call__(self, *args, **kwargs):
        if args and args[0] is None:  # Keras would call `build` without a shape.
            raise TypeError(f"`{self.name}` must be called with tensors. Received: None")
        if "indices" in kwargs:  # Keras turns arrays into tensors, whose numbers are not looked at.
            check_indices("indices", kwargs["indices"], self.router.num_experts)
        mask = host_values(kwargs.get("mask"))
        if mask is not None and mask.dtype.kind in "iu" and not np.isin(mask, (0, 1)).all():
            rule = "`mask` must be True or 1 where a token is real, else False or 0"
            raise ValueError(f"{rule}. Received: numbers from {mask.min()} to {mask.max()}")
        for name in ("router_inputs", "mask"):
            if isinstance(kwargs.get(name), (list, tuple)):
                kwargs[name] = np.asarray(kwargs[name])
        returned = super().__call__(*args, **kwargs)
        if isinstance(returned, tuple):
            if self.activity_regularizer is not None:
                rule = "`activity_regularizer` must be None where a layer returns several results"
                fix = "use `keras.layers.ActivityRegularization` after the layer"
                received = f"{len(returned)} results of `{self.name}`"
                raise ValueError(f"{rule}: {fix}. Received: {received}")
            pass_mask_on(self.token_axes or len(returned[0].shape) - 1, *returned)
            outputs, second, *third = returned
            if isinstance(outputs, keras.KerasTensor) and isinstance(second, Routing):
                # `predict` joins what a model returns for its batches along the first axis.
                return outputs, second._replace(counts=(), dropped=(), load=()), *third
        return returned

    def compute_mask(self, inputs, previous_mask):
        if previous_mask is None:
            return None
        # A mask of parts of a sample is passed on if the outputs have the same parts.
        num_axes = len(previous_mask.shape)
        shape = tuple(self.compute_output_shape(inputs.shape))
        is_kept = num_axes < len(shape) and shape[:num_axes] == tuple(inputs.shape[:num_axes])
        return previous_mask if is_kept else None

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
        tokens = Tokens.of(inputs, mask, self.token_axes, router_inputs, token_ids)

        # Choose: the router picks K experts for each token. In training it is counted, too.
        routing, experts = self.choose(tokens, training, token_ids, indices)

        # Plan: the tokens of each expert become a group of rows.
        plan = self.router.plan(routing, experts)

        # Compute and combine: each expert computes its tokens, whose outputs are summed by weight.
        if return_expert_outputs:
            if isinstance(plan, SoftPlan):
                rule = "`return_expert_outputs` needs a router that assigns tokens to experts"
                raise ValueError(f"{rule}. Received: a soft router, whose experts mix tokens")
            expert_outputs = self.experts.compute_each(tokens.values, plan, training)
            outputs = _weighted_sum(expert_outputs, routing.weights)
        else:
            outputs = self.experts(tokens.values, plan, training=training)
        outputs = tokens.unflatten(outputs, self.compute_dtype)
        if self.shared_expert is not None:
            outputs = outputs + self._shared_outputs(tokens, training)

        returned = [outputs]
        if return_routing:
            returned.append(routing)
        if return_expert_outputs:
            returned.append(tokens.unflatten(expert_outputs, self.compute_dtype))
        return tuple(returned) if len(returned) > 1 else outputs

    def _shared_outputs(self, tokens, training):
        """The outputs of the shared expert, times its gate; zero where tokens are padding."""
        mask = None if tokens.mask is None else ops.reshape(tokens.mask, tokens.sizes)
        inputs = ops.reshape(tokens.values, (*tokens.sizes, *tokens.values.shape[1:]))
        shape, layer = self.compute_output_shape(inputs.shape), self.shared_expert
        arguments = {"mask": mask, "training": training}
        outputs = sublayers.call_part("shared_expert", layer, inputs, shape, **arguments)
        outputs = ops.cast(outputs, self.compute_dtype)
        if self.shared_gate is not None:
            outputs = outputs * self.shared_gate(inputs)
        return outputs if mask is None else zero_padding(outputs, mask)

    def compute_output_shape(self, inputs_shape, router_inputs_shape=None):
        outputs_shape = self.experts.compute_output_shape(
            (None, *token_shape(inputs_shape, self.token_axes))
        )
        num_axes = self.token_axes or len(inputs_shape) - 1
        return (*inputs_shape[:num_axes], *outputs_shape[1:])

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
        num_axes = self.token_axes or len(inputs.shape) - 1
        if check_call(inputs, mask, num_axes, router_inputs, token_ids) is None:
            sublayers.warn_of_lost_mask(self, inputs)
        shape = self.compute_output_shape(inputs.shape)
        sizes = inputs.shape[:num_axes]
        returned = [keras.KerasTensor(shape, self.compute_dtype)]
        if return_routing:
            length = None if None in sizes else math.prod(sizes)
            seen = inputs if router_inputs is None else router_inputs
            tokens = keras.KerasTensor((length, math.prod(token_shape(seen.shape, num_axes))))
            ids = None if token_ids is None else keras.KerasTensor((length,), "int32")
            returned.append(self.router.compute_output_spec(tokens, token_ids=ids))
        if return_expert_outputs:
            shape = (*sizes, self.router.max_top_k, *shape[num_axes:])
            returned.append(keras.KerasTensor(shape, self.compute_dtype))
        return tuple(returned) if len(returned) > 1 else returned[0]

    def get_config(self):
        return {
            **super().get_config(),
            "capacity_factor": config_of(self.capacity),
            "top_k": self.router.top_k if self._names_top_k else None,  # surgery may change it
        }


class _SharedGate(keras.layers.Dense):
    """A gate of each token, `sigmoid(x g)`."""

    def __init__(self, **kwargs):
        super().__init__(1, "sigmoid", use_bias=False, **kwargs)

    def quantize(self, mode, type_check=True, config=None):
        """Do nothing: it has one column. Keras calls this for every layer."""


def _bank_of(experts, *arguments):
    """The bank given as `experts`, or a new one of a list of layers or of other arguments."""
    named = zip(MixtureOfExperts.fixed_arguments, arguments)
    given = {name: value for name, value in named if value is not None}
    if isinstance(experts, (int, np.integer)) and "num_experts" not in given:
        experts, given = None, {"num_experts": experts, **given}
    if experts is not None and given:
        rule = "`MixtureOfExperts` got multiple values for its experts: give them to the bank"
        raise TypeError(f"{rule}. Received: {given}, experts={shortened(experts)}")
    if given:
        return FeedForwardExperts(**{"num_experts": None, "hidden_dim": None, **given})
    if isinstance(experts, (list, tuple)) and len(experts):
        return LayerExperts(experts)
    return expert_bank.get(experts)


def _weighted_sum(expert_outputs, weights):
    """(T, ...), the float32 sums of outputs (T, K, ...) by weights (T, K)."""
    outputs = ops.cast(expert_outputs, "float32")
    for _ in range(len(outputs.shape) - 2):
        weights = ops.expand_dims(weights, -1)
    return ops.sum(outputs * weights, axis=1)
