"""Routings and counts of a model on given data."""

import contextlib
from collections.abc import Iterable
from functools import partial

import keras
from keras import ops

from keras_moe._internal.checks import check_indices
from keras_moe._internal.keras_internals import forget_compiled
from keras_moe._internal.plain_text import describe
from keras_moe.inspection.summaries import moe_layers
from keras_moe.layers.gate import Observer
from keras_moe.ops.routing import Routing


def record_routings(
    model: keras.Model, batches: Iterable, training: bool = False
) -> dict[str, list[Routing]]:
    """Routings of some data by all MoE layers of a model.

    Returns a dict from the name of each layer to a list of its `ops.Routing`, of NumPy arrays: one
    for each call.

    Args:
        model: A Keras model with MoE layers.
        batches: List of inputs, each as `model(...)` takes them, else a ValueError is raised.
        training: Boolean. Whether the model is called as in training: with the noise of routers,
            and with counters and selection biases that change.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> routings = keras_moe.inspection.record_routings(model, [keras.random.normal((8, 16))])
    """
    check_list_of_batches("batches", batches)
    return recorded(model, batches, "batches", training)


def recorded(model, batches, name, training=False):
    layers = moe_layers(model)
    routings: dict[str, list] = {layer_name: [] for layer_name in layers}

    def record(found, routing, tokens):
        found.append(keras.tree.map_structure(ops.convert_to_numpy, routing))

    number = -1
    with listening({layers[name]: partial(record, found) for name, found in routings.items()}):
        for number, batch in enumerate(batches):
            with running(model, name, number, batch):
                model(batch, training=training)
    if number < 0:
        raise ValueError(f"`{name}` must hold at least one batch. Received: none")
    return routings


def check_list_of_batches(name, batches):
    """Refuse one batch, whose rows or parts would be taken for batches."""
    parts = batches if isinstance(batches, tuple) else [batches]
    if batches is None or any(hasattr(part, "shape") for part in parts):
        rule = f"`{name}` must be a list of batches, as in `[inputs]`"
        received = f"{name}=None" if batches is None else f"one batch, {_described(batches)}"
        raise ValueError(f"{rule}. Received: {received}")


@contextlib.contextmanager
def running(model, name, number, inputs, others=()):
    """Run a model on a batch that is named in errors; `others` are its targets and weights."""
    try:
        _check_inputs(getattr(model, "inputs", None) or (), inputs)
        yield
    except Exception as error:
        batch = _described((inputs, *others) if others else inputs)
        received = f"batch {number} of {batch} ({describe(error, 300)})"
        raise ValueError(f"The model must run on `{name}`. Received: {received}") from error


def _check_inputs(wanted, inputs):
    """Refuse what Keras accepts silently: further arrays, and floats in place of ids."""
    arrays = keras.tree.flatten(inputs)
    if isinstance(inputs, dict):
        arrays = [inputs.get(tensor.name) for tensor in wanted]
    if wanted and len(arrays) > len(wanted):
        raise ValueError(f"{len(arrays)} arrays for {len(wanted)} inputs")
    for tensor, array in zip(wanted, arrays):
        is_exact = any(kind in str(getattr(array, "dtype", "int")) for kind in ("int", "bool"))
        if "int" in tensor.dtype and not is_exact:
            raise TypeError(f"{array.dtype} in the place of the integers {tensor.name!r}")


def _described(batch):
    return keras.tree.map_structure(
        lambda leaf: f"{leaf.dtype} {tuple(leaf.shape)}" if hasattr(leaf, "dtype") else leaf, batch
    )


def listening(listeners):
    """A context in which functions receive the routings of MoE layers in eager calls.

    `listeners` maps layers to functions of an `ops.Routing` and of the tokens (T, D).
    """
    return _observing(
        {layer: Observer(on_routing=listener) for layer, listener in listeners.items()}
    )


def count_in_evaluation(model: keras.Model) -> contextlib.AbstractContextManager:
    """A context in which the MoE layers of a model count in inference, in counters of their own.

    `layer.read_counts(evaluation=True)` reads them; `layer.expert_counts` does not change.
    `evaluate` and `predict` are traced again in it and after it. A function that you compile
    yourself counts if it was compiled in the context.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> with keras_moe.inspection.count_in_evaluation(model):
    ...     outputs = model(keras.random.normal((8, 16)))
    """
    observers = dict.fromkeys(moe_layers(model).values(), Observer(counts=True))
    return _observing(observers, model, ("test_function", "predict_function"))


@contextlib.contextmanager
def _observing(observers, *traced_again):
    """A context in which layers have observers; a model may have to trace functions again."""
    try:
        for layer, observer in observers.items():
            layer.add_observer(observer)
        if traced_again:
            forget_compiled(*traced_again)
        yield
    finally:
        for layer, observer in observers.items():
            layer.remove_observer(observer)
        if traced_again:
            forget_compiled(*traced_again)


def replay_routings(model: keras.Model, routings: dict) -> contextlib.AbstractContextManager:
    """A context in which the MoE layers of a model use recorded choices of experts.

    Weights come from the live scores, with their gradient. `fit`, `evaluate` and `predict` are
    traced again in it and after it, so no callback of `fit` can enter it. A function that you
    compile yourself keeps the choices it was compiled with.

    Args:
        model: A Keras model.
        routings: Dict from the name of an MoE layer to an `ops.Routing`, or to its `indices` (T,
            K), of the batch that the model is called on. Layers without an entry choose as usual.
            Names of no layer and experts that do not exist raise a ValueError.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> model, inputs = keras.Sequential([keras.Input((16,)), moe]), keras.random.normal((8, 16))
    >>> routings = keras_moe.inspection.record_routings(model, [inputs])
    >>> first = {name: calls[0] for name, calls in routings.items()}
    >>> with keras_moe.inspection.replay_routings(model, first):
    ...     outputs = model(inputs, training=True)
    """
    layers = moe_layers(model)
    names = sorted(routings) if isinstance(routings, dict) else [type(routings).__name__]
    if not set(names) <= layers.keys():
        rule = f"`routings` must be a dict with names of MoE layers, {sorted(layers)}"
        raise ValueError(f"{rule}. Received: {names}")
    observers = {}
    for name, routing in routings.items():
        if isinstance(routing, list) and any(isinstance(each, Routing) for each in routing):
            rule = f"`routings[{name!r}]` must be one routing, such as the first of a recorded list"
            raise ValueError(f"{rule}. Received: a list of {len(routing)}")
        indices = routing.indices if isinstance(routing, Routing) else routing
        check_indices(f"routings[{name!r}]", indices, layers[name].router.num_experts)
        observers[layers[name]] = Observer(indices=ops.convert_to_tensor(indices))
    return _observing(observers, model, ("train_function", "test_function", "predict_function"))
