"""What the MoE layers of a model decide on given data."""

import contextlib

import keras
from keras import ops

from keras_moe._internal.batches import check_list_of_batches, running
from keras_moe._internal.keras_internals import forget_compiled
from keras_moe.inspection.finding import moe_layers


def record_routings(model, batches):
    """What the routers of a model decide on some data, in inference.

    Args:
        model: a Keras model with MoE layers.
        batches: iterable of inputs, each what `model(...)` takes.

    Returns:
        Dict from the name of each MoE layer to a list with one `ops.Routing` of NumPy arrays for
        each of its calls: one a batch, unless the model calls a layer more often.

    Raises:
        ValueError: If the model has no MoE layer or cannot run on the batches, or `batches` is an
            array or a tuple of them.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> routings = keras_moe.inspection.record_routings(model, [keras.random.normal((8, 16))])
    >>> routings["moe"][0].indices.shape
    (8, 2)
    """
    check_list_of_batches("batches", batches)
    return recorded(model, batches, "batches")


def recorded(model, batches, name):
    """`record_routings` of batches that have a name in errors."""
    layers = moe_layers(model)
    routings: dict[str, list] = {name: [] for name in layers}
    number = -1
    with listening({layer: _recorder(routings[name]) for name, layer in layers.items()}):
        for number, batch in enumerate(batches):
            with running(model, name, number, batch):
                model(batch, training=False)
    if number < 0:
        raise ValueError(
            f"`{name}` must hold a batch at least. Received: none. Pass a list: a generator is "
            "empty once it was read."
        )
    return routings


def count_in_evaluation(model):
    """A context in which the MoE layers of a model count in inference as they do in training.

    They stop when the context ends, also by an exception. `evaluate` and `predict` are traced anew
    in it, and again behind it. Of functions that you compile yourself, those of the context count
    whenever they are called, and others never.

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
    return _CountingAnew(model)


@contextlib.contextmanager
def listening(listeners):
    """Tells functions what MoE layers do, in eager calls.

    Args:
        listeners: dict from a layer to a function of an `ops.Routing` and of the tokens (T, D).
    """
    with _Given("routing_listener", listeners):
        yield


class _Given(contextlib.AbstractContextManager, contextlib.ContextDecorator):
    """Gives layers another value of an attribute, and the former one back after any exit."""

    def __init__(self, name, values):
        self._name, self._values, self._before = name, values, []

    def __enter__(self):
        self._before.append({layer: getattr(layer, self._name) for layer in self._values})
        self._set(self._values)

    def __exit__(self, *error):
        self._set(self._before.pop())

    def _set(self, values):
        for layer, value in values.items():
            setattr(layer, self._name, value)


class Counting(_Given):
    """Lets the MoE layers of a model count in inference, where it is traced for that."""

    def __init__(self, model):
        super().__init__("counts_in_evaluation", dict.fromkeys(moe_layers(model).values(), True))


class _CountingAnew(Counting):
    """Also makes Keras trace again what it has compiled, which counts or does not."""

    def __init__(self, model):
        super().__init__(model)
        self._model = model

    def _set(self, values):
        super()._set(values)
        forget_compiled(self._model, ("test_function", "predict_function"))


def _recorder(routings):
    def record(routing, tokens):
        routings.append(keras.tree.map_structure(ops.convert_to_numpy, routing))

    return record
