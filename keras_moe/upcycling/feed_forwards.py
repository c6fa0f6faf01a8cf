"""Search for the dense feed-forward networks of a model, in three places.

Layers that follow one another in a functional or sequential model; a `Sequential` in an attribute
of another layer; and the Transformer blocks of KerasHub, by their attributes.
"""

import collections
from typing import Any, NamedTuple

import keras

from keras_moe._internal.keras_internals import calls_of, own_layers
from keras_moe.layers import MixtureOfExperts
from keras_moe.layers.replacement import is_graph, sublayers


class FeedForward(NamedTuple):
    """A dense feed-forward network of a model.

    - `name`: of its first `Dense`, or of the layer that holds it.
    - `up`, `down`, `gate`: `Dense` layers; `gate` may be None.
    - `activation`: function of the hidden features, or of the gate if there is one.
    - `layers`: the layers that the mixture replaces; it comes in the place of the first.
    - `owner`: the KerasHub block that holds it, or None.
    - `dropout`: rate of dropout of the hidden features.
    """

    name: str
    up: Any
    down: Any
    gate: Any
    activation: Any
    layers: tuple
    owner: Any = None
    dropout: float = 0.0

    @property
    def denses(self):
        return [dense for dense in (self.gate, self.up, self.down) if dense is not None]


def feed_forwards(model):
    found: dict[keras.Layer, FeedForward] = {}
    for each in _search(model, name=None, is_fixed=False):
        found.setdefault(each.up, each)
    return list(found.values())


def _search(layer, name, is_fixed):
    """Feed-forwards in a layer; `is_fixed` if no other layer can take its place."""
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
    # The graph of a functional model would still hold the old layers.
    in_attributes = [] if isinstance(layer, keras.Function) else list(sublayers(layer).values())
    yield from _in_attributes(layer)
    for sublayer in own_layers(layer):
        yield from _search(sublayer, layer.name, sublayer not in in_attributes)


def _in_attributes(layer):
    """The feed-forward of a Transformer block of KerasHub."""
    names = ("intermediate", "output", "gate")
    denses: list[Any] = [getattr(layer, f"_feedforward_{name}_dense", None) for name in names]
    up, down, gate = denses
    if not is_dense(up) or not is_dense(down) or _obstacle(up, [up.activation], down):
        return
    if gate is None:
        yield FeedForward(layer.name, up, down, None, up.activation, (up, down), layer)
    elif is_dense(gate) and _is_linear(up) and _is_linear(gate):
        # The mixture comes in the place of the gate, which the block passes to its activation.
        yield FeedForward(layer.name, up, down, gate, layer.activation, (gate, up, down), layer)


def _in_graph(model):
    """Feed-forwards of layers that follow one another."""
    following = _following_layers(model)
    for up in filter(is_dense, model.layers):
        layers, activations, down = _chain(up, following)
        if _obstacle(up, activations, down) is None:
            parts = (up, down, None, activations[0], (*layers, down))
            yield FeedForward(up.name, *parts, dropout=getattr(layers[-1], "rate", 0.0))


def _chain(up, following):
    """A `Dense` layer with activations and dropout after it, its activations, and what follows."""
    layers, after = [up], following.get(up)
    while isinstance(after, keras.layers.Activation):
        layers.append(after)
        after = following.get(after)
    # Experts draw each hidden feature alone: a subclass or a `noise_shape` drops several together.
    if type(after) is keras.layers.Dropout and after.noise_shape is None:
        layers.append(after)
        after = following.get(after)
    activations = [getattr(layer, "activation", keras.activations.linear) for layer in layers]
    return layers, [each for each in activations if each is not keras.activations.linear], after


def left_dense(model, found):
    """Why each other `Dense` layer from D to H > D features beside one back to D stays dense."""
    layers = model._flatten_layers()
    mixtures = [layer for layer in layers if isinstance(layer, MixtureOfExperts)]
    known = {dense for feed_forward in found for dense in feed_forward.denses}
    known.update(part for mixture in mixtures for part in mixture._flatten_layers())
    reasons = []
    for owner in layers:
        denses = list(filter(is_dense, own_layers(owner)))
        for up in denses:
            features, width = up.kernel.shape
            back = any(tuple(down.kernel.shape) == (width, features) for down in denses)
            if back and width > features and up not in known:
                known.add(up)
                reason = f"which the code of `{owner.name}` calls"
                if is_graph(owner):
                    _, *chain = _chain(up, _following_layers(owner))
                    inside = f"which is inside `{owner.name}`, and nothing else can take its place"
                    reason = _obstacle(up, *chain) or inside
                reasons.append(f"`{up.name}`, {reason}")
    return reasons


def _obstacle(up, activations, after):
    """Why a `Dense` layer and the layer after its activations are not converted, or None."""
    if after is None:
        return "as its outputs do not go to one layer only, or one of the two is called twice"
    if not is_dense(after) or tuple(after.kernel.shape) != tuple(up.kernel.shape)[::-1]:
        return f"which `{after.name}` follows, not a `Dense` layer back to as many features"
    if not _is_linear(after):
        return f"as `{after.name}` after it has an activation"
    if len(activations) != 1:
        return f"which has {len(activations)} activations"  # experts have one
    return None


def _following_layers(model):
    """From each layer to the layer that takes its outputs, if there is just one."""
    if isinstance(model, keras.Sequential):
        return dict(zip(model.layers, model.layers[1:]))
    calls = calls_of(model)
    following: dict = {}
    times = collections.Counter(layer for layer, *_ in calls)
    users = collections.defaultdict(list, {id(tensor): [None, None] for tensor in model.outputs})
    for layer, inputs, _ in calls:
        for tensor in inputs:
            users[id(tensor)].append(layer)
    for layer, _, outputs in calls:
        mine = [user for tensor in outputs for user in users[id(tensor)]]
        if len(mine) == 1 and times[layer] == times[mine[0]] == 1:
            following[layer] = mine[0]
    return following


def is_dense(layer):
    return type(layer) is keras.layers.Dense and layer.built


def _is_linear(layer):
    return layer.activation is keras.activations.linear
