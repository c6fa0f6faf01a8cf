"""Looking into a model: its MoE layers by name, and what their routers decide on given data."""

import contextlib
import os
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import backend
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.ops.platforms import named_platform
from keras_moe.validation import check_batches, check_model


def moe_layers(model):
    """The MoE layers of a model by name; by path or number, where two have the same name.

    A path leaves out what all have in front, such as the name of the model.

    Args:
        model: a Keras model.

    Returns:
        Dict of names to `layers.MixtureOfExperts`, in the order of the model.

    Raises:
        ValueError: If the model has none.
        TypeError: If it is no Keras model.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> list(keras_moe.inspection.moe_layers(model))
    ['moe']
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "The model must have at least one `MixtureOfExperts` layer. "
            f"Received: model {model.name!r} without any. Add one, or leave this out."
        )
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        names = _distinct_paths(layers)
    if len(set(names)) < len(names):
        names = [f"{name}_{number}" for number, name in enumerate(names)]
    return dict(zip(names, layers))


class LayerDescription(NamedTuple):
    """How a MoE layer of a model is computed; all are strings.

    - `name`: its name in the model.
    - `router`, `experts`: their classes.
    - `dtype`: the compute dtype of the experts.
    - `platform`: "cpu", "gpu" or "tpu".
    - `engine`: "rows" (kernels for all rows at once), "padded" (one batched product over padded
      tiles), "tiles" (a loop over tiles of rows) or "slices" (groups of their exact sizes); for
      experts that are Keras layers "vectorized" (all tiles at once, each with a copy of its
      weights), "scan" (one tile after another) or "slices".
    """

    name: str
    router: str
    experts: str
    dtype: str
    platform: str
    engine: str


def describe(model):
    """How each MoE layer of a model is computed on this machine.

    The engine follows from the backend, the platform, the dtype, and whether `model.compile` turned
    XLA on; `ops.grouped.engines.choose` has the rule. To read it for a platform that is not here,
    call this inside `ops.platform`.

    Args:
        model: a built Keras model.

    Returns:
        List of one `LayerDescription` for each MoE layer, in the order of the model.

    Raises:
        ValueError: If the model has no MoE layer, or one that is not built.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> with keras_moe.ops.platform("cpu"):
    ...     (layer,) = keras_moe.inspection.describe(model)
    >>> layer.router, layer.experts, layer.dtype
    ('TopKRouter', 'FeedForwardExperts', 'float32')
    """
    platform = named_platform() or backend.current_platform()
    static_shapes = backend.compiles_static_shapes() or _is_compiled_by_xla(model)
    layers = moe_layers(model)
    unbuilt = [name for name, layer in layers.items() if not layer.built]
    if unbuilt:
        raise ValueError(
            "The model must be built: the engine depends on the sizes of its weights. Received: "
            f"model {model.name!r} whose layers {unbuilt} are not. Call it on some data first."
        )
    return [
        LayerDescription(
            name=name,
            router=type(layer.router).__name__,
            experts=type(layer.experts).__name__,
            dtype=layer.experts.compute_dtype,
            platform=platform,
            engine=layer.experts.engine_on(platform, static_shapes),
        )
        for name, layer in layers.items()
    ]


def has_moe_layers(model):
    """Whether a model has a `layers.MixtureOfExperts`."""
    return bool(_layers(model))


def record_routings(model, batches):
    """What the routers of a model decide on some data, in inference.

    Args:
        model: a Keras model with MoE layers.
        batches: iterable of inputs, each what `model(...)` takes.

    Returns:
        Dict from the name of each MoE layer to a list with one `ops.Routing` of NumPy arrays for
        each of its calls: one a batch, unless the model calls a layer more often.

    Raises:
        ValueError: If the model has no MoE layer, or `batches` is an array.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> routings = keras_moe.inspection.record_routings(model, [keras.random.normal((8, 16))])
    >>> routings["moe"][0].indices.shape
    (8, 2)
    """
    check_batches("batches", batches)
    layers = moe_layers(model)
    routings: dict[str, list] = {name: [] for name in layers}
    with listening({layer: _recorder(routings[name]) for name, layer in layers.items()}):
        for batch in batches:
            model(batch, training=False)
    return routings


@contextlib.contextmanager
def count_in_evaluation(model):
    """A context in which the MoE layers of a model count in inference what they count in training.

    After any exit from it they do not any more. A function that was compiled inside goes on
    counting, and one that was compiled outside does not begin.

    Args:
        model: a Keras model.

    Raises:
        ValueError: If the model has no MoE layer.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> moe = keras_moe.layers.MixtureOfExperts(experts)
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> with keras_moe.inspection.count_in_evaluation(model):
    ...     outputs = model(keras.random.normal((8, 16)))
    >>> int(keras.ops.sum(moe.expert_counts))
    16
    """
    with _given("counts_in_evaluation", dict.fromkeys(moe_layers(model).values(), True)):
        yield


@contextlib.contextmanager
def listening(listeners):
    """Tells functions what MoE layers do, in eager calls.

    Args:
        listeners: dict from a layer to a function of an `ops.Routing` and of the tokens (T, D).
    """
    with _given("routing_listener", listeners):
        yield


@contextlib.contextmanager
def _given(name, values):
    """Gives layers another value of an attribute, and the former one back after any exit."""
    before = {layer: getattr(layer, name) for layer in values}
    try:
        for layer, value in values.items():
            setattr(layer, name, value)
        yield
    finally:
        for layer, value in before.items():
            setattr(layer, name, value)


def _is_compiled_by_xla(model):
    return keras.backend.backend() == "tensorflow" and bool(model.jit_compile)


def _layers(model):
    check_model(model)
    return [layer for layer in model._flatten_layers() if isinstance(layer, MixtureOfExperts)]


def _distinct_paths(layers):
    paths = [layer.path.split("/") for layer in layers]
    shared = os.path.commonprefix(paths)
    return ["_".join(path[len(shared) :] or path[-1:]) for path in paths]


def _recorder(routings):
    def record(routing, tokens):
        routings.append(keras.tree.map_structure(ops.convert_to_numpy, routing))

    return record


__all__ = [
    "LayerDescription",
    "count_in_evaluation",
    "describe",
    "has_moe_layers",
    "moe_layers",
    "record_routings",
]
