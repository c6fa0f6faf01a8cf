"""Banks with stacked kernels: LoRA, integers, and what a file has of them."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.keras_internals import let_go, open_to_state
from keras_moe._internal.validation import check_choice, check_positive_number
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.kernel_adapters import (
    add_factors,
    check_can_enable_lora,
    low_rank,
    merged,
    quantize_to_int8,
)


class StackedExperts(ExpertBank):
    """Abstract: a bank whose projections have kernels (E, D, H), and may have biases (E, H).

    A subclass names its up projections in `up_names`, and has the weights `{name}_kernel` and
    `{name}_bias`, or None, of each of them and of `down`. In `processes` it says whether processes
    share its experts.
    """

    up_names: tuple[str, ...] = ()

    def __init__(self, num_experts, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.processes: Any = None
        self.lora_rank: Any = None
        self.lora_alpha: Any = None
        self.lora_enabled = False

    def _add_integers(self, name, shape):
        """The weights of a quantized kernel."""
        for part, part_shape, dtype in (
            ("kernel", shape, "int8"),
            ("scale", (shape[0], 1, shape[2]), "float32"),
        ):
            weight = self.add_weight(
                name=f"{name}_{part}",
                shape=part_shape,
                initializer="zeros",
                dtype=dtype,
                trainable=False,
                autocast=False,
            )
            setattr(self, f"{name}_{part}", weight)

    def enable_lora(self, rank, lora_alpha=None, a_initializer="he_uniform", b_initializer="zeros"):
        """Freeze the kernels and train a correction of low rank for each of them.

        An expert computes `x W + (lora_alpha / rank) (x A) B` with factors `A` (E, D, rank) and `B`
        (E, rank, H), stacked like the kernels: only those of the chosen experts compute, and no
        corrected kernel is made. Saving adds the corrections to the kernels, as Keras does.

        Args:
            rank: rank of the corrections, a positive integer.
            lora_alpha: what the correction is multiplied by, times the rank. None: the rank.
            a_initializer: of each expert's `A`.
            b_initializer: of each expert's `B`; with zeros nothing changes at first.

        Raises:
            ValueError: If the layer is not built, or has LoRA already.

        Reference: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
        """
        check_can_enable_lora(self, rank)
        self.lora_rank = rank
        if lora_alpha is not None:
            lora_alpha = check_positive_number("lora_alpha", lora_alpha)
        self.lora_alpha = rank if lora_alpha is None else lora_alpha
        with open_to_state(self):
            self._add_factors(a_initializer, b_initializer)

    def _add_factors(self, a_initializer, b_initializer):
        for stream, name in enumerate(self._projections()):
            kernel = getattr(self, f"{name}_kernel")
            kernel.trainable = False
            initializers = a_initializer, b_initializer
            factors = add_factors(self, name, stream, kernel.shape, self.lora_rank, *initializers)
            for letter, factor in zip("ab", factors):
                setattr(self, f"{name}_lora_{letter}", factor)
        self.lora_enabled = True

    def _factors_of(self, name):
        return getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")

    def _lora_scale(self):
        return (self.lora_alpha or self.lora_rank) / self.lora_rank

    def _projections(self):
        return (*self.up_names, "down")

    def quantize(self, mode, type_check=True, config=None):
        """Keep the kernels as integers, each output of each expert with a scale of its own.

        Only the weights are quantized; an expert's kernel becomes floats when it is used.

        Args:
            mode: "int8".
            type_check, config: not used; Keras passes them.

        Raises:
            NotImplementedError: For any other mode.
        """
        if mode != "int8":
            raise NotImplementedError(
                'Stacked kernels have one quantization, "int8". Received: '
                f"mode={mode!r} for `{self.name}`. Use `quantize('int8')`."
            )
        if self.processes is not None:
            raise NotImplementedError(
                "Experts that are split over processes cannot be quantized. Received: "
                f"`{self.name}`, split over {self.processes.num_processes} processes. "
                "Save the model and quantize it in one process."
            )
        for name in self._projections():
            kernel = getattr(self, f"{name}_kernel")
            quantized = quantize_to_int8(self.merged_kernel(name))
            let_go(self, kernel)
            self._add_integers(name, quantized.shape)
            getattr(self, f"{name}_kernel").assign(quantized.values)
            getattr(self, f"{name}_scale").assign(quantized.scale)
            if self.lora_enabled:  # it is in the integers now
                factor = getattr(self, f"{name}_lora_b")
                factor.assign(ops.zeros(factor.shape))
        self._is_quantized = True
        policy: Any = self.dtype_policy  # type: ignore[has-type]
        if policy.quantization_mode is None:
            self.dtype_policy = keras.dtype_policies.get(f"{mode}_from_{policy.name}")

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def _low_rank(self):
        if not self.lora_enabled:
            return None
        factors = [self._factors_of(name) for name in self._projections()]
        return low_rank(
            [tuple(map(self._shared_gradient, each)) for each in factors], self._lora_scale()
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
            kernel = self.merged_kernel(name)
            parts = [kernel] if self.quantization_mode is None else quantize_to_int8(kernel)
            values[: len(parts)] = parts
        return values

    def _weights_of(self, name):
        parts = [getattr(self, f"{name}_{part}", None) for part in ("kernel", "scale", "bias")]
        return [weight for weight in parts if weight is not None]

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
        for name in self._projections() if self.lora_enabled else ():
            factor = getattr(self, f"{name}_lora_b")
            factor.assign(ops.zeros(factor.shape))

    def _whole(self, weight):
        weight = weight if self.processes is None else self.processes.whole(weight)
        return ops.convert_to_numpy(weight)

    def merged_kernel(self, name):
        """The kernel of all experts as floats, with what LoRA has learned, an array."""
        check_choice("name", name, self._projections())
        kernel = self._whole(getattr(self, f"{name}_kernel"))
        if self.quantization_mode is not None:
            kernel = kernel * self._whole(getattr(self, f"{name}_scale"))
        if not self.lora_enabled:
            return kernel
        factors = list(map(self._whole, self._factors_of(name)))
        return merged(kernel, factors, self._lora_scale())

    def get_config(self):
        lora = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        return {**super().get_config(), **(lora if self.lora_rank else {})}

    @classmethod
    def from_config(cls, config):
        lora = {name: config[name] for name in ("lora_rank", "lora_alpha") if name in config}
        bank = super().from_config({key: config[key] for key in config if key not in lora})
        for name, value in lora.items():
            setattr(bank, name, value)
        return bank
