"""The private names of Keras that have no public one, in one place."""

from keras.src.backend.common.global_state import get_global_attribute

# Keras keeps the masks of traced tensors apart from them on JAX, so only its own function finds
# them. It has been in this module from Keras 3.10 on.
from keras.src.backend.common.masking import get_keras_mask


def current_model():
    """The layer whose call encloses all others of this thread, or None outside of calls."""
    call = get_global_attribute("current_call_ctx")
    return None if call is None else call.entry_layer


__all__ = ["current_model", "get_keras_mask"]
