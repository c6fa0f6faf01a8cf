"""How a pluggable argument becomes an object: by name, from a config, or as it is."""

import weakref

import keras

from keras_moe.validation import propose

PACKAGE = "keras_moe"

# Layers that were made a part of another layer, and those of them that are parts of several.
_used: weakref.WeakSet = weakref.WeakSet()
_shared: weakref.WeakSet = weakref.WeakSet()

register = keras.saving.register_keras_serializable(package=PACKAGE)


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
        if isinstance(identifier, keras.Layer):
            note_part(identifier)
        return identifier
    names = sorted(by_name)
    rule = f"`{argument}` must be an instance of `{base.__name__}`"
    if names:
        rule += f" or one of the names {', '.join(map(repr, names))}"
    raise ValueError(
        f"{rule}. Received: {argument}={identifier!r} (of type {type(identifier).__name__}). "
        f"{_way_out(identifier, base, names)}"
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
    if layer in _shared:
        config["shared_object_id"] = id(layer)
    return config


def _way_out(identifier, base, names):
    if isinstance(identifier, type) and issubclass(identifier, base):
        return f"Make an instance of it, `{identifier.__name__}(...)`."
    if names:
        return propose(identifier, names)
    return f"Make an instance of a subclass of `{base.__name__}`."
