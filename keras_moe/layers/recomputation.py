"""Gradient checkpointing: layers that are computed twice, whose effects happen once.

A layer that counts, draws random numbers, moves a bias or adds losses is no function of its inputs.
Computed again in the backward pass it would do all of it again, from another state than before.
"""

import functools

import keras
from keras import ops

from keras_moe._internal.keras_internals import current_call, in_stateless_scope, stored_dtypes
from keras_moe.backend import backend


class Recomputable(keras.layers.Layer):
    """Abstract: a layer that `keras.RematScope` may compute again, with its effects once."""

    def rematerialized_call(self, call, *args, **kwargs):
        # Keras's own wrapper fails with effects on JAX, and with `training` on TensorFlow.
        is_in_scope = super().rematerialized_call(call, *args, **kwargs) is not call
        return functools.partial(_recomputed, self, call) if is_in_scope else call


def effects_once(call):
    """The `call` of a layer, for what computes it again without telling, as PyTorch does.

    The last call of the layer in training is the one that is computed again, if the layer is not
    told that it is not training, nor was called since without being told.
    """

    @functools.wraps(call)
    def called(layer, *args, training=None, **kwargs):
        arguments = {**kwargs, "training": training}
        if in_stateless_scope() or not backend.may_recompute():
            return call(layer, *args, **arguments)
        if backend.is_recomputing():
            last = None if training is False else vars(layer).get("_last_call")
            if last is None:
                return call(layer, *args, **arguments)
            before, again, training = last
            with again(), keras.StatelessScope(before, collect_losses=True):
                return call(layer, *args, **{**arguments, "training": training})
        if not training:
            if training is None:
                object.__setattr__(layer, "_last_call", None)
            return call(layer, *args, **arguments)
        with keras.StatelessScope(collect_losses=True) as scope:
            outputs = call(layer, *args, **arguments)
        updates = [(each, scope.get_current_value(each)) for each in _written_by(layer)]
        updates = [(variable, value) for variable, value in updates if value is not None]
        before = [(variable, ops.copy(variable.value)) for variable, _ in updates]
        # Not through Keras, which would track the variables.
        object.__setattr__(layer, "_last_call", (before, current_call(), training))
        _take_effect(layer, updates, scope.losses)
        return outputs

    return called


def _recomputed(layer, call, *args, **kwargs):
    """`call(*args, **kwargs)`, of which only what comes in and out is kept for the gradient."""
    trained = layer.trainable_variables
    state = [*layer.non_trainable_variables, *layer.metrics_variables]
    leaves = keras.tree.flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if _may_have_gradient(leaf)]
    with stored_dtypes():
        weights = [ops.convert_to_tensor(variable) for variable in trained]
        values = [ops.convert_to_tensor(variable) for variable in state]
    again, found = current_call(), {}

    def function(*tensors):
        inputs = list(leaves)
        for place, tensor in zip(places, tensors[len(weights) :]):
            inputs[place] = tensor
        args_again, kwargs_again = keras.tree.pack_sequence_as((args, kwargs), inputs)
        mapping = zip([*trained, *state], [*tensors[: len(weights)], *values])
        with again(), keras.StatelessScope(mapping, collect_losses=True) as scope:
            before = list(map(scope.get_current_value, state))
            outputs = call(*args_again, **kwargs_again)
        after = list(map(scope.get_current_value, state))
        found["changed"] = [n for n, value in enumerate(after) if value is not before[n]]
        found["structure"] = keras.tree.map_structure(lambda _: 0, outputs)
        updates = [ops.stop_gradient(after[number]) for number in found["changed"]]
        return [*keras.tree.flatten(outputs), *updates, *scope.losses]

    inputs = [leaves[place] for place in places]
    results = list(keras.remat(function)(*weights, *inputs))
    num_outputs, changed = len(keras.tree.flatten(found["structure"])), found["changed"]
    for number in changed:  # PyTorch assigns in place
        values[number] = ops.copy(values[number])
    updates = zip((state[number] for number in changed), results[num_outputs:])
    _take_effect(layer, updates, results[num_outputs + len(changed) :])
    return keras.tree.pack_sequence_as(found["structure"], results[:num_outputs])


def _written_by(layer):
    """The variables that a call may write; `SpectralNormalization` writes kernels."""
    return [*layer.variables, *layer.metrics_variables]


def _take_effect(layer, updates, losses):
    for variable, value in updates:
        variable.assign(value)
    for loss in losses:
        layer.add_loss(loss)


def _may_have_gradient(leaf):
    if not keras.ops.is_tensor(leaf):
        return False
    return keras.backend.is_float_dtype(leaf.dtype)
