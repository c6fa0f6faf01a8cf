"""Where the mask of a tensor is."""


def mask_of(inputs, mask):
    """The mask that was given, or the one that hangs on the inputs, or None.

    Keras hands the latter over by itself only where the inputs are the only tensor of a call.
    """
    return getattr(inputs, "_keras_mask", None) if mask is None else mask
