"""Loads a saved model, or says why it cannot be."""

import json
import math
import re
import warnings
import zipfile

import keras

from keras_moe._internal.command_line import cause, stating

# Arguments that ask for at least as many weights.
_SIZES = ("num_experts", "hidden_dim", "units")
# So few weights are made at once, whatever the file holds.
_ALWAYS_ALLOWED = 1_000_000
# Of the narrowest weights, int4, a byte holds two.
_WEIGHTS_IN_A_BYTE = 2


def load(path):
    """The model in a `.keras` file.

    Raises:
        ValueError: If it is no such file, asks for more weights than it holds, or has classes that
            are not registered.
    """
    with stating(
        "A model must be a file that `model.save` wrote.",
        repr(str(path)),
        "Save it again, or copy it again if it was cut short.",
    ):
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            if not isinstance(config, dict):
                raise TypeError(f"its config.json holds a {type(config).__name__}")
            num_bytes = sum(entry.file_size for entry in archive.infolist())
    _check_sizes(config, num_bytes)
    try:
        with warnings.catch_warnings():
            # Weights that Keras does not find it leaves as they were initialised.
            warnings.filterwarnings("error", "Skipping nested container|A total of")
            return keras.saving.load_model(path, compile=False)
    except TypeError as error:
        unknown = re.search(r"Could not locate (?:class|function) '([^']*)'", str(error))
        if unknown is None:
            raise _cannot_load(path, error) from error
        raise _unknown_class(unknown[1], config) from error
    except Exception as error:
        raise _cannot_load(path, error) from error


def _cannot_load(path, error):
    return ValueError(
        "The config and the weights of a model must fit each other and this Keras. Received: "
        f"{str(path)!r} ({cause(error)}). Save it again with the versions installed "
        "here."
    )


def _unknown_class(name, config):
    modules = {found.get("module") for found in _dicts(config) if found.get("class_name") == name}
    where = ", ".join(repr(module) for module in sorted(filter(None, modules)))
    return ValueError(
        "Each class of a model must be registered before the model is loaded. Received: "
        f"class {name!r}{f', saved from module {where}' if where else ''}. Name the module that "
        "registers it with `@keras.saving.register_keras_serializable`: `--import module`."
    )


def _check_sizes(config, num_bytes):
    allowed = max(_WEIGHTS_IN_A_BYTE * num_bytes, _ALWAYS_ALLOWED)
    for found in _dicts(config):
        sizes = {name: found[name] for name in _SIZES if _is_number(found.get(name))}
        if math.prod(sizes.values()) > allowed:
            listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(
                "A model cannot have more weights than its file. Received: "
                f"{listed} in a file with {num_bytes} bytes. Save the model again."
            )


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _dicts(config):
    """All dicts in a config."""
    if isinstance(config, dict):
        yield config
    values = config.values() if isinstance(config, dict) else config
    if isinstance(config, (dict, list)):
        for value in values:
            yield from _dicts(value)
