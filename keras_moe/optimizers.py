"""Optimizers that update each expert's kernel in a stack as a matrix."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import keras

from keras_moe._internal.serialization import register


@register
class Muon(keras.optimizers.Muon):
    """`keras.optimizers.Muon` that updates each expert's kernel as one matrix.

    Keras's Muon updates variables of two axes by Muon, and all others by AdamW, but the stacked
    kernels (E, D, H) of a bank have three axes, and its biases (E, H) two. With this optimizer a
    bank is trained as E `Dense` layers are.

    Args:
        learning_rate: Float, `keras.optimizers.schedules.LearningRateSchedule` or callable.
        exclude_layers: List of regular expressions. AdamW updates variables with one in their path.
        **kwargs: The other arguments of `keras.optimizers.Muon`.

    Raises:
        TypeError: If `exclude_layers` is a string.

    Example:

    >>> bank = keras_moe.layers.GatedExperts(num_experts=8, hidden_dim=32)
    >>> model = keras.Sequential([keras.Input((16,)), keras_moe.layers.MixtureOfExperts(bank)])
    >>> model.compile(keras_moe.optimizers.Muon(0.02, exclude_layers=["router"]), "mse")

    References: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); Liu et al. 2025
    (arXiv:2502.16982), for experts as matrices and for the scale.
    """

    def __init__(
        self,
        learning_rate: float | Callable = 0.001,
        *,
        exclude_layers: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        if isinstance(exclude_layers, str):  # Keras would take each letter for an expression.
            raise TypeError(f"`exclude_layers` must be a list. Received: {exclude_layers!r}")
        super().__init__(learning_rate=learning_rate, exclude_layers=exclude_layers, **kwargs)

    def _should_use_adamw(self, variable):
        # Other weights of three axes, such as attention's, are no stacks of matrices.
        if getattr(variable, "is_stack_of_experts", False):
            variable = SimpleNamespace(shape=variable.shape[1:], path=variable.path)
        return super()._should_use_adamw(variable)

    def lr_adjust(self, x):
        if len(x.shape) == 2 or self.rms_rate is None:
            return super().lr_adjust(x)
        return x * (max(x.shape[-2:]) ** 0.5 * self.rms_rate)


__all__ = ["Muon"]
__dir__ = __all__.copy
