"""Sparse Mixture-of-Experts layers for Keras that cost what the active experts cost."""

from keras_moe import callbacks, inspection, layers, losses, metrics, ops, routers
from keras_moe.reporting import report

__version__ = "0.1.0"

__all__ = ["callbacks", "inspection", "layers", "losses", "metrics", "ops", "report", "routers"]
