"""Gradient checkpointing: recompute a layer in the backward pass without repeating its effects.

A layer that counts, draws random numbers, moves a bias or adds losses is no function of its inputs:
computed again in the backward pass, it would do all of that again, from another state.
"""

import functools

import keras
from keras import ops

from keras_moe._internal.base_layer import BaseLayer
from keras_moe._internal.keras_internals import (
    current_call,
    get_keras_mask,
    recompute_as_one,
    set_keras_mask,
    stored_dtypes,
)


class Recomputable(BaseLayer):
    """Abstract: a layer that `keras.RematScope` recomputes in training, its effects only once."""

    def rematerialized_call(self, call, *args, **kwargs):
        # Keras's own wrapper fails with effects on JAX, and with `training` on TensorFlow.
        if super().rematerialized_call(call, *args, **kwargs) is call:
            return call
        recompute_as_one(self)
        parts = self._flatten_layers()
        observers = (each for part in parts for each in getattr(part, "routing_observers", ()))
        # A function would see each routing twice, on JAX without values.
        is_seen = any(observer.on_routing for observer in observers)
        if is_seen or not kwargs.get("training"):
            return call
        return functools.partial(_recomputed, self, call)


def _recomputed(layer, call, *args, **kwargs):
    """`call(*args, **kwargs)`, of which only inputs and outputs are kept for the gradient."""
    trained = layer.trainable_variables
    state = [*layer.non_trainable_variables, *layer.metrics_variables]
    leaves = keras.tree.flatten((args, kwargs))
    tensors = [place for place, leaf in enumerate(leaves) if ops.is_tensor(leaf)]
    places = [place for place in tensors if keras.backend.is_float_dtype(leaves[place].dtype)]
    with stored_dtypes():
        # Read here, outside the function: TensorFlow adds a gradient for each variable read inside.
        # Reshaped, as `convert_to_tensor` would pass the variable itself on.
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
        with stored_dtypes():  # to which the scope casts the values
            scope = keras.StatelessScope(mapping, collect_losses=True)
        with again(), scope:
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
    with stored_dtypes():  # In PyTorch a value that is read in another dtype is a copy.
        for number in found["changed"]:
            state[number].assign(next(results))
    for loss in results:
        layer.add_loss(ops.convert_to_tensor(loss))  # JAX returns a constant as a literal
    return outputs
