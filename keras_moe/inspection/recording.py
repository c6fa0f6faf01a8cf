"""Routings and counts of a model on given data."""

import contextlib
from collections.abc import Iterable
from functools import partial

import keras
from keras import ops

from keras_moe._internal.checks import check_indices
from keras_moe._internal.keras_internals import forget_compiled
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
        batches: List of inputs without targets, each as `model(...)` takes them.
        training: Boolean. Whether the model is called as in training: with the noise of routers,
            and with counters and expert biases that change.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> routings = keras_moe.inspection.record_routings(model, [keras.random.normal((8, 16))])
    """
    check_list_of_batches("batches", batches)
    layers = moe_layers(model)
    routings: dict[str, list] = {name: [] for name in layers}

    def record(found, routing, tokens):
        found.append(keras.tree.map_structure(ops.convert_to_numpy, routing))

    with listening({layers[name]: partial(record, found) for name, found in routings.items()}):
        for number, batch in enumerate(batches):
            with running(number, batch):
                model(batch, training=training)
    return routings


def check_list_of_batches(name, batches):
    """Refuse one batch, whose rows or parts would be taken for batches."""
    parts = batches if isinstance(batches, tuple) else (batches,)
    if any(hasattr(part, "shape") for part in parts):
        rule = f"`{name}` must be a list of batches, as in `[inputs]`"
        raise ValueError(f"{rule}. Received: one batch")


@contextlib.contextmanager
def running(number, batch):
    """Run a model on a batch; a note on its error has the batch's number and shapes."""
    try:
        yield
    except Exception as error:
        arrays = [each for each in keras.tree.flatten(batch) if hasattr(each, "shape")]
        shapes = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in arrays)
        error.add_note(f"The model ran on batch {number}: {shapes}")
        raise


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

    Weights come from the current scores, with a gradient. `fit`, `evaluate` and `predict` are
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
    if not routings.keys() <= layers.keys():
        rule = f"The keys of `routings` must be names of MoE layers, {list(layers)}"
        raise ValueError(f"{rule}. Received: {list(routings)}")
    observers = {}
    for name, routing in routings.items():
        if isinstance(routing, list) and any(isinstance(each, Routing) for each in routing):
            rule = f"`routings[{name!r}]` must be one routing, such as the first of a recorded list"
            raise ValueError(f"{rule}. Received: a list of {len(routing)}")
        indices = routing.indices if isinstance(routing, Routing) else routing
        check_indices(f"routings[{name!r}]", indices, layers[name].router.num_experts)
        observers[layers[name]] = Observer(indices=ops.convert_to_tensor(indices))
    return _observing(observers, model, ("train_function", "test_function", "predict_function"))
