"""Finds the dense feed-forward networks of a model.

One is a `Dense` layer from D to H features with an activation, then one back to D without. There
are three places: layers that follow one another in a functional or sequential model; a `Sequential`
in an attribute of another layer; and the Transformer blocks of KerasHub, by their attributes.
"""

from typing import Any, NamedTuple

import keras

from keras_moe._internal.keras_internals import Functional, calls_of, own_layers
from keras_moe._internal.replacing import sublayers
from keras_moe.layers.mixture_of_experts import MixtureOfExperts


class FeedForward(NamedTuple):
    """A dense feed-forward network of a model.

    - `name`: of its first `Dense`, or of the layer that holds it.
    - `up`, `down`, `gate`: `Dense` layers; `gate` is None, if there is none.
    - `activation`: function of the hidden features, of the gate where there is one.
    - `layers`: what the mixture stands for, and in whose place it comes: the first of them.
    - `owner`: the block of KerasHub that holds it, or None.
    """

    name: str
    up: Any
    down: Any
    gate: Any
    activation: Any
    layers: tuple
    owner: Any = None

    @property
    def denses(self):
        return [dense for dense in (self.gate, self.up, self.down) if dense is not None]


def feed_forwards(model):
    """The dense feed-forward networks of a built model, in its order."""
    found: dict[int, FeedForward] = {}
    for each in _search(model, name=None, is_fixed=False):
        found.setdefault(id(each.up), each)
    return list(found.values())


def is_graph(layer):
    """Whether Keras makes the layer from a list or graph of layers, which can be rewritten.

    A subclass may keep its layers elsewhere too, as those of KerasHub do.
    """
    return type(layer) in (Functional, keras.Sequential)


def _search(layer, name, is_fixed):
    """Feed-forwards in a layer; `is_fixed` tells that no other layer can take its place."""
    if isinstance(layer, MixtureOfExperts):
        return
    if is_graph(layer):
        if not is_fixed:
            pairs = list(_in_graph(layer))
            if name is not None and pairs and len(pairs[0].layers) == len(layer.layers):
                yield pairs[0]._replace(name=name, layers=(layer,))
                return
            yield from pairs
        for sublayer in layer.layers:
            yield from _search(sublayer, sublayer.name, is_fixed)
        return
    in_attributes = {id(sublayer) for _, sublayer in sublayers(layer)}
    if isinstance(layer, Functional):
        in_attributes = set()  # Its graph would still hold the old ones.
    yield from _in_attributes(layer)
    for sublayer in own_layers(layer):
        yield from _search(sublayer, layer.name, id(sublayer) not in in_attributes)


def _in_attributes(layer):
    """The feed-forward of a Transformer block of KerasHub."""
    names = ("intermediate", "output", "gate")
    denses: list[Any] = [getattr(layer, f"_feedforward_{name}_dense", None) for name in names]
    up, down, gate = denses
    if not _is_dense(up) or not _is_dense(down) or not _fit(up, down):
        return
    if gate is None:
        yield FeedForward(layer.name, up, down, None, up.activation, (up, down), layer)
    elif _is_dense(gate) and _is_linear(up) and _is_linear(gate):
        # Where the mixture comes: the block passes what is there through its activation.
        layers = (gate, up, down)
        yield FeedForward(layer.name, up, down, gate, layer.activation, layers, layer)


def _in_graph(model):
    """Feed-forwards of layers that follow one another."""
    following = _following_layers(model)
    for up in filter(_is_dense, model.layers):
        layers = [up]
        while isinstance(following.get(id(layers[-1])), (keras.layers.Dropout, _Activation)):
            layers.append(following[id(layers[-1])])
        down = following.get(id(layers[-1]))
        activations = [
            layer.activation
            for layer in layers
            if not isinstance(layer, keras.layers.Dropout) and not _is_linear(layer)
        ]
        # Experts have one.
        if len(activations) == 1 and _is_dense(down) and _fit(up, down):
            yield FeedForward(up.name, up, down, None, activations[0], (*layers, down))


def overlooked(model, found):
    """Names of `Dense` layers from D to H features that lead to one back to D by other layers."""
    known = {id(feed_forward.up) for feed_forward in found}
    names = []
    for part in model._flatten_layers():
        if not isinstance(part, (Functional, keras.Sequential)):
            continue
        following = _following_layers(part)
        for up in part.layers:
            between = down = following.get(id(up))
            while down is not None and not _is_dense(down):
                down = following.get(id(down))
            if down is None or down is between or id(up) in known or not _is_dense(up):
                continue
            if _fit(up, down):
                names.append(up.name)
    return names


_Activation = keras.layers.Activation


def _following_layers(model):
    """From the id of each layer to the only layer that takes its outputs, if there is just one."""
    if isinstance(model, keras.Sequential):
        return {id(a): b for a, b in zip(model.layers, model.layers[1:])}
    calls = calls_of(model)
    once = {id(layer) for layer, *_ in calls}
    for layer in {id(layer): layer for layer, *_ in calls}.values():
        if sum(layer is other for other, *_ in calls) > 1:
            once.discard(id(layer))
    users: dict[int, list] = {}
    for layer, inputs, _ in calls:
        for tensor in inputs:
            users.setdefault(id(tensor), []).append(layer)
    last = {id(tensor) for tensor in model.outputs}
    following = {}
    for layer, _, outputs in calls:
        mine = [user for tensor in outputs for user in users.get(id(tensor), [])]
        is_last = any(id(tensor) in last for tensor in outputs)
        if len(mine) == 1 and not is_last and {id(layer), id(mine[0])} <= once:
            following[id(layer)] = mine[0]
    return following


def _is_dense(layer):
    return type(layer) is keras.layers.Dense and layer.built


def _is_linear(layer):
    return layer.activation is keras.activations.linear


def _fit(up, down):
    """Whether they lead from D features back to D, the last without an activation."""
    return _is_linear(down) and tuple(down.kernel.shape) == tuple(up.kernel.shape)[::-1]
