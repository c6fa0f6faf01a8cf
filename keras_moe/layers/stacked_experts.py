"""Banks with stacked kernels: LoRA, quantization, processes and serialization."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_moe._internal.keras_internals import open_to_state, quantization
from keras_moe._internal.lora import Adaptable
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.projection import Projection
from keras_moe.ops.feed_forward import _all_experts, _grouped_feed_forward
from keras_moe.ops.grouped import engine_on
from keras_moe.ops.grouped.records import Network
from keras_moe.ops.plans import GroupedPlan


class StackedExperts(Adaptable, ExpertBank):
    """Abstract: experts of one shape, each of their projections stacked in one kernel (E, D, H).

    A subclass names its projections in `projection_names`, in the order of a forward pass, and
    implements `widths(features)`. With one projection an expert is an affine map, with two a
    feed-forward network, with three a gated one.
    """

    projection_names: tuple[str, ...] = ()
    # Settings of gated networks.
    clip: float | None = None
    up_shift = 0.0

    def __init__(
        self,
        num_experts: int,
        activation: str | Callable | None,
        use_bias: bool,
        kernel_initializer: str | Callable,
        bias_initializer: str | Callable,
        kernel_regularizer: str | Callable | None,
        bias_regularizer: str | Callable | None,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.activation: Any = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        # Processes that share the experts, each with some of them; None where each has all.
        self.processes: Any = None
        names = enumerate(self.projection_names)
        self.projections = tuple(Projection(self, name, stream) for stream, name in names)

    def projection(self, name: str) -> Projection:
        """Return a projection by its name."""
        return self.projections[self.projection_names.index(name)]

    def widths(self, features: int) -> Sequence[tuple[int, int]]:
        """Return a pair (D, H) for each projection."""
        raise NotImplementedError

    def build(self, tokens_shape):
        if len(tokens_shape) > 2:
            raise ValueError(
                "Experts with stacked kernels take tokens (T, D). Received: tokens of shape "
                f"{tuple(tokens_shape[1:])}. Use `LayerExperts` for whole samples, and "
                "call a bank through a `MixtureOfExperts`"
            )
        self._fix_shape(tokens_shape)
        self._check_activation()
        self.processes = backend.expert_processes()
        experts = range(self.num_experts)
        if self.processes is not None:
            experts = self.processes.own_experts(self.num_experts)
        self._is_quantized = self.quantization_mode is not None
        for projection, widths in zip(self.projections, self.widths(tokens_shape[-1])):
            fan_in, fan_out = widths
            projection.build(fan_in, fan_out, experts)
        if self.lora_rank:
            self.add_factors()

    def _check_activation(self):
        # A layer with weights would run outside of what is differentiated, and never be trained.
        if isinstance(self.activation, keras.Layer):
            if not self.activation.built:
                self.activation(keras.KerasTensor((None, self.widths(1)[0][1])))
            if self.activation.weights:
                raise ValueError(
                    "`activation` must have no weights. Received: "
                    f"activation={self.activation}. Use `LayerExperts` for such experts"
                )

    def call(self, tokens: Tensor, plan: GroupedPlan) -> Tensor:
        kernel = self.projections[0].kernel
        return _grouped_feed_forward(
            self._compute(tokens),
            plan,
            self._network(),
            [projection.tensors() for projection in self.projections],
            expert_axis=backend.mesh_axis(kernel) if backend.token_shards() else None,
            processes=self.processes,
        )

    def compute_all(self, tokens):
        if backend.token_shards() or self.processes is not None:
            return super().compute_all(tokens)
        projections = [projection.tensors() for projection in self.projections]
        return _all_experts(self._compute(tokens), self._network(), projections)

    def _network(self):
        scale = self.lora_scale() if self.lora_enabled else None
        return Network(self.activation, self.clip, self.up_shift, scale)

    def compute_output_shape(self, tokens_shape):
        return (*tokens_shape[:-1], self.widths(tokens_shape[-1])[-1][1])

    def engine_on(self, platform, static_shapes):
        projections = [projection.tensors() for projection in self.projections]
        return engine_on(platform, static_shapes, self.compute_dtype, projections)

    def take_policy(self, policy):
        if not self.has_own_policy and not self.built:
            self.has_own_policy = True
            self.dtype_policy = policy

    def add_factors(self, a_initializer="he_uniform", b_initializer="zeros"):
        for projection in self.projections:
            projection.add_factors(a_initializer, b_initializer)
        self.lora_enabled = True

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Store the kernels as integers with scales; one expert at a time is cast to floats.

        Only the weights are quantized. "int8" has a scale for each output of each expert. "int4"
        has two integers in a byte, and a scale and a zero point for each `block_size` inputs of an
        output, or as in "int8", as the `Dense` layer of Keras does.

        Args:
            mode: String. "int8" or "int4". None: that of `config`.
            type_check: Not used; Keras passes it.
            config: Quantization config of Keras, for its `block_size`. None: the default of `mode`.

        Raises:
            NotImplementedError: For any other mode, or if processes share the experts.
            ValueError: If the bank is not built, or quantized already.
        """
        mode, config = quantization(self, mode, config)
        if mode not in ("int8", "int4"):
            raise NotImplementedError(
                f'`mode` must be "int8" or "int4". Received: mode={mode!r} for `{self.name}`'
            )
        if self.processes is not None:
            raise NotImplementedError(
                "Experts that are split over processes cannot be quantized. Received: "
                f"`{self.name}`, split over {self.processes.num_processes} processes. "
                "Save the model and quantize it in one process."
            )
        projections = self.projections
        with open_to_state(self):
            kernels = [projection.take_kernel() for projection in projections]
            self._is_quantized = True
            policy = self._own_policy()
            if policy.quantization_mode is None:
                block_size = getattr(config, "block_size", None)
                blocks = mode == "int4" and block_size not in (None, -1)
                prefix = f"{mode}/{block_size}" if blocks else mode
                self.dtype_policy = keras.dtype_policies.get(f"{prefix}_from_{policy.name}")
            for projection, kernel in zip(projections, kernels):
                projection.add_integers(kernel.shape)
                projection.set_kernel(kernel)

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def _own_policy(self):
        """The policy in force: of a map of policies, that of the bank's path."""
        policy: Any = self.dtype_policy
        is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
        return policy[self.path] if is_map and self.path else policy

    def block_size(self) -> int | None:
        """Number of rows of a kernel that share a scale in "int4", None for all."""
        block_size = getattr(self._own_policy(), "block_size", -1)
        return None if block_size == -1 else block_size

    def save_own_variables(self, store):
        values = [value for each in self.projections for value in each.save()]
        for index, value in enumerate(values):
            store[str(index)] = value

    def load_own_variables(self, store):
        weights = [weight for each in self.projections for weight in each.weights()]
        if len(store.keys()) != len(weights):
            raise ValueError(
                f"`{self.name}` has {len(weights)} weights to load. Received: {len(store.keys())} "
                "in the file. Build the layer with the arguments and the dtype of the saved one."
            )
        own = slice(None)
        if self.processes is not None:
            experts = self.processes.own_experts(self.num_experts)
            own = slice(experts.start, experts.stop)
        for index, weight in enumerate(weights):
            weight.assign(store[str(index)][own])
        for projection in self.projections:
            projection.forget_factors()

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }
