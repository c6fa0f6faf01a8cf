"""Replacement of layers in built models, recorded in the models' configs."""

import pathlib
import sys
from typing import Any

import keras

from keras_moe._internal.keras_internals import compile_like, own_layers, set_state
from keras_moe._internal.serialization import PACKAGE
from keras_moe.layers.transformer_block import TransformerBlock


def replace(model, replacements):
    """Replace layers of a built model, each by another, or by None, which removes it.

    Functional and sequential models that contain one become new models with the same other layers;
    everything else changes in place. Returns the model, and a list for `record_changes`: pairs of a
    layer whose config lacks a new sublayer, and names of its attributes. Call `forget_old_weights`
    on the model afterwards.
    """
    changes: list = []
    done: dict = {}
    removed = {layer for layer, new in replacements.items() if new is None}

    def new(layer):
        """The layer that takes the place of a layer of the model, which may be itself."""
        if layer in replacements:
            # The surrounding layer still calls the removed one.
            nothing = keras.layers.Identity(name=layer.name, dtype=layer.dtype_policy.name)
            return replacements[layer] or nothing
        if layer not in done and is_graph(layer):
            found = {part: new(part) for part in layer.layers}
            is_same = all(part is other for part, other in found.items())
            done[layer] = layer if is_same else _rebuilt(layer, found, removed)
        elif layer not in done:
            attributes = sublayers(layer)
            found = {part: new(part) for part in (*own_layers(layer), *attributes.values())}
            names = [name for name, part in attributes.items() if found[part] is not part]
            for name in names:
                set_state(layer, name, found[attributes[name]])
            if names and not isinstance(layer, TransformerBlock):  # whose config has its sublayer
                changes.append((layer, names))
            done[layer] = layer
        return done[layer]

    return new(model), changes


def is_graph(layer):
    """Whether a layer is only a list or graph of layers, which can be rebuilt."""
    # A subclass, such as a model of KerasHub, may keep its layers elsewhere too.
    return type(layer) is keras.Sequential or keras.Function in type(layer).__bases__


def sublayers(layer):
    """The attributes of a layer that are Keras layers, a dict by name."""
    # PyTorch keeps modules apart from other attributes.
    values = {
        name: getattr(layer, name) for name in (*vars(layer), *vars(layer).get("_modules", ()))
    }
    return {name: value for name, value in values.items() if isinstance(value, keras.Layer)}


def _rebuilt(model, new, removed):
    """A model of `new[layer]` in the place of each layer of a graph, without `removed` layers."""
    if isinstance(model, keras.Sequential):
        (x,) = model.inputs
        inputs = keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name)
        layers = [new[layer] for layer in model.layers if layer not in removed]
        made = keras.Sequential([inputs, *layers], name=model.name)
    else:
        made = keras.models.clone_model(
            # Not compiled: Keras would copy losses and metrics too, and cannot copy all.
            keras.Model(model.input, model.output, name=model.name),
            # Operations such as `+` are no layers, and stay as they are.
            clone_function=lambda layer: layer if layer in removed else new.get(layer, layer),
            call_function=lambda layer, *args, **kwargs: (
                args[0] if layer in removed else layer(*args, **kwargs)
            ),
        )
    compile_like(made, model)
    return made


def backbones(model):
    """The KerasHub backbones in a model, itself included."""
    hub: Any = sys.modules.get("keras_hub")
    cls = () if hub is None else hub.models.Backbone
    return [layer for layer in model._flatten_layers() if isinstance(layer, cls)]


def record_changes(model, changes):
    """Add changes to the config of a model, or of the KerasHub backbone in which they are.

    Changes are pairs of a layer and names of attributes, whose values are saved.
    """
    for holder in [*backbones(model), model]:
        paths = {layer: path for path, layer in _walk(holder)}
        own = [(paths[layer], tuple(names)) for layer, names in changes if layer in paths]
        changes = [(layer, names) for layer, names in changes if layer not in paths]
        if own:
            _set_record(holder, [*recorded(holder)[0], *own], recorded(holder)[1])


def recorded(model):
    """The changes in the config of a model, as pairs of a path and names, and its converters."""
    return vars(model).get("_record", ([], []))


def record_converters(model, converters):
    """Put converters into the config of a model in the place of those before.

    They are registered functions, called with the model that the original config describes; files
    of weights are as without them.
    """
    _set_record(model, recorded(model)[0], converters)


def _set_record(model, changes, converters):
    cls = getattr(model, "_original_class", type(model))
    if changes or converters:
        # Files of weights use the name for layers in a list.
        name = "WithReplacements" if changes else cls.__name__
        members = {"_original_class": cls, "__module__": __name__}
        cls = _register(type(name, (_WithReplacements, cls), members))
        _register(_WithReplacements)  # KerasHub takes the class of the name for the model's.
    # The class alone tells Keras how to save and load an object, and callers keep this one.
    model.__class__ = cls
    object.__setattr__(model, "_record", (changes, converters))  # Keras would track it.


class _WithReplacements:
    """Mixed into the class of a model whose layers were replaced."""

    _original_class: Any
    _record: tuple

    def get_config(self):
        serialize, (changes, converters) = keras.saving.serialize_keras_object, self._record
        replaced = []
        for path, names in changes:
            layer = _layer_at(self, path)
            attributes = {name: serialize(getattr(layer, name)) for name in names}
            replaced.append({"path": list(path), "attributes": attributes})
        recorded, self.__class__ = type(self), self._original_class
        try:
            original = serialize(self)
        finally:
            self.__class__ = recorded
        original.pop("compile_config", None)
        return {
            "model": original,
            "replaced": replaced,
            "converters": list(map(serialize, converters)),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        def revive(each):
            return keras.saving.deserialize_keras_object(each, custom_objects=custom_objects)

        model = revive(config["model"])
        for converter in config.get("converters", ()):  # 0.2 had none.
            revive(converter)(model)
        for path, attributes in (each.values() for each in config["replaced"]):
            layer = _layer_at(model, path)
            for name, value in attributes.items():
                set_state(layer, name, revive(value))
            record_changes(model, [(layer, tuple(attributes))])
        return model

    def save_to_preset(self, preset_dir, *args, **kwargs):
        """Save a preset of KerasHub, which has the layers before the converters."""
        original, (changes, converters) = self._original_class, self._record
        if changes and not (pathlib.Path(preset_dir) / "task.json").exists():
            rule = "KerasHub loads no preset of a backbone with replaced layers, only of its task"
            raise ValueError(f"{rule}. Received: `save_to_preset`, {len(changes)} replaced layers")
        record_converters(self, [])
        try:
            original.save_to_preset(self, preset_dir, *args, **kwargs)
        finally:
            record_converters(self, converters)


# One name for all models; the config says which one it is.
_register = keras.saving.register_keras_serializable(PACKAGE, "WithReplacements")
_register(_WithReplacements)


def _walk(layer, path=()):
    """Pairs of a path, places among sublayers from the outside in, and a layer of a model."""
    yield path, layer
    for index, sublayer in enumerate(own_layers(layer)):
        yield from _walk(sublayer, (*path, index))


def _layer_at(root, path):
    for index in path:
        root = own_layers(root)[index]
    return root
