"""Activations, initializers and regularizers: instances, configs, names and functions of Keras."""

import numbers

import keras

from keras_moe._internal.named_arguments import NamedArguments
from keras_moe._internal.tensor_checks import check_is_float
from keras_moe._internal.validation import check_function, propose, shortened


def get_activation(name, identifier):
    """A function of one tensor; None is the identity."""
    if identifier is None:
        identifier = "linear"
    return _function("an activation", keras.activations, name, identifier, "x")


def get_initializer(name, identifier):
    """A function of a shape and, by its name, a dtype."""
    return _function("an initializer", keras.initializers, name, identifier, "shape", dtype=None)


def get_regularizer(name, identifier):
    """A function of a weight, or None."""
    if identifier is None:
        return None
    return _function("a regularizer", keras.regularizers, name, identifier, "weight")


class CheckedRegularizer(keras.regularizers.Regularizer):
    """A regularizer with a check of what it returns: a float, or several, which Keras adds up."""

    def __init__(self, regularizer):
        self.regularizer = regularizer

    @classmethod
    def of(cls, regularizer):
        """One for a weight; None without a regularizer."""
        return None if regularizer is None else cls(regularizer)

    def __call__(self, weight):
        value = self.regularizer(weight)
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return keras.ops.convert_to_tensor(float(value), weight.dtype)
        check_is_float(f"{shortened(self.regularizer)}(weight)", value)
        return value

    def get_config(self):
        return {"regularizer": keras.regularizers.serialize(self.regularizer)}


# Where the functions of a kind have a class, those of no other.
_CLASSES = {
    keras.initializers: keras.initializers.Initializer,
    keras.regularizers: keras.regularizers.Regularizer,
}


def _function(kind, module, name, identifier, *arguments, **by_name):
    try:
        function = module.get(identifier)
    except (TypeError, ValueError, AttributeError):
        function = None
    others = tuple(each for of, each in _CLASSES.items() if of is not module)
    if function is None or isinstance(function, (type, keras.Layer, NamedArguments, *others)):
        raise TypeError(
            f"`{name}` must be {kind} of Keras, its name, or a function of "
            f"({', '.join([*arguments, *by_name])}). Received: {name}={shortened(identifier)} (of "
            f"type {type(identifier).__name__}). {_fix(module, identifier)}"
        )
    check_function(name, function, *arguments, **by_name)
    return function


def _fix(module, identifier):
    if isinstance(identifier, keras.Layer):
        return "Put layers into a bank: `layers.LayerExperts([...])`."
    rest = ("get", "serialize", "deserialize")
    names = [each for each in dir(module) if each.islower() and each not in rest and each[0] != "_"]
    if isinstance(identifier, str):
        return propose(identifier, names)
    return f"Pass, for example, {_EXAMPLES[module]!r}."


_EXAMPLES = {
    keras.activations: "relu",
    keras.initializers: "glorot_uniform",
    keras.regularizers: "l2",
}
