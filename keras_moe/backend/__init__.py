"""Framework code. `backend` is the object for the framework that Keras uses."""

import importlib
import os

_CLASSES = {"tensorflow": "TensorFlowBackend", "jax": "JaxBackend", "torch": "TorchBackend"}
_name = os.environ.get("KERAS_BACKEND")

try:
    import keras

    from keras_moe.backend.base import Backend

    _name = keras.backend.backend()
    _class = _CLASSES[_name]
except (ImportError, ValueError, KeyError) as error:
    raise ImportError(
        f"keras_moe runs on the Keras backends {', '.join(_CLASSES)}. Received: {_name!r}. "
        "Set KERAS_BACKEND to one of them, which is installed, before keras is imported."
    ) from error

backend: Backend = getattr(importlib.import_module(f"keras_moe.backend.{_name}"), _class)()
