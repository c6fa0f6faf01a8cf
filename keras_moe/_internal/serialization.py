"""Classes that Keras saves and loads, and how a pluggable argument becomes an object of one."""

import inspect
import weakref

import keras

from keras_moe._internal.named_arguments import (
    OF_KERAS,
    NamedArguments,
    check_config,
    check_config_is_whole,
    check_is_made,
)
from keras_moe._internal.validation import listed, propose, shortened

PACKAGE = "keras_moe"

_register = keras.saving.register_keras_serializable(package=PACKAGE)


def register(thing):
    """Register a class or function of this package with Keras, and spell out a class's signature.

    A constructor hands what it does not name to its base class as `**kwargs`. What those take is
    shown by `help`, `inspect.signature` and completion.
    """
    for base in reversed(inspect.getmro(thing) if inspect.isclass(thing) else ()):
        if base.__module__.startswith(PACKAGE) and "__init__" in vars(base):
            vars(base)["__init__"].__signature__ = _spelled_out(base)
    return _register(thing)


def _spelled_out(cls):
    """The signature of a constructor with all optional arguments of its bases in the package."""
    signature = inspect.signature(cls.__init__)
    parameters = dict(signature.parameters)
    rest = parameters.pop("kwargs", None)
    if rest is None:
        return signature
    # The base whose constructor comes next; of this package, its signature is spelled out already.
    base = next(base for base in cls.__mro__[1:] if "__init__" in vars(base))
    own = base.__module__.startswith(PACKAGE)
    for name, parameter in inspect.signature(base.__init__).parameters.items():
        is_shown = name not in parameters and (own or name in OF_KERAS)
        if is_shown and parameter.default is not parameter.empty:
            parameters[name] = parameter.replace(kind=parameter.KEYWORD_ONLY)
    return signature.replace(parameters=[*parameters.values(), rest])


class Configured(NamedArguments):
    """Abstract: an object without weights that its config describes, `get_config()`.

    It is shown as the call that makes it, without most of what is the default anyway. Layers are
    shown as Keras shows them.
    """

    # Arguments that are shown at their default, too.
    _always_shown: tuple[str, ...] = ()

    def get_config(self):
        check_config_is_whole(self)
        return {}

    @classmethod
    def from_config(cls, config):
        return cls(**check_config(cls, config))

    def __repr__(self):
        try:
            config = self.get_config()
        except NotImplementedError:  # Of the user's class, which can be used, but not saved.
            return object.__repr__(self)
        shown = [
            f"{name}={config[name]!r}"
            for name, parameter in inspect.signature(type(self)).parameters.items()
            if name in config and (name in self._always_shown or config[name] != parameter.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


# Layers that were made a part of another layer, and those of them that are parts of several.
_used: weakref.WeakSet = weakref.WeakSet()
_shared: weakref.WeakSet = weakref.WeakSet()


def resolve(argument, identifier, base, by_name=None, **defaults):
    """The object that `identifier` stands for.

    Keras does not revive nested objects of a config by itself, so every pluggable argument goes
    through here.

    Args:
        argument: name of the constructor argument, for errors.
        identifier: an instance of `base`, a config made by `keras.saving`, or a name.
        base: class the object must be an instance of.
        by_name: dict of names to classes.
        **defaults: arguments of a class that was given by name.
    """
    by_name = by_name or {}
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str) and identifier in by_name:
        return by_name[identifier](**defaults)
    if isinstance(identifier, base):
        check_is_made(identifier)
        if isinstance(identifier, keras.Layer):
            note_part(identifier)
        return identifier
    names = sorted(by_name)
    rule = f"`{argument}` must be an instance of `{base.__name__}`"
    if names:
        rule += f" or one of the names {listed(names)}"
    raise ValueError(
        f"{rule}. Received: {argument}={shortened(identifier)} (of type "
        f"{type(identifier).__name__}). {_way_out(identifier, base, names)}"
    )


def note_part(layer):
    """Note that a layer became a part of another: `config_of` tells if it is one of several."""
    (_shared if layer in _used else _used).add(layer)


def config_of(layer):
    """The config of a layer inside another, or None without one; a shared layer says that it is.

    Keras marks layers that it meets twice, but copies the config of the first before it does.
    """
    if layer is None:
        return None
    config = keras.saving.serialize_keras_object(layer)
    # The outer layer builds it: built before, its weights would have paths without the outer name,
    # and what goes by paths, as `keras.callbacks.OrbaxCheckpoint` does, would not find them.
    config.pop("build_config", None)
    if layer in _shared:
        config["shared_object_id"] = id(layer)
    return config


def _way_out(identifier, base, names):
    if isinstance(identifier, type) and issubclass(identifier, base):
        return f"Make an instance of it, `{identifier.__name__}(...)`."
    if callable(identifier) and names:
        return f"Make a subclass of `{base.__name__}`, and pass an instance of it."
    if names:
        return propose(identifier, names)
    if isinstance(identifier, (list, tuple)):
        if base is keras.Layer:
            return "Make one layer of them: `keras.Sequential([...])`."
        return "Put layers into a bank: `layers.LayerExperts([...])`."
    if base is keras.Layer:
        return "Pass a Keras layer."
    return f"Make an instance of a subclass of `{base.__name__}`."
