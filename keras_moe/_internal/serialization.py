"""Serialization: registered classes, pluggable arguments, shared layers and random state."""

import functools
import inspect
import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal.checks import shortened

PACKAGE = "keras_moe"

register = keras.saving.register_keras_serializable(package=PACKAGE)


def arguments_of(configured):
    """Constructor arguments of an object's classes in this package, read from its attributes."""
    cls: Any = type(configured)
    names, fixed = argument_names(cls), getattr(cls, "fixed_arguments", ())
    return {name: _serialized(getattr(configured, name)) for name in names if name not in fixed}


@functools.lru_cache
def argument_names(cls: Any) -> list[str]:
    """The names of constructor arguments that the classes of this package above a class declare."""
    classes = (each for each in reversed(cls.__mro__) if each.__module__.startswith(PACKAGE))
    methods = [vars(each)["__init__"] for each in classes if "__init__" in vars(each)]
    return list(dict.fromkeys(name for each in methods for name in _named_arguments(each)))


def refuse_change(configured, name):
    """Raise an error for an argument that is set when compiled functions may have read it."""
    changes = {"top_k": "Call `surgery.set_top_k`", "weight": "Call `layer.set_router_loss_weight`"}
    rule = f"`{name}` of a `{type(configured).__name__}` cannot be set later"
    reason = "compiled functions would keep the old value"
    raise AttributeError(f"{rule}, as {reason}. {changes.get(name, 'Make a new one')}")


def _serialized(value):
    """An argument in a config: parts as configs, and what Keras has by name as Keras writes it."""
    if isinstance(value, (list, tuple)):
        return list(map(_serialized, value))
    if isinstance(value, (keras.Layer, Configured)):
        return config_of(value)
    if isinstance(value, (keras.initializers.Initializer, keras.regularizers.Regularizer)):
        return keras.saving.serialize_keras_object(value)
    return keras.activations.serialize(value) if callable(value) else value


def _named_arguments(method):
    parameters = inspect.signature(method).parameters.items()
    return [name for name, each in parameters if str(each)[0] != "*"][1:]


class Configured:
    """Abstract: an object without weights, such as a loss, that its config describes."""

    def __setattr__(self, name, value):
        if name in vars(self):
            refuse_change(self, name)
        super().__setattr__(name, value)

    def get_config(self):
        return arguments_of(self)

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        arguments = (f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({', '.join(arguments)})"


# Layers that are a part of another layer, and those that are a part of several.
_used: weakref.WeakSet = weakref.WeakSet()
_shared: weakref.WeakSet = weakref.WeakSet()


def resolve(argument, identifier, base, by_name=None, example="", **defaults):
    """The object that a pluggable argument stands for: an instance, a config or a name.

    Keras does not revive nested objects of a config. `by_name` has the classes by name, and
    `defaults` their arguments. An `example` of an instance is for messages.
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, str) and identifier in (by_name or {}):
        return by_name[identifier](**defaults)
    if not isinstance(identifier, base):
        names = f", or one of {', '.join(map(repr, by_name))}" if by_name else ""
        example = f", such as {example}" if example else ""
        received = f"{argument}={shortened(identifier)} (of type {type(identifier).__name__})"
        raise TypeError(
            f"`{argument}` must be an instance of `{base.__name__}`{example}{names}. "
            f"Received: {received}"
        )
    if isinstance(identifier, keras.Layer):
        note_part(identifier)
    return identifier


def note_part(layer):
    """Note that a layer became a part of another; `config_of` then knows which are shared."""
    (_shared if layer in _used else _used).add(layer)


def config_of(part):
    """The config of an object inside a layer, or None for None."""
    if part is None:
        return None
    config = keras.saving.serialize_keras_object(part)
    # A subclass that inherits our `get_config` would be loaded without its arguments. Code that is
    # run by `exec` has no module.
    if _is_ours(type(part).get_config) and not _is_ours(type(part).__init__):
        named = _named_arguments(type(part).__init__)
        missing = [name for name in named if name not in config["config"]]
        if missing:
            raise NotImplementedError(
                f"`{type(part).__name__}.get_config` must return all arguments of its constructor. "
                f"Received: a config without {', '.join(missing)}"
            )
    # The outer layer builds it: built before, its weights would have paths without the outer name,
    # and `keras.callbacks.OrbaxCheckpoint`, which goes by paths, would not find them.
    config.pop("build_config", None)
    # Keras marks layers that it meets twice, but copies the config of the first before it does.
    if isinstance(part, keras.Layer) and part in _shared:
        config["shared_object_id"] = id(part)
    return config


def _is_ours(method):
    return str(method.__module__).startswith(PACKAGE)


def save_draws(layer, store):
    """Put the states of a layer's seed generators into the store of its weights.

    Keras leaves them out, so training that is resumed from a file would repeat its noise.
    """
    for key, generator in _generators(layer):
        store[key] = ops.convert_to_numpy(generator.state)


def load_draws(layer, store):
    """Load what `save_draws` stored, if it is there, and return the other entries, a dict."""
    entries = {key: store[key] for key in store.keys()}
    for key, generator in _generators(layer):
        if key in entries:
            # Each backend has its own integer type for it.
            generator.state.assign(ops.cast(np.asarray(entries[key]), generator.state.dtype))
    return {key: entry for key, entry in entries.items() if not key.startswith("draws_")}


def _generators(layer):
    return [
        (f"draws_{name.lstrip('_')}", value)
        for name, value in vars(layer).items()
        if isinstance(value, keras.random.SeedGenerator)
    ]
