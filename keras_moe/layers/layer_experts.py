"""A bank of any Keras layers."""

import keras
from keras import ops

from keras_moe._internal.parameters import parameters_of
from keras_moe._internal.serialization import config_of, note_part, register
from keras_moe._internal.shape_checks import check_inputs_shape, check_returned
from keras_moe._internal.validation import shortened
from keras_moe.backend import backend
from keras_moe.layers.expert_bank import ExpertBank, check_engine_question, check_takes_tokens
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.sublayers import (
    accepted_arguments,
    are_alike,
    build_and_measure,
    check_takes_axes,
)
from keras_moe.ops.grouped.functions import Alike, engine_of, map_groups


@register
class LayerExperts(ExpertBank):
    """Experts that are Keras layers or models, each different if wanted.

    Only the layers that serve a token run on it. Each layer sees rows (n, D) and must return rows
    (n, D') with the same D' for all experts. Under XLA the rows come in tiles that are padded with
    zeros, so a layer that looks across rows, as `BatchNormalization` does in training, sees those
    zeros, and an activity regularizer counts once a tile. A mixture of experts as an expert, or
    inside of one whose `call` has a `mask`, is told which rows are padding.

    For experts of one shape `FeedForwardExperts` and `GatedExperts` are faster. On a GPU or TPU
    XLA runs tiles of 64 rows one after the other, unless all layers are alike (one class, one
    configuration, no state but weights): then it runs larger tiles at once, each with a copy of
    its expert's weights.

    Args:
        layers: list of Keras layers, `keras.Sequential` or functional models.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        TypeError: If `layers` is not a list of Keras layers.
        ValueError: If it is empty, holds a layer twice, or the layers disagree on D', or one writes
            its trainable weights in a call, as `keras.layers.SpectralNormalization` does.

    Call arguments:
        tokens: (T, D) float tensor.
        plan: an `ops.GroupedPlan`.

    Returns:
        (T, D'): each token's expert outputs, weighted and summed.

    Example:

    >>> experts = keras_moe.layers.LayerExperts([
    ...     keras.layers.Dense(64),
    ...     keras.Sequential([keras.layers.Dense(32, "relu"), keras.layers.Dense(64)]),
    ... ])
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    Reference: Jacobs et al. 1991, "Adaptive mixtures of local experts", where an expert may be any
    network.
    """

    _attribute_checks = {"layers": lambda name, value: _as_layers(value)}
    _kept_attributes = ("layers",)

    def __init__(self, layers, **kwargs):
        layers = _as_layers(layers)
        for layer in layers:
            note_part(layer)
        super().__init__(len(layers), **kwargs)
        self.layers = layers

    def build(self, tokens_shape):
        check_inputs_shape(tokens_shape)
        rows_shape = (None, tokens_shape[-1])
        shapes = [build_and_measure("layers", layer, rows_shape) for layer in self.layers]
        widths = [shape[-1] for shape in shapes]
        if len(set(widths)) > 1:
            raise ValueError(
                "All experts must return the same number of features. Received: "
                f"{widths} features from {[layer.name for layer in self.layers]}. "
                "End each expert with a layer of the same width."
            )
        self._width = widths[0]

    def call(self, tokens, plan):
        plan = plan.sort()
        rows = plan.dispatch(self._compute(tokens))
        learnt = {id(variable) for variable in parameters_of(self)}
        variables = [each for each in self.non_trainable_variables if id(each) not in learnt]
        variables += self.metrics_variables
        functions = [_as_function(layer, variables, self._serve) for layer in self.layers]
        # Compiled loops allow no writes to variables and no stored losses: both are passed through.
        # PyTorch assigns in place, what the gradient may need.
        state = [ops.copy(variable) for variable in variables]
        state.append(ops.zeros((), "float32"))
        alike = self._as_one_function() if backend.compiles_static_shapes() else None
        rows, state = map_groups(functions, rows, plan.groups.sizes, self._width, state, alike)
        *values, loss = state
        for variable, value in zip(variables, values):
            variable.assign(value)
        self.add_loss(loss)
        return plan.combine(rows)

    def _serve(self, layer, rows, inside=None):
        if inside is not None and _takes_mask(layer):
            output = layer(rows, mask=inside)
        else:
            output = layer(rows)
        check_returned("layers", output, (rows.shape[0], self._width))
        return self._compute(output)

    def _as_one_function(self):
        """The experts as one function of their weights, or None."""
        if not are_alike(self.layers):
            return None
        first = self.layers[0]

        def weights():
            variables = zip(*(layer.variables for layer in self.layers), strict=True)
            return [ops.stack([each.value for each in of_experts]) for of_experts in variables]

        def function(weights, rows):
            mapping = zip(first.variables, weights)
            with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
                output = self._serve(first, rows)
            losses = [ops.cast(loss, "float32") for loss in scope.losses]
            return output, sum(losses, ops.zeros((), "float32"))

        return Alike(function, weights)

    def engine_on(self, platform, static_shapes):
        check_engine_question(self, platform, static_shapes)
        return engine_of(are_alike(self.layers), platform, static_shapes)

    def compute_output_shape(self, tokens_shape):
        check_inputs_shape(tokens_shape)
        if self.built:
            return (*tokens_shape[:-1], self._width)
        return self.layers[0].compute_output_shape(tokens_shape)

    def get_config(self):
        return {**super().get_config(), "layers": [config_of(layer) for layer in self.layers]}


