"""Moves to `serialization`."""

from keras_moe._internal.serialization import load_draws as load_draws
from keras_moe._internal.serialization import save_draws as save_draws
