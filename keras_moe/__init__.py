"""Sparse Mixture-of-Experts layers for Keras that cost what the active experts cost."""

import importlib

# First, as it says whether Keras has a backend that the package runs on.
import keras_moe.backend  # noqa: F401
from keras_moe import (
    activations,
    callbacks,
    convert,
    distribution,
    health,
    inspection,
    layers,
    losses,
    metrics,
    ops,
    optimizers,
    routers,
    surgery,
)
from keras_moe.inspection import summary
from keras_moe.reporting import report
from keras_moe.upcycling import upcycle

__version__ = "0.2.0"

__all__ = [
    "activations",
    "callbacks",
    "convert",
    "distribution",
    "health",
    "inspection",
    "layers",
    "losses",
    "metrics",
    "ops",
    "optimizers",
    "report",
    "routers",
    "summary",
    "surgery",
    "upcycle",
]

# They need packages of their own, so they are imported when they are asked for.
_LAZY = ("tuner", "visualization")


def __dir__():
    return sorted([*__all__, *_LAZY, "__version__"])


def __getattr__(name):
    if name in _LAZY:
        try:
            return importlib.import_module(f"keras_moe.{name}")
        except ImportError as error:  # `help` and `hasattr` expect this one.
            raise AttributeError(str(error)) from error
    raise AttributeError(f"module 'keras_moe' has no attribute {name!r}")
