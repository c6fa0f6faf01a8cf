"""Projections: stacked kernels and biases of a bank, with quantization and low-rank factors.

Axes: E experts, D input features, H output features, r rank.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal.base_layer import EachExpert, mark_stack
from keras_moe._internal.keras_internals import untrack
from keras_moe.ops.linears import Int4Kernel, Kernel
from keras_moe.ops.sorting import ceil_divide

# In the order in which they are saved.
_STORED = ("kernel", "scale", "zero", "bias")


def weight_names(name, widths):
    """Names that the weights of a projection may have: a vector is its kernel alone."""
    parts = (*_STORED, "lora_a", "lora_b")
    return [name] if len(widths) == 1 else [f"{name}_{part}" for part in parts]


class Projection:
    """One linear map of each expert, whose kernels are stacked (E, D, H), or a vector (E, H).

    The weights are the bank's, by names such as `up_kernel` and `up_bias`. With "int8" the kernel
    holds integers, and `scale` (E, 1, H) multiplies them. With "int4" a byte of the kernel holds
    two integers, and `scale` and `zero` (E, G, H) hold for G groups of rows.
    """

    def __init__(self, bank, name, stream, is_vector=False):
        self.bank = bank
        self.name = name
        self.is_vector = is_vector
        self.stream = stream  # Kernels of one shape are drawn from different seeds.
        self.kernel: Any = None
        self.bias: Any = None
        self.scale: Any = None
        self.zero: Any = None
        self.lora_a: Any = None
        self.lora_b: Any = None

    def build(self, widths, experts):
        """Add the weights of these widths, for the experts of this process, a range."""
        bank, shape = self.bank, (len(experts), *widths)
        if self.is_vector:
            self._add("kernel", shape, "ones")
            return
        if bank.quantization_mode is not None:
            self.add_integers(shape)
        else:
            self._add(
                "kernel",
                shape,
                initializer=EachExpert(bank.kernel_initializer, self.stream, experts),
                regularizer=bank.kernel_regularizer,
            )
        if bank.use_bias:

            def initialize(shape, dtype=None):
                every_bias = bank.bias_initializer((bank.num_experts, *shape[1:]), dtype=dtype)
                return every_bias[experts.start : experts.stop]

            shape, regularizer = (len(experts), widths[-1]), bank.bias_regularizer
            self._add("bias", shape, initialize, regularizer=regularizer)
        else:
            setattr(bank, f"{self.name}_bias", None)

    def _add(self, part, shape, initializer="zeros", **kwargs):
        name = self._weight_name(part)
        # On JAX, an `ExpertParallel`: it places a variable as soon as it is made.
        split = getattr(keras.distribution.distribution(), "split_by_expert", None)
        if split is not None:
            split(self.bank.name, name)
        # Cast one expert at a time where it is used, not as a whole by Keras.
        weight = self.bank.add_weight(
            name=name, shape=shape, initializer=initializer, autocast=False, **kwargs
        )
        setattr(self, part, mark_stack(weight))
        setattr(self.bank, name, weight)

    def _weight_name(self, part):
        return self.name if self.is_vector else f"{self.name}_{part}"

    def add_integers(self, shape):
        """Add the weights of a quantized kernel of a shape (E, D, H)."""
        num_experts, fan_in, fan_out = shape
        if self.bank.quantization_mode == "int8":
            self._add("kernel", shape, dtype="int8", trainable=False)
            self._add("scale", (num_experts, 1, fan_out), dtype="float32", trainable=False)
            return
        num_groups = ceil_divide(fan_in, self.bank.block_size() or fan_in)
        packed = (num_experts, fan_in, ceil_divide(fan_out, 2))
        self._add("kernel", packed, dtype="int8", trainable=False)
        for part, dtype in (("scale", "float32"), ("zero", "int8")):
            shape_of_groups = (num_experts, num_groups, fan_out)
            self._add(part, shape_of_groups, dtype=dtype, trainable=False)

    def add_factors(self, a_initializer, b_initializer):
        """Add low-rank factors A (E, D, r) and B (E, r, H); the kernel is frozen."""
        (num_experts, fan_in, fan_out), rank = self.shape, self.bank.lora_rank
        self.kernel.trainable = False
        for part, widths, initializer in (
            ("lora_a", (fan_in, rank), a_initializer),
            ("lora_b", (rank, fan_out), b_initializer),
        ):
            initializer = keras.initializers.get(initializer)
            initializer = EachExpert(initializer, self.stream, range(num_experts))
            self._add(part, (num_experts, *widths), initializer, dtype="float32")

    def remove_factors(self):
        for part in ("lora_a", "lora_b"):
            delattr(self.bank, self._weight_name(part))
            setattr(self, part, None)

    @property
    def shape(self):
        """(E, D, H) of the kernel, whatever it is stored in."""
        fan_out = (self.kernel if self.scale is None else self.scale).shape[2]
        return (*self.kernel.shape[:2], fan_out)

    def add_tensors(self, trained, frozen):
        """Add the tensors that get gradients, and the kernels if they get none: see `Problem`."""
        kernels = self.kernels()
        if kernels.bits is None and self.lora_a is None:
            trained[self.name, "kernel"] = kernels.values
        else:
            frozen[self.name] = kernels
        for part in ("bias", "lora_a", "lora_b"):
            if getattr(self, part) is not None:
                trained[self.name, part] = ops.convert_to_tensor(getattr(self, part))
        if self.lora_a is not None:
            trained[self.name, "lora_a"] = trained[self.name, "lora_a"] * self.bank.lora_scale()

    def kernels(self):
        """The kernels of all experts, as a `Kernel` or an `Int4Kernel`."""
        values = ops.convert_to_tensor(self.kernel)
        if self.is_vector:  # a map from one feature, whose input is 1
            values = ops.expand_dims(values, 1)
        scale = None if self.scale is None else ops.convert_to_tensor(self.scale)
        if self.zero is None:
            return Kernel(values, scale)
        num_rows = values.shape[1]
        group = np.arange(num_rows, dtype="int32") // (self.bank.block_size() or num_rows)
        group = ops.convert_to_tensor(np.broadcast_to(group, values.shape[:2]))
        return Int4Kernel(values, scale, ops.convert_to_tensor(self.zero), group)

    def merged_kernel(self):
        """The kernels of all experts as floats (E, D, H), low-rank factors added: an array."""
        if self.scale is None:
            kernel = self._whole(self.kernel)
        else:
            kernel = ops.convert_to_numpy(self.kernels().floats("float32"))
        if self.lora_a is None:
            return kernel
        a, b, scale = self._whole(self.lora_a), self._whole(self.lora_b), self.bank.lora_scale()
        # One expert at a time: the sum is float32.
        return np.stack([(k + scale * (u @ v)).astype(k.dtype) for k, u, v in zip(kernel, a, b)])

    def _whole(self, weight):
        processes = self.bank.processes
        return ops.convert_to_numpy(weight if processes is None else processes.whole(weight))

    def stored(self, kernel):
        """Arrays to store for float kernels (E, D, H): the kernel, scale and zero point."""
        mode, block_size = self.bank.quantization_mode, self.bank.block_size()
        if mode is None:
            return [kernel]
        kernel = np.asarray(kernel, "float32")
        convert = _to_int8 if mode == "int8" else lambda one: _to_int4(one, block_size)
        return [np.stack(parts) for parts in zip(*map(convert, kernel))]

    def set_kernel(self, kernel):
        """Store float kernels (E, D, H), as integers if the bank is quantized."""
        for part, value in zip(_STORED, self.stored(kernel)):
            getattr(self, part).assign(value)
        self.forget_factors()

    def forget_factors(self):
        """Make the low-rank correction zero."""
        if self.lora_b is not None:
            self.lora_b.assign(ops.zeros(self.lora_b.shape))

    def take_kernel(self):
        """Remove the float kernel from the bank and return it, `merged_kernel`."""
        kernel = self.merged_kernel()
        untrack(self.bank, self.kernel)
        return kernel

    def weights(self):
        """The variables that are saved, in order."""
        weights = (getattr(self, part) for part in _STORED)
        return [weight for weight in weights if weight is not None]

    def save(self):
        """Arrays for a checkpoint, which always contains all experts, factors merged."""
        values = [self._whole(weight) for weight in self.weights()]
        if self.lora_a is not None:
            stored = self.stored(self.merged_kernel())
            values[: len(stored)] = stored
        return values


def _to_int8(kernel, largest=127):
    scale = np.maximum(np.abs(kernel).max(0, keepdims=True), 1e-7) / largest
    return np.rint(kernel / scale).astype("int8"), scale.astype("float32")


def _to_int4(kernel, block_size):
    if block_size is None:
        values, scale = _to_int8(kernel, largest=7)
        zero = np.zeros(scale.shape, "int8")
    else:
        # As in the `Dense` layer of Keras.
        values, scale, zero = map(
            ops.convert_to_numpy,
            keras.quantizers.abs_max_quantize_grouped_with_zero_point(
                kernel, block_size=block_size, to_numpy=True
            ),
        )
    packed, _, _ = keras.quantizers.pack_int4(values, axis=-1)
    return ops.convert_to_numpy(packed), scale.astype("float32"), zero
