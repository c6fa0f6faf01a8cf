"""Layers of the user inside of ours: any that Keras itself could call."""

import inspect

import keras


def build_and_measure(layer, inputs_shape):
    """Build a layer, if it is not built, and return the shape of its outputs.

    A layer with sublayers often has nothing but `__init__` and `call`. Such a one can neither be
    built nor measured by a shape; a symbolic call does both.
    """
    tells_shapes = _overrides(layer, "build") and _overrides(layer, "compute_output_shape")
    if not tells_shapes:
        return tuple(layer(keras.KerasTensor(inputs_shape, layer.compute_dtype)).shape)
    if not layer.built:
        layer.build(inputs_shape)
    return tuple(layer.compute_output_shape(inputs_shape))


def accepted_arguments(layer, names):
    """Those of the names that the layer's `call` takes.

    A layer that takes a mask supports masking from now on.
    """
    accepted = inspect.signature(layer.call).parameters
    if "mask" in accepted:
        # It will be given the mask, and Keras would warn: it takes a `Sequential` for a layer that
        # cannot have one, whatever is in it.
        layer.supports_masking = True
    return [name for name in names if name in accepted]


def _overrides(layer, method):
    return getattr(type(layer), method) is not getattr(keras.Layer, method)