def _as_function(layer, variables, serve):
    """A layer as a function of rows, a state, and which rows are no padding, or None if all.

    The state are values of variables, and a loss behind them.
    """
    place = {id(variable): index for index, variable in enumerate(variables)}
    own, learnt = [], []
    for variable in (*layer.variables, *layer.metrics_variables):
        if id(variable) in place:
            own.append((variable, place[id(variable)]))
        else:
            learnt.append((variable, ops.convert_to_tensor(variable)))

    def function(rows, state, inside):
        mapping = [*learnt, *((variable, state[index]) for variable, index in own)]
        # Not `stateless_call`, which leaves out what `__call__` does: dtypes, the training flag,
        # activity regularizers. Losses of weights reach the model through the layer itself.
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            before = [scope.get_current_value(variable) for variable, _ in learnt]
            output = serve(layer, rows, inside)
        _check_not_written(layer, scope, learnt, before)
        state = list(state)
        for variable, index in own:
            state[index] = scope.get_current_value(variable)
        for loss in scope.losses:
            state[-1] = state[-1] + ops.cast(loss, "float32")
        return output, state

    return function


def _check_not_written(layer, scope, learnt, before):
    for (variable, _), value in zip(learnt, before):
        if scope.get_current_value(variable) is not value:
            raise ValueError(
                "An expert of `LayerExperts` must not write its trainable weights in a call. "
                f"Received: `{layer.name}`, which writes {variable.path!r}. Make that weight "
                "`trainable=False`, or use the layer outside of the experts."
            )


def _takes_mask(layer):
    """Whether a layer has use for a mask of its rows: it holds a mixture, which counts tokens."""
    holds_mixture = any(isinstance(part, MixtureOfExperts) for part in layer._flatten_layers())
    return holds_mixture and bool(accepted_arguments(layer, ("mask",)))


def _as_layers(layers):
    if not isinstance(layers, (list, tuple)):
        raise TypeError(
            "`layers` must be a list of Keras layers. "
            f"Received: layers={shortened(layers)} (of type {type(layers).__name__}). "
            "Pass `LayerExperts([layer, layer, ...])`."
        )
    layers = [
        keras.saving.deserialize_keras_object(layer) if isinstance(layer, dict) else layer
        for layer in layers
    ]
    if not layers:
        raise ValueError(
            "`layers` must hold at least one expert. Received: layers=[]. Pass one layer an expert."
        )
    for layer in layers:
        if not isinstance(layer, keras.Layer):
            raise TypeError(
                "`layers` must be a list of Keras layers. "
                f"Received: {shortened(layer)} (of type {type(layer).__name__}) in it. "
                "Make an instance of a class, and wrap a function in `keras.layers.Lambda`."
            )
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(
            "`layers` must be different objects: a layer that is listed twice would be one expert "
            f"with two places. Received: {[layer.name for layer in layers]}. Make a new layer "
            "for each."
        )
    for layer in layers:
        check_takes_tokens("layers", layer)
        check_takes_axes("layers", layer, 2)
    return tuple(layers)
