"""Layers of the user inside of ours: any that Keras itself could call."""

import inspect
import warnings

import keras

from keras_moe._internal.parameters import parameters_of


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


_FUNCTIONS = ("activation", "recurrent_activation", "function")


def are_alike(layers):
    """Whether built layers compute the same function, but for the values of their weights.

    They are of one class and configuration, have weights of the same shapes, and no state besides.
    """
    return len({_kind(layer) for layer in layers}) == 1 and not any(
        _has_state(layer) for layer in layers
    )


def _kind(layer):
    """What a layer computes; two layers are never of one kind if that cannot be told."""
    parts = list(layer._flatten_layers())
    if any(type(part).__module__.partition(".")[0] != "keras" for part in parts):
        return id(layer)  # the configuration of other people's layers need not tell everything
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lambdas are not saved here
            config = keras.saving.serialize_keras_object(layer)
    except (NotImplementedError, TypeError, ValueError):
        return id(layer)
    weights = [(variable.shape, variable.dtype) for variable in layer.variables]
    # A configuration names functions, and different ones may have one name.
    functions = [[id(vars(part).get(name)) for name in _FUNCTIONS] for part in parts]
    dtypes = [part.dtype_policy.name for part in parts]
    return repr((type(layer), _without_names(config), weights, functions, dtypes))


def _without_names(config):
    """A configuration without names and initializers, which do not change what is computed."""
    if isinstance(config, dict):
        return {
            key: _without_names(value)
            for key, value in config.items()
            if key != "name" and not key.endswith("_initializer")
        }
    if isinstance(config, (list, tuple)):
        return [_without_names(value) for value in config]
    return config


def _has_state(layer):
    parameters = {id(variable) for variable in parameters_of(layer)}
    return any(id(variable) not in parameters for variable in layer.variables)


def _overrides(layer, method):
    return getattr(type(layer), method) is not getattr(keras.Layer, method)
