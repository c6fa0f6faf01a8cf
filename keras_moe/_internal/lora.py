"""LoRA: kernels that are frozen, and corrections of low rank that are trained in their place."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal.initializers import Checked, EachExpert
from keras_moe._internal.keras_internals import open_to_state
from keras_moe._internal.keras_objects import get_initializer
from keras_moe._internal.named_arguments import check_config
from keras_moe._internal.validation import check_positive_integer, check_positive_number


class Adaptable:
    """What layers with LoRA have in common. Before a `keras.Layer` in the bases of a class.

    A subclass implements `add_factors(a_initializer, b_initializer)`, which `build` calls as well
    where there is a `lora_rank`, and puts `lora_config` into its own.
    """

    lora_rank: Any = None
    lora_alpha: Any = None
    lora_enabled = False
    # Names of the kernels that factors correct.
    _corrected: tuple = ()

    @property
    def trainable(self):
        return keras.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        # Keras sets it for all weights. A corrected kernel has no gradient, only weight decay.
        keras.Layer.trainable.fset(self, value)
        for name in self._corrected:
            getattr(self, name).trainable = False

    def enable_lora(self, rank, lora_alpha=None, a_initializer="he_uniform", b_initializer="zeros"):
        """Freeze each kernel and train a correction of low rank for it.

        `x W` becomes `x W + (lora_alpha / rank) (x A) B` with factors `A` (..., D, rank) and `B`
        (..., rank, H); no corrected kernel is made. Those of a bank are stacked by expert like its
        kernels, and only those of the chosen experts compute. Saving adds the corrections to the
        kernels, as Keras does.

        Args:
            rank: rank of the corrections, a positive integer.
            lora_alpha: what the correction is multiplied by, times the rank. None: the rank.
            a_initializer: of `A`, for a bank of each expert's.
            b_initializer: of `B`; with zeros nothing changes at first.

        Raises:
            ValueError: If the layer is not built, or has LoRA already.
            NotImplementedError: If a router computes its logits in another way than `x W`.

        Reference: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
        """
        layer: Any = self
        check_positive_integer("rank", rank)
        if not layer.built:
            raise ValueError(
                "LoRA needs a built layer. Received: "
                f"`{layer.name}`, not yet built. Call the model once, or `build`, before."
            )
        if layer.lora_enabled:
            raise ValueError(
                "LoRA can be enabled once for a layer. Received: "
                f"rank={rank} for `{layer.name}`, which has rank {layer.lora_rank}. To begin "
                "anew, save the weights and load them into a model that is built without LoRA."
            )
        if lora_alpha is not None:
            lora_alpha = check_positive_number("lora_alpha", lora_alpha)
        a_initializer = get_initializer("a_initializer", a_initializer)
        b_initializer = get_initializer("b_initializer", b_initializer)
        self.check_takes_lora()
        self.lora_rank = rank
        self.lora_alpha = rank if lora_alpha is None else lora_alpha
        with open_to_state(layer):
            self.add_factors(a_initializer, b_initializer)

    def check_takes_lora(self):
        """Raise where corrections would have no effect."""

    def add_factors(self, a_initializer="he_uniform", b_initializer="zeros"):
        raise NotImplementedError

    def lora_scale(self):
        return (self.lora_alpha or self.lora_rank) / self.lora_rank

    def lora_config(self):
        config = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        return config if self.lora_rank else {}


def adaptable_from_config(cls, make, config):
    """The layer of a class that `make(config)` makes, with the `lora_config` in the config."""
    check_config(cls, config)
    lora = {name: config[name] for name in ("lora_rank", "lora_alpha") if name in config}
    if lora.get("lora_rank") is not None:
        check_positive_integer("lora_rank", lora["lora_rank"])
    if lora.get("lora_alpha") is not None:
        check_positive_number("lora_alpha", lora["lora_alpha"])
    layer = make({key: config[key] for key in config if key not in lora})
    for name, value in lora.items():
        setattr(layer, name, value)
    return layer


def factors_for(layer, name, shape, a_initializer, b_initializer, stream=0):
    """Freeze a kernel of a layer; its shape as a matrix, or a stack of them, is (..., D, H).

    Returns:
        Variables A (..., D, rank) and B (..., rank, H) in float32.
    """
    *experts, fan_in, fan_out = shape
    getattr(layer, name).trainable = False
    layer._corrected = (*layer._corrected, name)
    rank = layer.lora_rank

    def each(initializer):
        initializer = keras.initializers.get(initializer)
        if experts:
            return EachExpert(initializer, stream, range(experts[0]))
        return Checked(initializer)

    a, b = (
        layer.add_weight(
            name=f"{name.removesuffix('_kernel')}_lora_{letter}",
            shape=(*experts, *shape),
            initializer=each(initializer),
            dtype="float32",
            autocast=False,
        )
        for letter, shape, initializer in (
            ("a", (fan_in, rank), a_initializer),
            ("b", (rank, fan_out), b_initializer),
        )
    )
    return a, b


def forget_corrections(factors):
    """Set the B of pairs of factors to zero."""
    for _, b in factors:
        b.assign(ops.zeros(b.shape))


def corrected(kernel, a, b, scale):
    """A kernel (D, H) with its correction added, an array in its dtype. All are arrays."""
    return (kernel + scale * (a @ b)).astype(kernel.dtype)


def corrected_stack(kernel, a, b, scale):
    """The same for kernels (E, D, H)."""
    # One expert at a time: the sum is float32.
    return np.stack([corrected(*each, scale) for each in zip(kernel, a, b)])
