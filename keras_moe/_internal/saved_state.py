"""What Keras leaves out of a saved layer, although it decides the next step: random draws.

Keras saves the variables of a layer, but not the states of its `SeedGenerator`s, so a training that
is resumed from a file would draw its noise anew.
"""

import keras
import numpy as np
from keras import ops


def save_draws(layer, store):
    """Put the states of a layer's own seed generators into the store of its weights."""
    for key, generator in _generators(layer):
        store[key] = ops.convert_to_numpy(generator.state)


def load_draws(layer, store):
    """Load what `save_draws` has put there, and return the other entries, a dict.

    A file that was written without draws, or by a layer that drew none, leaves them as they are.
    """
    entries = {key: store[key] for key in store.keys()}
    for key, generator in _generators(layer):
        if key in entries:
            # Each backend has an integer type of its own for it.
            generator.state.assign(ops.cast(np.asarray(entries[key]), generator.state.dtype))
    return {key: entry for key, entry in entries.items() if not key.startswith(_PREFIX)}


_PREFIX = "draws_"


def _generators(layer):
    return [
        (_PREFIX + name.lstrip("_"), value)
        for name, value in vars(layer).items()
        if isinstance(value, keras.random.SeedGenerator)
    ]
