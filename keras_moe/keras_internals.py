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


def forget_old_layers(model):
    """Let go of layers of a model that are gone, and of their weights."""
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):  # PyTorch's list of all parameters in it
            layer._track_variables()
        frozen = getattr(layer, "_compiled_trainable_state", None)  # as a model was compiled
        if frozen is not None:
            frozen.clear()
            frozen.update({part: part.trainable for part in layer._flatten_layers()})


__all__ = [
    "current_model",
    "forget_old_layers",
    "get_keras_mask",
    "rebuild",
    "replace_sublayers",
]
