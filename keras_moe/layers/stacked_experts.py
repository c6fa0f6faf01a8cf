"""Banks with stacked kernels: LoRA, integers, and what a file has of them."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.keras_internals import let_go
from keras_moe._internal.lora import (
    Adaptable,
    adaptable_from_config,
    corrected_stack,
    factors_for,
    forget_corrections,
)
from keras_moe._internal.validation import check_choice, check_has, shortened
from keras_moe.layers.expert_bank import ExpertBank, check_is_built
from keras_moe.layers.kernel_adapters import groups_of_rows, low_rank, quantized
from keras_moe.ops.grouped.records import Packed, Quantized


class StackedExperts(Adaptable, ExpertBank):
    """Abstract: a bank whose projections have kernels (E, D, H), and may have biases (E, H).

    A subclass names its up projections in `up_names`, and has the weights `{name}_kernel` and
    `{name}_bias`, or None, of each of them and of `down`. In `processes` it says whether processes
    share its experts.
    """

    up_names: tuple[str, ...] = ()

    def __init__(self, num_experts, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.processes: Any = None

    def _post_build(self):
        check_has("A bank", self, [f"{name}_kernel" for name in self._projections()])
        super()._post_build()

    def _add_integers(self, name, shape):
        """The weights of a quantized kernel (E, D, H)."""
        num_experts, features, width = shape
        parts = [("kernel", shape, "int8"), ("scale", (num_experts, 1, width), "float32")]
        if self.quantization_mode == "int4":
            groups = -(-features // (self._block_size() or features))
            of_groups = (num_experts, groups, width)
            parts = [
                ("kernel", (num_experts, features, -(-width // 2)), "int8"),
                ("scale", of_groups, "float32"),
                ("zero", of_groups, "int8"),
            ]
        for part, part_shape, dtype in parts:
            weight = self.add_weight(
                name=f"{name}_{part}",
                shape=part_shape,
                initializer="zeros",
                dtype=dtype,
                trainable=False,
                autocast=False,
            )
            setattr(self, f"{name}_{part}", weight)

    def take_policy(self, policy):
        if not self.has_own_policy and not self.built:
            self.has_own_policy = True
            self.dtype_policy = policy

    def _policy(self):
        """The policy in force: of a map, that of the bank's path."""
        policy: Any = self.dtype_policy
        is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
        return policy[self.path] if is_map and self.path else policy

    def _block_size(self):
        """Rows that share a scale in "int4", None for all."""
        block_size = getattr(self._policy(), "block_size", -1)
        return None if block_size == -1 else block_size

    def stacked_kernel(self, name):
        """The kernels of a projection, in the dtype or the integers they are stored in."""
        kernel = ops.convert_to_tensor(getattr(self, f"{name}_kernel"))
        if self.quantization_mode is None:
            return kernel
        scale = ops.convert_to_tensor(getattr(self, f"{name}_scale"))
        if self.quantization_mode == "int8":
            return Quantized(kernel, scale)
        group = groups_of_rows(kernel.shape[1], self._block_size())
        zero = ops.convert_to_tensor(getattr(self, f"{name}_zero"))
        return Packed(kernel, scale, zero, ops.convert_to_tensor(group))

    def stacked_kernels(self):
        """The kernels of all projections."""
        return list(map(self.stacked_kernel, self._projections()))

    def integers_of(self, kernel):
        """An array (E, D, H) in the integers of the bank: what a file has of it, arrays."""
        mode = self.quantization_mode
        return [kernel] if mode is None else _stored(quantized(kernel, mode, self._block_size()))

    def add_factors(self, a_initializer="he_uniform", b_initializer="zeros"):
        for stream, name in enumerate(self._projections()):
            shape, initializers = self.stacked_kernel(name).shape, (a_initializer, b_initializer)
            factors = factors_for(self, f"{name}_kernel", shape, *initializers, stream)
            for letter, factor in zip("ab", factors):
                setattr(self, f"{name}_lora_{letter}", factor)
        self.lora_enabled = True

    def _factors_of(self, name):
        return getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")

    def _projections(self):
        return (*self.up_names, "down")

    def quantize(self, mode, type_check=True, config=None):
        """Keep the kernels as integers with scales; an expert's become floats when it is used.

        Only the weights are quantized. "int8" has a scale for each output of each expert. "int4"
        has two integers in a byte, and a scale and a zero point for each `block_size` inputs of an
        output, or as in "int8", as Keras's `Dense` does.

        Args:
            mode: "int8" or "int4".
            type_check: not used; Keras passes it.
            config: that of Keras, for its `block_size`. Its quantizers are those of other layers.

        Raises:
            NotImplementedError: For any other mode.
        """
        if mode not in ("int8", "int4"):
            raise NotImplementedError(
                'Stacked kernels can be quantized to "int8" and "int4". Received: '
                f"mode={shortened(mode)} for `{self.name}`. Use `quantize('int8')`; for computing "
                "in fewer bits, a policy such as 'mixed_bfloat16'."
            )
        if self.processes is not None:
            raise NotImplementedError(
                "Experts that are split over processes cannot be quantized. Received: "
                f"`{self.name}`, split over {self.processes.num_processes} processes. "
                "Save the model and quantize it in one process."
            )
        kernels = {name: self.merged_kernel(name) for name in self._projections()}
        for name in kernels:
            let_go(self, getattr(self, f"{name}_kernel"))
        self._is_quantized = True
        policy = self._policy()
        if policy.quantization_mode is None:
            block_size = getattr(config, "block_size", None)
            blocks = f"/{block_size}" if mode == "int4" and block_size not in (None, -1) else ""
            self.dtype_policy = keras.dtype_policies.get(f"{mode}{blocks}_from_{policy.name}")
        for name, kernel in kernels.items():
            self._add_integers(name, kernel.shape)
            for part, value in zip(("kernel", "scale", "zero"), self.integers_of(kernel)):
                getattr(self, f"{name}_{part}").assign(value)
        if self.lora_enabled:  # it is in the integers now
            forget_corrections(map(self._factors_of, self._projections()))

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def _low_rank(self):
        if not self.lora_enabled:
            return None
        factors = [self._factors_of(name) for name in self._projections()]
        return low_rank(
            [tuple(map(self._shared_gradient, each)) for each in factors], self.lora_scale()
        )

    def _shared_gradient(self, stacked):
        """What processes that share the experts compute with."""
        return stacked if self.processes is None else self.processes.mean_gradient(stacked)

    def save_own_variables(self, store):
        # A file has all experts, whoever wrote it, and corrections are part of their kernels.
        values = [value for name in self._projections() for value in self._values_of(name)]
        for index, value in enumerate(values):
            store[str(index)] = value

    def _values_of(self, name):
        """What a file has of a projection, arrays."""
        values = [self._whole(weight) for weight in self._weights_of(name)]
        if self.lora_enabled:
            parts = self.integers_of(self.merged_kernel(name))
            values[: len(parts)] = parts
        return values

    def _weights_of(self, name):
        parts = ("kernel", "scale", "zero", "bias")
        weights = [getattr(self, f"{name}_{part}", None) for part in parts]
        return [weight for weight in weights if weight is not None]

    def load_own_variables(self, store):
        own = slice(None)
        if self.processes is not None:
            experts = self.processes.own_experts(self.num_experts)
            own = slice(experts.start, experts.stop)
        weights = [each for name in self._projections() for each in self._weights_of(name)]
        if len(store.keys()) != len(weights):
            raise ValueError(
                f"`{self.name}` has {len(weights)} weights to load. Received: "
                f"{len(store.keys())} in the file. Build the layer with the arguments, and in the "
                "dtype, of the one that was saved."
            )
        for index, weight in enumerate(weights):
            weight.assign(store[str(index)][own])
        if self.lora_enabled:
            forget_corrections(map(self._factors_of, self._projections()))

    def _whole(self, weight):
        weight = weight if self.processes is None else self.processes.whole(weight)
        return ops.convert_to_numpy(weight)

    def merged_kernel(self, name):
        """The kernel of all experts as floats, with what LoRA has learned, an array."""
        check_is_built(self)
        check_choice("name", name, self._projections())
        if self.quantization_mode is None:
            kernel = self._whole(getattr(self, f"{name}_kernel"))
        else:
            stacked = self.stacked_kernel(name)
            kernel = ops.convert_to_numpy(stacked.floats(lambda whole: whole, "float32"))
        if not self.lora_enabled:
            return kernel
        a, b = map(self._whole, self._factors_of(name))
        return corrected_stack(kernel, a, b, self.lora_scale())

    def get_config(self):
        return {**super().get_config(), **self.lora_config()}

    @classmethod
    def from_config(cls, config):
        return adaptable_from_config(cls, super().from_config, config)


def _stored(integers):
    """What is stored of `Quantized` or `Packed` kernels."""
    return list(integers[:3])
