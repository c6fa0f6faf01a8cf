"""Sparse Mixture-of-Experts layers for Keras that cost what the active experts cost."""

import importlib

from keras_moe import (
    callbacks,
    distribution,
    health,
    inspection,
    layers,
    losses,
    metrics,
    ops,
    routers,
    summary,
    surgery,
)
from keras_moe.reporting import report
from keras_moe.upcycling import upcycle

__version__ = "0.1.0"

__all__ = [
    "callbacks",
    "distribution",
    "health",
    "inspection",
    "layers",
    "losses",
    "metrics",
    "ops",
    "report",
    "routers",
    "summary",
    "surgery",
    "upcycle",
]


def __getattr__(name):
    # They need packages of their own, so they are imported when they are asked for.
    if name in ("tuner", "visualization"):
        return importlib.import_module(f"keras_moe.{name}")
    raise AttributeError(f"module 'keras_moe' has no attribute {name!r}")
