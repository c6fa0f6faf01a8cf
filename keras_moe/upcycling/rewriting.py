"""Mixtures in the place of dense feed-forward networks, in models that save and load."""

from typing import Any

import keras

from keras_moe._internal.keras_internals import (
    Functional,
    compile_like,
    forget_old_weights,
    own_layers,
    set_state,
)
from keras_moe._internal.serialization import PACKAGE, register
from keras_moe.layers.transformer_block import TransformerBlock


@register
class Ones(keras.layers.Layer):
    """The factor of a gate that has become the whole network."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.built = True  # `quantize` asks, of a model that has not run yet

    def call(self, inputs):
        return keras.ops.ones_like(inputs)


def rewrite(model, mixtures):
    """The model with mixtures instead of feed-forwards, from pairs of both.

    Functional and sequential models that contain one are replaced by new models with the same other
    layers; everything else changes in place.
    """
    stand_ins: dict[int, Any] = {}
    gated = []
    for feed_forward, mixture in mixtures:
        for layer in feed_forward.layers:
            stand_ins[id(layer)] = None
        stand_ins[id(feed_forward.layers[0])] = mixture
        if feed_forward.gate is not None:
            # Its block still applies the activation to the gate, and multiplies by `up`.
            dtype = feed_forward.up.dtype_policy.name
            stand_ins[id(feed_forward.up)] = Ones(dtype=dtype, name=feed_forward.up.name)
            gated.append(feed_forward.owner)
    rewriting = _Rewriting(stand_ins)
    model = rewriting.of(model)
    for block in gated:
        set_state(block, "activation", keras.activations.linear)
        rewriting.changes.append((block, ["activation"]))
    if rewriting.changes:
        _record(model, rewriting.changes)
    forget_old_weights(model)
    return model


def is_graph(layer):
    """Whether a layer is nothing but a list or graph of layers, which can be rewritten."""
    # A subclass may keep its layers elsewhere too, as those of KerasHub do.
    return type(layer) in (Functional, keras.Sequential)


def sublayers(layer):
    """Pairs of a name and a Keras layer for the attributes of a layer that are one."""
    # PyTorch keeps modules apart from other attributes.
    names = [*vars(layer), *vars(layer).get("_modules", ())]
    pairs = [(name, getattr(layer, name)) for name in names]
    return [(name, value) for name, value in pairs if isinstance(value, keras.Layer)]


class _Rewriting:
    """Replaces layers of a model, from the inside out."""

    def __init__(self, stand_ins):
        # From the id of a layer to the layer in its place, None for none.
        self.stand_ins = stand_ins
        # For blocks whose own config lacks the change: pairs of a layer and names of attributes.
        self.changes: list = []
        self._done: dict[int, keras.Layer] = {}

    def of(self, layer):
        """The layer that stands for a layer of the model; mostly itself."""
        if id(layer) in self.stand_ins:
            # The surrounding layer still calls the removed one.
            nothing = keras.layers.Identity(name=layer.name, dtype=layer.dtype_policy.name)
            return self.stand_ins[id(layer)] or nothing
        if id(layer) not in self._done:
            rewrite = self._graph if is_graph(layer) else self._attributes
            self._done[id(layer)] = rewrite(layer)
        return self._done[id(layer)]

    def _attributes(self, layer):
        names = []
        for name, sublayer in sublayers(layer):
            rewritten = self.of(sublayer)
            if rewritten is not sublayer:
                set_state(layer, name, rewritten)
                names.append(name)
        for sublayer in own_layers(layer):
            self.of(sublayer)
        if isinstance(layer, TransformerBlock):
            layer.examine_feedforward()
        elif names:
            self.changes.append((layer, names))
        return layer

    def _graph(self, model):
        rewritten = {id(layer): self.of(layer) for layer in model.layers}
        if all(rewritten[id(layer)] is layer for layer in model.layers):
            return model
        removed = {key for key, stand_in in self.stand_ins.items() if stand_in is None}
        if isinstance(model, keras.Sequential):
            (x,) = model.inputs
            inputs = keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name)
            layers = [rewritten[id(layer)] for layer in model.layers if id(layer) not in removed]
            new = keras.Sequential([inputs, *layers], name=model.name)
        else:
            new = keras.models.clone_model(
                # Of a compiled model Keras would copy losses and metrics too, which not all can be.
                keras.Model(model.input, model.output, name=model.name),
                # Operations such as `+` are none of its layers, and stay as they are.
                clone_function=lambda layer: (
                    layer if id(layer) in removed else rewritten.get(id(layer), layer)
                ),
                call_function=lambda layer, *args, **kwargs: (
                    args[0] if id(layer) in removed else layer(*args, **kwargs)
                ),
            )
        compile_like(new, model)
        return new


def _record(root, changes):
    """Put attributes into the config of a model: pairs of a layer in it and names of its own."""
    paths = {id(layer): path for path, layer in _walk(root)}
    if not isinstance(root, _WithReplacements):
        cls = type(root)
        members = {"_original_class": cls, "__module__": __name__}
        root.__class__ = _register(type("WithReplacements", (_WithReplacements, cls), members))
        object.__setattr__(root, "_replaced", [])  # There is nothing for Keras to track.
    root._replaced.extend((paths[id(layer)], tuple(names)) for layer, names in changes)


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
        _record(model, changes)
        return model


# One name for all models; the config says which one it is.
_register = keras.saving.register_keras_serializable(PACKAGE, "WithReplacements")
_register(_WithReplacements)


def _walk(layer, path=()):
    """Pairs of a path and a layer for each layer in a model, itself included.

    A path holds the place of each layer among the sublayers of its parent. It is the same in a
    model that was made from the same config.
    """
    yield path, layer
    for index, sublayer in enumerate(own_layers(layer)):
        yield from _walk(sublayer, (*path, index))


def _layer_at(root, path):
    for index in path:
        root = own_layers(root)[index]
    return root
