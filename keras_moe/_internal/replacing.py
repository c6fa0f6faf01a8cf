"""Models whose layers were given other sublayers, and that still save and load.

Keras makes a model anew from the arguments of its constructor, which do not tell of layers that
were replaced inside. A model with such ones gets a class whose configuration does.
"""

import keras

from keras_moe._internal.keras_internals import own_layers, set_state
from keras_moe._internal.serialization import PACKAGE

_NAME = "WithReplacements"


def record(root, changes):
    """Let the config of a model tell of attributes that its layers were given.

    Args:
        root: a Keras model.
        changes: list of pairs of a layer of the model and the names of its attributes. They hold
            Keras layers now, or functions that can be serialized.
    """
    paths = {id(layer): path for path, layer in _walk(root)}
    if not isinstance(root, _WithReplacements):
        root.__class__ = _class_for(type(root))
        object.__setattr__(root, "_replaced", [])  # There is nothing for Keras to track.
    root._replaced.extend((paths[id(layer)], tuple(names)) for layer, names in changes)


def sublayers(layer):
    """Pairs of a name and a Keras layer for the attributes of a layer that are one."""
    # PyTorch keeps modules apart from other attributes.
    names = [*vars(layer), *vars(layer).get("_modules", ())]
    pairs = [(name, getattr(layer, name)) for name in names]
    return [(name, value) for name, value in pairs if isinstance(value, keras.Layer)]


class _WithReplacements:
    """Mixed into the class of a model whose layers were given other sublayers."""

    _original_class: type
    _replaced: list

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        replaced = []
        for path, names in self._replaced:
            layer = _layer_at(self, path)
            attributes = {name: serialize(getattr(layer, name)) for name in names}
            replaced.append({"path": list(path), "attributes": attributes})
        changed, self.__class__ = type(self), self._original_class
        try:
            original = serialize(self)
        finally:
            self.__class__ = changed
        original.pop("compile_config", None)
        return {"model": original, "replaced": replaced}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        revive = keras.saving.deserialize_keras_object
        model = revive(config["model"], custom_objects=custom_objects)
        changes = []
        for replaced in config["replaced"]:
            layer = _layer_at(model, replaced["path"])
            for name, value in replaced["attributes"].items():
                set_state(layer, name, revive(value, custom_objects=custom_objects))
            changes.append((layer, replaced["attributes"]))
        record(model, changes)
        return model


_CLASSES: dict = {}


def _class_for(original):
    """A subclass that is serialized under one name, whatever it is a subclass of."""
    if original not in _CLASSES:
        members = {"_original_class": original, "__module__": __name__}
        changed = type(_NAME, (_WithReplacements, original), members)
        _CLASSES[original] = keras.saving.register_keras_serializable(PACKAGE, _NAME)(changed)
    return _CLASSES[original]


# For files that are loaded before any model was changed here.
keras.saving.register_keras_serializable(PACKAGE, _NAME)(_WithReplacements)


def _walk(layer, path=()):
    """Pairs of a path and a layer for each layer in a model, itself included.

    A path holds the place of each layer among the sublayers of its parent. It is the same in a
    model that was made anew from the same config.
    """
    yield path, layer
    for index, sublayer in enumerate(own_layers(layer)):
        yield from _walk(sublayer, (*path, index))


def _layer_at(root, path):
    for index in path:
        root = own_layers(root)[index]
    return root
