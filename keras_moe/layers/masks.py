"""Where the mask of a tensor is."""

from keras_moe._internal.keras_internals import get_keras_mask


def mask_of(inputs, mask):
    """The mask that was given, or the one that hangs on the inputs, or None.

    Keras hands the latter over by itself only where the inputs are the only tensor of a call. On
    JAX it stores the masks of traced tensors elsewhere, so its own function has to find them.
    """
    return get_keras_mask(inputs) if mask is None else mask
