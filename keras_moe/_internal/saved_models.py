"""Loading of `.keras` files from anywhere."""

import json
import math
import warnings
import zipfile

import keras

from keras_moe._internal.plain_text import stating

# Arguments that ask for at least as many weights.
_SIZES = ("num_experts", "hidden_dim", "units")


def load(path):
    """Return the model in a `.keras` file; a ValueError says why it cannot be loaded."""
    with stating(
        "A model must be a whole file of `model.save` that this version of Keras can load.",
        repr(str(path)),
        "Save it again with this version, or name the module of its custom classes by `--import`.",
    ):
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            num_bytes = sum(entry.file_size for entry in archive.infolist())
        # Of the narrowest weights, int4, a byte holds two.
        _check_sizes(config, max(2 * num_bytes, 1_000_000))
        with warnings.catch_warnings():
            # Weights that Keras does not find it leaves as they were initialized.
            warnings.filterwarnings("error", "Skipping nested container|A total of")
            return keras.saving.load_model(path, compile=False)


def _check_sizes(config, most):
    """Refuse a config of more weights than there are in the file: they would fill the memory."""
    if isinstance(config, dict):
        sizes = {
            name: config[name] for name in _SIZES if isinstance(config.get(name), (int, float))
        }
        if math.prod(sizes.values()) > most:
            raise ValueError(f"A model cannot have more weights than its file. Received: {sizes}")
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, (dict, list)):
            _check_sizes(value, most)
