"""Muon for stacked kernels."""

import re
from typing import Any, NamedTuple

import keras

from keras_moe._internal.bank_weights import BIASES, CONSTANTS, KERNELS
from keras_moe._internal.named_arguments import Saved
from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_list, check_pattern, optional

# With the number of their axes. Other weights of three axes, such as those of attention, are no
# stacks of matrices.
_STACKED = ((re.compile(KERNELS), 3), (re.compile(BIASES), 2), (re.compile(CONSTANTS), 2))


def _check_patterns(name, value):
    for pattern in check_list(name, value):
        check_pattern(name, pattern)
    return value


@register
class Muon(Saved, keras.optimizers.Muon):
    """`keras.optimizers.Muon` that updates each expert's kernel as a matrix of its own.

    Keras's updates variables of two axes by Muon, and all others by AdamW. In a bank these are the
    wrong ones: the stacked kernels (E, D, H) have three axes, the stacked biases (E, H) two. This
    one orthogonalizes the update of each expert's kernel, scales it by the size of that kernel, and
    leaves biases and constant experts to AdamW: a bank trains as E `Dense` layers would. All other
    variables are treated as Keras treats them.

    Args:
        learning_rate: float, schedule or function, as of any optimizer of Keras.
        exclude_layers: list of regular expressions; AdamW updates the variables in whose paths one
            of them is found.
        **kwargs: the other arguments of `keras.optimizers.Muon`.

    Raises:
        TypeError: If `exclude_layers` is no list.
        ValueError: If something in it is no regular expression.

    Example:

    >>> bank = keras_moe.layers.GatedExperts(num_experts=8, hidden_dim=32)
    >>> model = keras.Sequential([keras.Input((16,)), keras_moe.layers.MixtureOfExperts(bank)])
    >>> model.compile(keras_moe.optimizers.Muon(0.02, exclude_layers=["router"]), "mse")

    References: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); Liu et al. 2025
    (arXiv:2502.16982), for experts as matrices and for the scale.
    """

    _attribute_checks = {
        "learning_rate": lambda name, value: value,  # Keras's own check
        "exclude_layers": optional(_check_patterns),
    }

    def __init__(self, learning_rate=0.001, *, exclude_layers=None, **kwargs):
        super().__init__(learning_rate=learning_rate, exclude_layers=exclude_layers, **kwargs)

    def _should_use_adamw(self, variable):
        for name, num_axes in _STACKED:
            if len(variable.shape) == num_axes and name.fullmatch(variable.path):
                variable = _OfOneExpert(variable.shape[1:], variable.path)
        return super()._should_use_adamw(variable)

    def lr_adjust(self, x):
        if len(x.shape) == 2 or self.rms_rate is None:
            return super().lr_adjust(x)
        return x * (max(x.shape[-2:]) ** 0.5 * self.rms_rate)


class _OfOneExpert(NamedTuple):
    """What Keras asks of a variable to decide on its update."""

    shape: Any
    path: str
