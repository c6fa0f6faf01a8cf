"""The private names of Keras that have no public one, in one place."""

from keras.src.backend.common.global_state import get_global_attribute

# Keras keeps the masks of traced tensors apart from them on JAX, so only its own function finds
# them. It has been in this module from Keras 3.10 on.
from keras.src.backend.common.masking import get_keras_mask


def current_model():
    """The layer whose call encloses all others of this thread, or None outside of calls."""
    call = get_global_attribute("current_call_ctx")
    return None if call is None else call.entry_layer


def replace_sublayers(layer, old, new):
    """Exchange sublayers of a layer that is built, which Keras locks.

    Args:
        layer: a built layer.
        old: names of the attributes whose layers go.
        new: dict of names of attributes to the layers that come.
    """
    layer._tracker.unlock()
    for name in old:
        sublayer = getattr(layer, name)
        delattr(layer, name)
        layer._tracker.untrack(sublayer)
    for name, sublayer in new.items():
        setattr(layer, name, sublayer)
    layer._tracker.lock()


def rebuild(layer, shape):
    """Build a layer anew whose sublayers are gone."""
    layer._tracker.unlock()
    layer.build(shape)


def refresh_parameters(model):
    """Let go of the parameters of layers that are gone: on PyTorch each layer lists them all."""
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            layer._track_variables()


__all__ = [
    "current_model",
    "get_keras_mask",
    "rebuild",
    "refresh_parameters",
    "replace_sublayers",
]
