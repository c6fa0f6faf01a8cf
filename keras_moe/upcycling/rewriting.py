"""Puts mixtures in the place of dense feed-forward networks."""

from typing import Any

import keras

from keras_moe._internal import replacing
from keras_moe._internal.keras_internals import (
    compile_like,
    forget_old_weights,
    own_layers,
    set_state,
)
from keras_moe._internal.serialization import register
from keras_moe.layers.transformer_block import TransformerBlock
from keras_moe.upcycling.feed_forwards import is_graph


@register
class Ones(keras.layers.Layer):
    """What a gate is multiplied by, where the gate has become the whole network."""

    def call(self, inputs):
        return keras.ops.ones_like(inputs)


def rewrite(model, mixtures):
    """The model with mixtures instead of feed-forwards.

    Functional and sequential models that contain one are replaced by new models with the same other
    layers; everything else changes in place.

    Args:
        model: a built Keras model.
        mixtures: list of pairs of a `FeedForward` and a built `MixtureOfExperts`.
    """
    stand_ins: dict[int, Any] = {}
    gated = []
    for feed_forward, mixture in mixtures:
        for layer in feed_forward.layers:
            stand_ins[id(layer)] = None  # It goes away.
        stand_ins[id(feed_forward.layers[0])] = mixture
        if feed_forward.gate is not None:
            # Its block still applies the activation to the gate, and multiplies by what is up.
            dtype = feed_forward.up.dtype_policy.name
            stand_ins[id(feed_forward.up)] = Ones(dtype=dtype, name=feed_forward.up.name)
            gated.append(feed_forward.owner)
    rewriting = _Rewriting(stand_ins)
    model = rewriting.of(model)
    for block in gated:
        set_state(block, "activation", keras.activations.linear)
        rewriting.changes.append((block, ["activation"]))
    if rewriting.changes:
        replacing.record(model, rewriting.changes)
    forget_old_weights(model)
    return model


class _Rewriting:
    """Replaces layers of a model, from the inside out.

    Args:
        stand_ins: dict from the id of a layer to the layer in its place, None for none.
    """

    def __init__(self, stand_ins):
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
            rewritten = self._graph(layer) if is_graph(layer) else self._attributes(layer)
            self._done[id(layer)] = rewritten
        return self._done[id(layer)]

    def _attributes(self, layer):
        names = []
        for name, sublayer in replacing.sublayers(layer):
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
        make = self._sequential if isinstance(model, keras.Sequential) else self._functional
        new = make(model, rewritten, removed)
        compile_like(new, model)
        return new

    def _functional(self, model, rewritten, removed):
        # Of a compiled model Keras would copy losses and metrics too, which not all can be.
        not_compiled = keras.Model(model.input, model.output, name=model.name)
        return keras.models.clone_model(
            not_compiled,
            # Operations such as `+` are none of its layers, and stay as they are.
            clone_function=lambda layer: (
                layer if id(layer) in removed else rewritten.get(id(layer), layer)
            ),
            call_function=lambda layer, *args, **kwargs: (
                args[0] if id(layer) in removed else layer(*args, **kwargs)
            ),
        )

    def _sequential(self, model, rewritten, removed):
        inputs = [
            keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name) for x in model.inputs
        ]
        layers = [rewritten[id(layer)] for layer in model.layers if id(layer) not in removed]
        return keras.Sequential([*inputs, *layers], name=model.name)
