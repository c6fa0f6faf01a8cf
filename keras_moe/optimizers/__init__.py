"""Optimizers that see a stack of expert kernels as a matrix for each expert."""

from keras_moe.optimizers.muon import Muon

__all__ = ["Muon"]


def __dir__():
    return __all__
