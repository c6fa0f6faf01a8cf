"""A bank of Keras layers."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_instance
from keras_moe._internal.keras_internals import parameters_of
from keras_moe._internal.serialization import config_of, note_part, register
from keras_moe._internal.types import Tensor
from keras_moe.backend import backend
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.layer_groups import Alike, engine_of, map_groups
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.sublayers import (
    accepted_arguments,
    build_and_measure,
    check_output,
    freeze_parts,
)
from keras_moe.ops.plans import GroupedPlan, combine, dispatch


@register
class LayerExperts(ExpertBank):
    """Experts that are Keras layers or models; they may differ from each other.

    Only the layers that serve a token run on it. Each layer sees rows (n, D) and must return rows
    (n, D') with the same D' for all experts; in a mixture with `token_axes`, rows are whole samples
    (n, ...). Under XLA the rows come in tiles that are padded with zeros, so a layer that looks
    across rows, such as `BatchNormalization` in training, sees those zeros, and an activity
    regularizer counts once a tile. A mixture of experts as an expert, or in an expert whose `call`
    has a `mask`, receives a mask of the padding.

    For experts of one shape `FeedForwardExperts` and `GatedExperts` are faster. On a GPU or TPU
    XLA runs tiles of 64 rows one after the other, unless all layers are alike (one class, one
    configuration, no state but weights): then it runs larger tiles at once, each with a copy of
    its expert's weights.

    Args:
        layers: List of Keras layers, `keras.Sequential` or functional models.
        **kwargs: Arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        TypeError: If `layers` holds anything but Keras layers.
        ValueError: If `layers` is empty or holds a layer twice, if the layers disagree on D', or
            if one writes its trainable weights in a call, as `keras.layers.SpectralNormalization`.

    Call arguments:
        tokens: (T, D) float tensor, or (T, ...) of samples.
        plan: An `ops.GroupedPlan`.

    Input shape:
        (T, D), or (T, ...) of samples.

    Output shape:
        (T, D'), or (T, ...) of samples: the weighted sum of each token's expert outputs.

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

    def __init__(self, layers: Sequence[keras.Layer], **kwargs: Any):
        layers = tuple(
            keras.saving.deserialize_keras_object(layer) if isinstance(layer, dict) else layer
            for layer in layers
        )
        for layer in layers:
            check_instance("layers", layer, keras.Layer)
            if isinstance(layer, ExpertBank):
                raise TypeError(
                    "`layers` must be layers that are called with tokens alone. Received: "
                    f"`{type(layer).__name__}`, a bank of experts. Wrap it: "
                    "`MixtureOfExperts(experts)`."
                )
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(
                "`layers` must be different objects. Received: "
                f"layers={[layer.name for layer in layers]}"
            )
        super().__init__(len(layers), **kwargs)
        for layer in layers:
            note_part(layer)
        self.layers = layers
        freeze_parts(self)

    def build(self, tokens_shape):
        self._fix_shape(tokens_shape)
        # Refuses distributions that would split weights of a layer.
        backend.devices.expert_processes()
        rows_shape = (None, *tokens_shape[1:])
        num_kept = None if len(rows_shape) == 2 else 1
        shapes = [
            build_and_measure("layers", layer, rows_shape, num_kept)[1:] for layer in self.layers
        ]
        if len(set(shapes)) > 1 or None in (*rows_shape[1:], *shapes[0]):
            raise ValueError(
                "All experts must return rows of one known shape. Received: shapes "
                f"{shapes} from {[layer.name for layer in self.layers]}, inputs {rows_shape}"
            )
        self._row_shape, self._output_shape = rows_shape[1:], shapes[0]

    def call(self, tokens: Tensor, plan: GroupedPlan) -> Tensor:
        plan = plan.sort()
        tokens = ops.reshape(self._compute(tokens), (-1, math.prod(self._row_shape)))
        rows = dispatch(tokens, plan.without_weights())
        parameters = {id(variable) for variable in parameters_of(self)}
        variables = [each for each in self.non_trainable_variables if id(each) not in parameters]
        variables += self.metrics_variables
        functions = [_as_function(layer, variables, self._serve) for layer in self.layers]
        # Compiled loops allow neither writes to variables nor stored losses: both are passed
        # through. PyTorch assigns in place, which would change a value the gradient needs.
        state = [ops.copy(variable) for variable in variables]
        state.append(ops.zeros((), "float32"))
        alike = self._as_one_function() if backend.compiles_static_shapes() else None
        width = math.prod(self._output_shape)
        rows, state = map_groups(functions, rows, plan.sizes, width, state, alike)
        *values, loss = state
        for variable, value in zip(variables, values):
            variable.assign(value)
        self.add_loss(loss)
        outputs = combine(rows, plan.weights, plan.without_weights())
        return ops.reshape(outputs, (-1, *self._output_shape))

    def compute_all(self, tokens):
        # Each layer is called once, with all tokens.
        return ops.stack([self._compute(layer(tokens)) for layer in self.layers], axis=1)

    def _serve(self, layer, rows, inside=None):
        """Apply a layer to flat rows (n, D), which it sees in their own shape."""
        rows = ops.reshape(rows, (-1, *self._row_shape))
        if inside is not None and len(self._row_shape) == 1 and _takes_mask(layer):
            output = layer(rows, mask=inside)
        else:
            output = layer(rows)
        check_output("layers", output, (rows.shape[0], *self._output_shape))
        return ops.reshape(self._compute(output), (-1, math.prod(self._output_shape)))

    def _as_one_function(self):
        """The experts as one function of their weights, or None."""
        if not _are_alike(self.layers):
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

        return Alike(function, weights, has_samples=len(self._row_shape) > 1)

    def engine_on(self, platform, static_shapes):
        return engine_of(_are_alike(self.layers), platform, static_shapes)

    def compute_output_shape(self, tokens_shape):
        if self.built:
            return (tokens_shape[0], *self._output_shape)
        return self.layers[0].compute_output_shape(tokens_shape)

    def get_config(self):
        return {**super().get_config(), "layers": [config_of(layer) for layer in self.layers]}


def _as_function(layer, variables, serve):
    """A layer as a function of rows, state and a mask of the rows.

    The state is a list of values of `variables` and a sum of losses.
    """
    place = {id(variable): index for index, variable in enumerate(variables)}
    state_of_layer, parameters = [], []
    for variable in (*layer.variables, *layer.metrics_variables):
        if id(variable) in place:
            state_of_layer.append((variable, place[id(variable)]))
        else:
            parameters.append((variable, ops.convert_to_tensor(variable)))

    def function(rows, state, inside):
        mapping = [*parameters, *((variable, state[index]) for variable, index in state_of_layer)]
        # Not `stateless_call`, which leaves out what `__call__` does: dtypes, the training flag,
        # activity regularizers. Losses of weights reach the model through the layer itself.
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            before = [scope.get_current_value(variable) for variable, _ in parameters]
            output = serve(layer, rows, inside)
        for (variable, _), value in zip(parameters, before):
            if scope.get_current_value(variable) is not value:
                raise ValueError(
                    "An expert must not write its trainable weights in a call. Received: "
                    f"`{layer.name}`, which writes {variable.path!r}"
                )
        state = list(state)
        for variable, index in state_of_layer:
            state[index] = scope.get_current_value(variable)
        for loss in scope.losses:
            state[-1] = state[-1] + ops.cast(loss, "float32")
        return output, state

    return function


def _takes_mask(layer):
    """Whether a layer needs a mask of its rows: it holds a mixture, which counts tokens."""
    holds_mixture = any(isinstance(part, MixtureOfExperts) for part in layer._flatten_layers())
    return holds_mixture and bool(accepted_arguments(layer, ("mask",)))


def _are_alike(layers):
    """Whether built layers compute the same function, but for the values of their weights.

    They have one class and configuration, weights of the same shapes, and no other state.
    """
    return len({_kind(layer) for layer in layers}) == 1 and not any(map(_has_state, layers))


_FUNCTIONS = ("activation", "recurrent_activation", "function")


def _kind(layer):
    """Hashable signature of a layer; its identity, if there is no signature."""
    parts = list(layer._flatten_layers())
    if any(type(part).__module__.partition(".")[0] != "keras" for part in parts):
        return id(layer)  # the configuration of user-defined layers may be incomplete
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of lambdas, which are not saved here
            config = keras.saving.serialize_keras_object(layer)
    except (NotImplementedError, TypeError, ValueError):
        return id(layer)
    weights = [(variable.shape, variable.dtype) for variable in layer.variables]
    # A configuration names functions, and different functions may have one name.
    functions = [[id(vars(part).get(name)) for name in _FUNCTIONS] for part in parts]
    dtypes = [part.dtype_policy.name for part in parts]
    return repr((type(layer), _without_names(config), weights, functions, dtypes))


def _without_names(config):
    """A configuration without names and initializers, which do not change what is computed."""
    if isinstance(config, dict):
        return {
            key: _without_names(value)
            for key, value in config.items()
            if key != "name" and not key.endswith("_initializer")
        }
    if isinstance(config, (list, tuple)):
        return [_without_names(value) for value in config]
    return config


def _has_state(layer):
    parameters = {id(variable) for variable in parameters_of(layer)}
    return any(id(variable) not in parameters for variable in layer.variables)
