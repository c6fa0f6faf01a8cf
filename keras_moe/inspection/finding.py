"""The MoE layers of a model by name."""

import os

import keras

from keras_moe._internal.checks import check_instance
from keras_moe._internal.keras_internals import own_layers
from keras_moe.layers.mixture_of_experts import MixtureOfExperts


def moe_layers(model: keras.Model) -> dict[str, MixtureOfExperts]:
    """The MoE layers of a model by name; by path or number, where two have the same name.

    Paths leave out their common prefix, such as the name of the model.

    Args:
        model: A Keras model.

    Returns:
        Dict of names to `layers.MixtureOfExperts`, in the order of the model.

    Raises:
        ValueError: If the model has none.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> layers = keras_moe.inspection.moe_layers(keras.Sequential([keras.Input((16,)), moe]))
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            f"The model must have a `MixtureOfExperts` layer. Received: {model.name!r} without one"
        )
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        paths = [layer.path.split("/") for layer in layers]
        shared = len(os.path.commonprefix(paths))
        names = ["_".join(path[shared:] or path[-1:]) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}_{number}" for number, name in enumerate(names)]
    return dict(zip(names, layers))


def has_moe_layers(model: keras.Model) -> bool:
    """Whether a Keras model has a `layers.MixtureOfExperts`."""
    return bool(_layers(model))


def built_layers(model):
    """`moe_layers` of a model whose layers must have their weights."""
    layers = moe_layers(model)
    unbuilt = [name for name, layer in layers.items() if not layer.built]
    if unbuilt:
        raise ValueError(
            f"The model must be built; call it on some data first. Received: {unbuilt} unbuilt"
        )
    return layers


def _layers(model):
    check_instance("model", model, keras.Layer)
    found: dict = {}

    def visit(layer):  # Keras lists nested models in reverse.
        if layer not in found:
            found[layer] = isinstance(layer, MixtureOfExperts)
            for part in own_layers(layer):
                visit(part)

    visit(model)
    return [layer for layer, is_mixture in found.items() if is_mixture]
