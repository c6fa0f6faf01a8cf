"""Framework code. `backend` is the object for the framework that Keras uses."""

import os


def _refused(received):
    return ImportError(
        "keras_moe runs on the Keras backends tensorflow, jax, torch. "
        f"Received: {received}. "
        "Set KERAS_BACKEND to one of them, which is installed, before keras is imported."
    )


try:
    import keras

    from keras_moe.backend.base import Backend
except (ImportError, ValueError) as error:
    raise _refused(f"KERAS_BACKEND={os.environ.get('KERAS_BACKEND')!r} ({error})") from error

backend: Backend
if keras.backend.backend() == "tensorflow":
    from keras_moe.backend.tensorflow import TensorFlowBackend

    backend = TensorFlowBackend()
elif keras.backend.backend() == "jax":
    from keras_moe.backend.jax import JaxBackend

    backend = JaxBackend()
elif keras.backend.backend() == "torch":
    from keras_moe.backend.torch import TorchBackend

    backend = TorchBackend()
else:
    raise _refused(f"keras.backend.backend()={keras.backend.backend()!r}")
