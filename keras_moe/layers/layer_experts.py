"""A bank of Keras layers, of which only the chosen one runs on a row."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import shortened
from keras_moe._internal.keras_internals import parameters_of, recompute_as_one
from keras_moe._internal.serialization import note_part, register
from keras_moe.backend import backend
from keras_moe.backend.padded import pad_tiles
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.sublayers import (
    accepted_arguments,
    build_and_measure,
    check_output,
    freeze_parts,
)
from keras_moe.ops.plans import GroupedPlan, combine, dispatch
from keras_moe.ops.platforms import named_platform

SCAN_ROWS = 64
# Not 0, where a layer may have no derivative: NaN times 0 is NaN.
PADDING = 1
# Longer programs would compile for a minute.
MAX_UNROLLED = 64


@register
class LayerExperts(ExpertBank):
    """Experts that are Keras layers or models; they may differ from each other.

    Only the layers that serve a token run on it. Each layer sees rows (n, D) and must return rows
    (n, D') with the same D' for all experts; in a mixture with `token_axes`, rows are whole samples
    (n, ...). Under XLA the rows come in tiles that are padded with ones, so a layer that looks
    across rows, such as `BatchNormalization` in training, sees those ones, and an activity
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

    Call arguments and output shape: as for `ExpertBank`, or (T, ...) for samples.

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

    fixed_arguments = ("num_experts",)

    def __init__(self, layers: Sequence[keras.Layer], **kwargs: Any):
        given, revive = layers, keras.saving.deserialize_keras_object
        if isinstance(given, Iterable):
            layers = tuple(revive(each) if isinstance(each, dict) else each for each in given)
        if layers is given or not all(isinstance(each, keras.Layer) for each in layers):
            raise TypeError(
                "`layers` must be a list of Keras layers, with functions in `keras.layers.Lambda`. "
                f"Received: layers={shortened(given)}"
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
        backend.expert_processes()
        rows_shape = (None, *tokens_shape[1:])
        num_kept = None if len(rows_shape) == 2 else 1
        try:
            shapes = [
                build_and_measure("layers", layer, rows_shape, num_kept)[1:]
                for layer in self.layers
            ]
        except ValueError as error:
            if num_kept == 1:
                raise
            rule = "Experts for whole samples, such as convolutions, need `token_axes=1`"
            raise ValueError(f"{error}\n{rule} in the mixture") from error
        if len(set(shapes)) > 1 or None in (*rows_shape[1:], *shapes[0]):
            raise ValueError(
                "All experts must return rows of one known shape. Received: shapes "
                f"{shapes} from {[layer.name for layer in self.layers]}, inputs {rows_shape}"
            )
        self._row_shape, self._output_shape = rows_shape[1:], shapes[0]
        recompute_as_one(self)

    def call(self, tokens: Tensor, plan: GroupedPlan) -> Tensor:
        plan = plan.sort()
        tokens = ops.reshape(self._compute(tokens), (-1, math.prod(self._row_shape)))
        rows = dispatch(tokens, plan.without_weights())
        parameters = {id(variable) for variable in parameters_of(self)}
        variables = [each for each in self.non_trainable_variables if id(each) not in parameters]
        variables += self.metrics_variables
        functions = [self._as_function(layer, variables) for layer in self.layers]
        # Compiled loops allow neither writes to variables nor stored losses: both are passed
        # through. PyTorch assigns in place, which would change a value the gradient needs.
        state = [ops.copy(variable) for variable in variables]
        state.append(ops.zeros((), "float32"))
        alike = self._as_one_function() if backend.needs_static_shapes() else None
        width = math.prod(self._output_shape)
        rows, state = _map_groups(functions, rows, plan.sizes, width, state, alike)
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

    def _as_function(self, layer, variables):
        """A layer as a function of rows, state and a mask of the rows, for `_map_groups`.

        The state is a list of values of `variables` and a sum of losses.
        """
        known = {id(variable) for variable in variables}
        constant = [each for each in layer.variables if id(each) not in known]
        parameters = [(variable, ops.convert_to_tensor(variable)) for variable in constant]

        def function(rows, state, inside):
            *values, loss = state
            mapping = [*parameters, *zip(variables, values)]
            # Not `stateless_call`, which leaves out what `__call__` does: dtypes, the training
            # flag, activity regularizers. Losses of weights reach the model through the layer.
            with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
                before = list(map(scope.get_current_value, constant))
                output = self._serve(layer, rows, inside)
            for variable, value in zip(constant, before):
                if scope.get_current_value(variable) is not value:
                    raise ValueError(
                        "An expert must not write its trainable weights in a call. Received: "
                        f"`{layer.name}`, which writes {variable.path!r}"
                    )
            return output, [*map(scope.get_current_value, variables), _sum(scope.losses, loss)]

        return function

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
            return output, _sum(scope.losses, ops.zeros((), "float32"))

        return _Alike(function, weights, has_samples=len(self._row_shape) > 1)

    def engine_on(self, platform, static_shapes):
        return _engine_of(_are_alike(self.layers), platform, static_shapes)

    def compute_output_shape(self, tokens_shape):
        if self.built:
            return (tokens_shape[0], *self._output_shape)
        return self.layers[0].compute_output_shape(tokens_shape)


def _sum(losses, start):
    return sum((ops.cast(loss, "float32") for loss in losses), start)


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


class _Alike(NamedTuple):
    """One function for all groups, which differ in their weights only.

    - `function(weights, rows (n, D)) -> (rows (n, D'), loss)`.
    - `weights()`: list of tensors (E, ...), made where they are needed.
    - `has_samples`: whether a row is a whole sample, which convolutions may see.
    """

    function: Callable
    weights: Callable
    has_samples: bool


def _engine_of(alike, platform, static_shapes):
    """The way in which `_map_groups` runs.

    - "slices": one call for each function, where shapes may depend on data.
    - "vectorized": over all tiles, each with a copy of the weights of its function.
    - "scan": over tiles, with a switch to the function of each. On CPUs, tiles of whole samples
      are unrolled instead if they are few: in a loop or a condition XLA computes the gradients of
      convolutions four times as slowly.
    """
    if not static_shapes:
        return "slices"
    return "vectorized" if alike and platform != "cpu" else "scan"


def _map_groups(functions, rows, sizes, output_width, state, alike=None):
    """Apply function e to group e of the rows (R, D); returns rows (R, D') and the state.

    Where shapes are fixed at compile time the rows are cut into tiles of one group each, and a
    function sees rows of `PADDING` after its own. Rows past the last group give zeros. The state is
    handed through the functions that run. `alike` is the same functions as one, where they have no
    state but a sum of losses.
    """
    static_shapes = backend.needs_static_shapes()

    def run_on(platform, *operands):
        engine = _engine_of(alike, platform, static_shapes)
        if engine == "vectorized":
            return _map_all_tiles(alike, ops.vectorized_map, None, *operands)
        unrolled = _rows_unrolled(alike, rows, sizes) if engine == "scan" and alike else 0
        if unrolled:
            return _map_all_tiles(alike, _unrolled_map, unrolled, *operands)
        run = _map_slices if engine == "slices" else _scan_tiles
        return run(functions, output_width, *operands)

    platform = named_platform()
    if platform or not static_shapes or alike is None:
        return run_on(platform, rows, sizes, state)
    return backend.on_its_platform(run_on, rows, sizes, state)


def _map_slices(functions, output_width, rows, sizes, state):
    outputs = []
    parts, (*sizes, num_padding) = backend.split_groups(rows, sizes)
    for function, size, part in zip(functions, sizes, parts):
        if backend.is_exporting():
            outputs.append(function(part, state, None)[0])
            continue
        # A function without rows runs on a row of padding and its effects are discarded: all its
        # gradients exist then, and no NaN statistics of an empty batch enter the state.
        spare = ops.maximum(1 - size, 0)
        part = ops.pad(part, ((0, spare), (0, 0)), constant_values=PADDING)
        output, new = function(part, state, None)
        state = [ops.where(size > 0, *values) for values in zip(new, state)]
        outputs.append(output[:size])
    padding = ops.zeros((num_padding, output_width), outputs[0].dtype)
    return ops.concatenate([*outputs, padding]), state


def _scan_tiles(functions, output_width, rows, sizes, state):
    tiles = pad_tiles(sizes, ops.shape(rows)[0], SCAN_ROWS)

    def skip(tile_rows, state, inside):
        return ops.zeros((SCAN_ROWS, output_width), tile_rows.dtype), state

    def step(state, tile):
        expert, inside, tile_rows = tile
        output, state = ops.switch(expert, [*functions, skip], tile_rows, state, inside)
        return state, output

    state, outputs = backend.scan(
        step, state, (tiles.expert, tiles.inside, tiles.cut(rows, PADDING))
    )
    return tiles.join(outputs), state


def _map_all_tiles(alike, apply, length, rows, sizes, state):
    """Call the function on tiles of a length by `apply(function, (weights, tiles of rows))`."""
    num_experts = sizes.shape[0]
    tiles = pad_tiles(sizes, ops.shape(rows)[0], length)
    expert = ops.minimum(tiles.expert, num_experts - 1)
    weights = [backend.gather_rows(weight, expert) for weight in alike.weights()]
    outputs, losses = apply(lambda tile: alike.function(*tile), (weights, tiles.cut(rows, PADDING)))
    loss = ops.sum(ops.where(tiles.expert < num_experts, losses, 0.0))
    return tiles.join(outputs), [*state[:-1], state[-1] + loss]


def _unrolled_map(function, tiles):
    weights, rows = tiles
    called = [
        function(([weight[number] for weight in weights], rows[number]))
        for number in range(rows.shape[0])
    ]
    return map(ops.stack, zip(*called))


def _rows_unrolled(alike, rows, sizes):
    """Rows of a tile, about half of an even group, if so few tiles can be unrolled; else 0."""
    num_rows, num_experts = rows.shape[0], sizes.shape[0]
    if not alike.has_samples or not isinstance(num_rows, int):
        return 0
    length = max(num_rows // (2 * num_experts), 1)
    return length if num_rows // length + num_experts <= MAX_UNROLLED else 0
