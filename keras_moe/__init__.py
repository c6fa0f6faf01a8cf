"""Sparse Mixture-of-Experts layers for Keras that cost what the active experts cost.

Begin with `layers.MixtureOfExperts`: it takes a bank of experts from `layers`, a router from
`routers` and auxiliary losses from `losses`. `callbacks.ExpertMonitor` logs what the experts do.
"""

import importlib

# First, as it says whether Keras has a backend that the package runs on.
import keras_moe.backend  # noqa: F401
from keras_moe import (
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
from keras_moe.generation import generate
from keras_moe.inspection.summaries import summary
from keras_moe.reporting import report
from keras_moe.upcycling import freeze_all_but, merge_lora, upcycle

__version__ = "0.2.0"

__all__ = [
    "callbacks",
    "convert",
    "distribution",
    "freeze_all_but",
    "generate",
    "health",
    "inspection",
    "layers",
    "losses",
    "merge_lora",
    "metrics",
    "ops",
    "optimizers",
    "report",
    "routers",
    "summary",
    "surgery",
    "upcycle",
]

# They need further packages, so they are imported on first use.
_LAZY = ("tuner", "visualization")


def __dir__():
    return sorted([*__all__, *_LAZY, "__version__"])


def __getattr__(name):
    if name in _LAZY:
        try:
            return importlib.import_module(f"keras_moe.{name}")
        except ImportError as error:  # `help` and `hasattr` expect this one.
            raise AttributeError(str(error)) from error
    homes = [part for part in __all__ if name in getattr(globals()[part], "__all__", ())]
    hint = "".join(f". It is `keras_moe.{part}.{name}`" for part in homes)
    raise AttributeError(f"module 'keras_moe' has no attribute {name!r}{hint}")
