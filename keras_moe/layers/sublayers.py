"""Layers of the user inside of ours: any that Keras itself could call."""

import inspect
import warnings

import keras

from keras_moe._internal.parameters import parameters_of
from keras_moe._internal.tensor_checks import fits
from keras_moe._internal.validation import is_whole, overrides, shortened


def freeze_parts(layer):
    """Freeze the parts of a layer that was made with `trainable=False`, as setting it does.

    Keras stores the flag before there are parts, and a frozen router must not move its bias.
    """
    if not layer.trainable:
        # TensorFlow leaves out setting an attribute to what it is.
        keras.Layer.trainable.fset(layer, False)


def build_and_measure(name, layer, inputs_shape):
    """Build a layer of tokens, if it is not built, and return the shape of its outputs.

    Args:
        name: of the argument that it is, for the message.
        layer: any Keras layer.
        inputs_shape: (batch, ..., D).

    Raises:
        ValueError: If it takes other inputs, or its output is not one tensor with their axes but
            for the last.
    """
    check_takes_axes(name, layer, len(inputs_shape))
    made = _build_and_measure(layer, inputs_shape)
    _check_keeps_axes(
        name,
        layer,
        made,
        inputs_shape,
        "Use layers of single tokens, such as `keras.layers.Dense`.",
    )
    return made


def width_of(bank, tokens_shape):
    """The features that a bank returns, which may be one of the user's own, as it tells them."""
    made = _as_tuple(bank.compute_output_shape(tokens_shape))
    _check_keeps_axes(
        "experts", bank, made, tokens_shape, "Let `compute_output_shape` return what `call` makes."
    )
    return made[-1]


def _check_keeps_axes(name, layer, made, inputs_shape, fix):
    is_one = isinstance(made, tuple) and all(size is None or is_whole(size) for size in made)
    if not is_one or not made or not fits(made[:-1], tuple(inputs_shape)[:-1]):
        raise ValueError(
            f"`{name}` must be a layer of tokens, which keeps all axes but the last. Received: "
            f"`{layer.name}`, which makes {shortened(made)} of {tuple(inputs_shape)}. {fix}"
        )


def check_takes_axes(name, layer, num_axes):
    """Refuse a layer of images, or another, that says how many axes its inputs have."""
    spec = layer.input_spec
    exact, least = getattr(spec, "ndim", None), getattr(spec, "min_ndim", None) or 0
    if exact not in (None, num_axes) or least > num_axes:
        raise ValueError(
            f"`{name}` must take tokens, here inputs of {num_axes} axes. Received: "
            f"{shortened(layer)}, which takes inputs of {exact or least} axes. Use layers of "
            "single tokens, such as `keras.layers.Dense`."
        )


def _build_and_measure(layer, inputs_shape):
    """The shape of its outputs, or what it returns in place of one tensor.

    A layer with sublayers often has nothing but `__init__` and `call`. Such a one can neither be
    built nor measured by a shape; a symbolic call does both.
    """
    if not all(overrides(layer, name, keras.Layer) for name in ("build", "compute_output_shape")):
        outputs = layer(keras.KerasTensor(inputs_shape, layer.compute_dtype))
        return tuple(outputs.shape) if hasattr(outputs, "shape") else outputs
    if not layer.built:
        layer.build(inputs_shape)
    return _as_tuple(layer.compute_output_shape(inputs_shape))


def _as_tuple(shape):
    """A shape as Keras has it; TensorFlow's own is a `TensorShape`."""
    return tuple(shape) if isinstance(shape, list) or hasattr(shape, "as_list") else shape


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
