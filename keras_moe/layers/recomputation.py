"""Gradient checkpointing: layers that are computed twice, whose effects happen once.

A layer that counts, draws random numbers, moves a bias or adds losses is no function of its inputs:
computed again in the backward pass, it would do all of that again, from another state.
"""

import functools
import inspect

import keras
from keras import ops

from keras_moe._internal.base_layer import BaseLayer
from keras_moe._internal.keras_internals import (
    current_call,
    get_keras_mask,
    in_stateless_scope,
    recompute_as_one,
    set_keras_mask,
    stored_dtypes,
)
from keras_moe.backend import backend


class Recomputable(BaseLayer):
    """Abstract: a layer that `keras.RematScope` may compute again, with its effects once."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "call" in vars(cls):
            cls.call = _effects_once(cls.call)

    def rematerialized_call(self, call, *args, **kwargs):
        # Keras's own wrapper fails with effects on JAX, and with `training` on TensorFlow.
        if super().rematerialized_call(call, *args, **kwargs) is call:
            return call
        recompute_as_one(self)
        return functools.partial(_recomputed, self, call)


def _recomputed(layer, call, *args, **kwargs):
    """`call(*args, **kwargs)`, of which only inputs and outputs are kept for the gradient."""
    trained = layer.trainable_variables
    state = [*layer.non_trainable_variables, *layer.metrics_variables]
    leaves = keras.tree.flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if _is_float(leaf)]
    with stored_dtypes():
        # Reshaped, to read them here: TensorFlow adds a gradient for each variable read in the
        # function, to which `convert_to_tensor` would hand the variable itself.
        weights = [ops.reshape(variable, variable.shape) for variable in trained]
        # Read once: TensorFlow's optimizer of graphs may let a second read follow the assignment.
        values = list(map(ops.stop_gradient, state))
    again, found = current_call(), {}

    def function(*tensors):
        inputs = list(leaves)
        for place, tensor in zip(places, tensors[len(trained) :]):
            set_keras_mask(tensor, get_keras_mask(leaves[place]))
            inputs[place] = tensor
        args_again, kwargs_again = keras.tree.pack_sequence_as((args, kwargs), inputs)
        mapping = zip([*trained, *state], [*tensors[: len(trained)], *values])
        with again(), keras.StatelessScope(mapping, collect_losses=True) as scope:
            before = list(map(scope.get_current_value, state))
            outputs = call(*args_again, **kwargs_again)
        after = list(map(scope.get_current_value, state))
        found["changed"] = [n for n, value in enumerate(after) if value is not before[n]]
        found["structure"] = keras.tree.map_structure(lambda _: 0, outputs)
        updates = [ops.stop_gradient(after[number]) for number in found["changed"]]
        return [*keras.tree.flatten(outputs), *updates, *scope.losses]

    results = iter(keras.remat(function)(*weights, *(leaves[place] for place in places)))
    outputs = keras.tree.map_structure(lambda _: next(results), found["structure"])
    for number in found["changed"]:
        values[number] = ops.copy(values[number])  # PyTorch assigns in place
    _take_effect(layer, [(state[number], next(results)) for number in found["changed"]], results)
    return outputs


def _effects_once(call):
    """The `call` of a layer, for `torch.utils.checkpoint`.

    It calls layers a second time in the backward pass without telling them. A repeated call stands
    for the last call in training: it starts from the same state, and has no effects. The layer
    keeps that state until it is called without `training`.
    """

    if "training" not in inspect.signature(call).parameters:
        return call  # It has no effects, or calls another that has the argument.

    @functools.wraps(call)
    def called(layer, *args, training=None, **kwargs):
        run = functools.partial(call, layer, *args, **kwargs)
        recomputation = backend.recomputation()
        if in_stateless_scope() or recomputation is None:
            return run(training=training)
        if recomputation == "running":
            last = None if training is False else vars(layer).get("_last_call")
            if last is None:
                return run(training=training)
            before, again, training = last
            with again(), keras.StatelessScope(before, collect_losses=True):
                return run(training=training)
        if not training:
            if training is None:
                vars(layer)["_last_call"] = None
            return run(training=training)
        with _Updates(collect_losses=True) as scope:
            outputs = run(training=training)
        updates = list(scope.updates.values())
        before = [(variable, ops.copy(variable.value)) for variable, _ in updates]
        vars(layer)["_last_call"] = before, current_call(), training  # not tracked by Keras
        _take_effect(layer, updates, scope.losses)
        return outputs

    return called


class _Updates(keras.StatelessScope):
    """A scope that also knows which variables are updated, perhaps kernels among them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.updates = {}

    def add_update(self, update):
        super().add_update(update)
        self.updates[id(update[0])] = update


def _take_effect(layer, updates, losses):
    for variable, value in updates:
        variable.assign(value)
    for loss in losses:
        layer.add_loss(loss)


def _is_float(leaf):
    return ops.is_tensor(leaf) and keras.backend.is_float_dtype(leaf.dtype)
