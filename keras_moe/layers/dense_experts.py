"""What banks of feed-forward networks with stacked kernels have in common."""

import keras
from keras import ops

from keras_moe._internal.initializers import EachExpert, initial
from keras_moe._internal.keras_objects import (
    CheckedRegularizer,
    get_activation,
    get_initializer,
    get_regularizer,
)
from keras_moe._internal.shape_checks import check_inputs_shape
from keras_moe._internal.validation import check_flag, check_positive_integer
from keras_moe.backend import backend
from keras_moe.layers.expert_bank import check_engine_question
from keras_moe.layers.stacked_experts import StackedExperts
from keras_moe.ops.feed_forward import _grouped_feed_forward
from keras_moe.ops.grouped import engine_on
from keras_moe.ops.grouped.records import Affine, Network


class DenseExperts(StackedExperts):
    """Abstract: feed-forward experts whose kernels are stacked with the expert axis first.

    A subclass names its up projections in `up_names`.
    """

    # Of experts with a gate.
    clip: float | None = None
    up_shift = 0.0

    _attribute_checks = {
        "hidden_dim": check_positive_integer,
        "activation": get_activation,
        "use_bias": check_flag,
        "kernel_initializer": get_initializer,
        "bias_initializer": get_initializer,
        "kernel_regularizer": get_regularizer,
        "bias_regularizer": get_regularizer,
    }
    _fixed_attributes = (
        "hidden_dim",
        "use_bias",
        "kernel_initializer",
        "bias_initializer",
        "kernel_regularizer",
        "bias_regularizer",
    )

    def __init__(
        self,
        num_experts,
        hidden_dim,
        activation,
        use_bias,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.bias_initializer = bias_initializer
        self.kernel_regularizer = kernel_regularizer
        self.bias_regularizer = bias_regularizer

    def build(self, tokens_shape):
        check_inputs_shape(tokens_shape)
        self.processes = backend.expert_processes()
        if self.processes is None:
            experts = range(self.num_experts)
        else:
            experts = self.processes.own_experts(self.num_experts)
        features = tokens_shape[-1]
        widths = [(name, features, self.hidden_dim) for name in self.up_names]
        widths.append(("down", self.hidden_dim, features))
        for stream, (name, fan_in, fan_out) in enumerate(widths):
            shape = (len(experts), fan_in, fan_out)
            if self.quantization_mode is not None:
                self._add_integers(name, shape)
            else:
                kernel = self.add_weight(
                    name=f"{name}_kernel",
                    shape=shape,
                    initializer=EachExpert(self.kernel_initializer, stream, experts),
                    regularizer=CheckedRegularizer.of(self.kernel_regularizer),
                    autocast=False,  # or those of idle experts would be converted as well
                )
                setattr(self, f"{name}_kernel", kernel)
            bias = None
            if self.use_bias:
                bias = self.add_weight(
                    name=f"{name}_bias",
                    shape=(len(experts), fan_out),
                    initializer=_rows_of(self.bias_initializer, self.num_experts, experts),
                    regularizer=CheckedRegularizer.of(self.bias_regularizer),
                    autocast=False,
                )
            setattr(self, f"{name}_bias", bias)
        if self.quantization_mode is not None:
            self._is_quantized = True
        if self.lora_rank:
            self.add_factors()

    def call(self, tokens, plan):
        scale = self.lora_scale() if self.lora_enabled else None
        network = Network(self.activation, self.clip, self.up_shift, scale)
        return _grouped_feed_forward(
            self._compute(tokens),
            plan,
            network,
            self._affines(),
            self._expert_axis(),
            self.processes,
        )

    def _affines(self):
        low_rank = self._low_rank()
        pairs = zip(low_rank.downs, low_rank.ups) if low_rank else [None] * 3
        biases = self._stacked("bias") if self.use_bias else [None] * 3
        return [Affine(*parts) for parts in zip(self._stacked("kernel"), biases, pairs)]

    def _expert_axis(self):
        return backend.mesh_axis(self.down_kernel) if backend.token_shards() else None

    def _stacked(self, kind):
        """The kernels or biases of all projections, in their own dtype."""
        names = self._projections()
        if kind == "kernel":
            kernels = self.stacked_kernels()
            if self.quantization_mode is not None:
                return kernels
            return list(map(self._shared_gradient, kernels))
        biases = [ops.convert_to_tensor(getattr(self, f"{name}_bias")) for name in names]
        return list(map(self._shared_gradient, biases))

    def compute_output_shape(self, tokens_shape):
        check_inputs_shape(tokens_shape)
        return tuple(tokens_shape)

    def engine_on(self, platform, static_shapes):
        check_engine_question(self, platform, static_shapes)
        return engine_on(platform, static_shapes, self.compute_dtype, self._affines())

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }


def _rows_of(initializer, num_experts, numbers):
    """Some rows of what the initializer gives all experts."""

    def initialize(shape, dtype=None):
        whole = initial(initializer, (num_experts, *shape[1:]), dtype)
        return whole[numbers.start : numbers.stop]

    return initialize
