"""A bank of Keras layers, of which only the chosen one runs on a row."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import shortened
from keras_moe._internal.keras_internals import parameters_of, recompute_as_one, stored_dtypes
from keras_moe._internal.serialization import note_part, register
from keras_moe.backend import backend
from keras_moe.backend.padded import most_tiles, pad_tiles, tile_length
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.gate import Gate
from keras_moe.layers.sublayers import build_and_measure, call_part, freeze_parts
from keras_moe.ops.plans import GroupedPlan

SCAN_ROWS = 64
# Not 0, where a layer may have no derivative: NaN times 0 is NaN.
PADDING = 1
# Longer programs would compile for a minute.
MAX_UNROLLED = 64


@register
class LayerExperts(ExpertBank):
    """Experts that are Keras layers or models; they may differ from each other.

    Each layer gets the rows (n, D) of its tokens and returns rows (n, D'), with the same D' for all
    layers. In a mixture with `token_axes`, rows are whole samples (n, ...). Under XLA, rows are
    processed in tiles padded with ones: a layer must have a derivative there. In training
    `BatchNormalization` sees the padding, and an activity regularizer is applied once per tile. A
    mixture in an expert receives a mask of the padding, if the `call` of the expert has a `mask`.
    Banks with stacked kernels are faster, especially where the layers differ in class or
    configuration or have state other than weights.

    Args:
        layers: List of Keras layers, `keras.Sequential` or functional models.

    Raises:
        TypeError: If `layers` contains anything other than Keras layers.
        ValueError: If `layers` is empty or contains a layer twice, if the layers disagree on D', or
            if one writes its trainable weights in a call, as `keras.layers.SpectralNormalization`.

    Other arguments, call arguments and output shape: as for `ExpertBank`, or (T, ...) for samples.

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
            rule = "`layers` must be a list of Keras layers, functions as `keras.layers.Lambda`"
            raise TypeError(f"{rule}. Received: layers={shortened(given)}")
        if len({id(layer) for layer in layers}) < len(layers):
            names = [layer.name for layer in layers]
            raise ValueError(f"`layers` must be different objects. Received: layers={names}")
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
        try:
            shapes = [
                build_and_measure("layers", layer, rows_shape, num_kept)[1:]
                for layer in self.layers
            ]
        except ValueError as error:
            if num_kept == 1 or "found shape" in str(error):
                raise
            rule = "Experts for whole samples, such as convolutions, need `token_axes=1`"
            raise ValueError(f"{error}\n{rule} in the mixture") from error
        if len(set(shapes)) > 1 or None in (*rows_shape[1:], *shapes[0]):
            received = f"{shapes} from {[layer.name for layer in self.layers]}, inputs {rows_shape}"
            raise ValueError(f"Experts must return rows of one known shape. Received: {received}")
        self._row_shape, self._output_shape = rows_shape[1:], shapes[0]
        recompute_as_one(self)

    def call(self, tokens: Tensor, plan: GroupedPlan, training: bool | None = None) -> Tensor:
        tokens = ops.reshape(self._compute(tokens), (-1, math.prod(self._row_shape)))
        rows = plan.dispatch(tokens)
        parameters = {id(variable) for variable in parameters_of(self)}
        variables = [each for each in self.non_trainable_variables if id(each) not in parameters]
        variables += self.metrics_variables
        functions = [self._as_function(layer, variables, training) for layer in self.layers]
        # Compiled loops allow neither writes to variables nor stored losses: both are passed
        # through. PyTorch assigns in place, which would change a value the gradient needs.
        with stored_dtypes():
            state = [ops.copy(variable) for variable in variables]
        state.append(ops.zeros((), "float32"))
        alike = self._as_one_function(training) if backend.needs_static_shapes() else None
        width = math.prod(self._output_shape)
        has_samples = len(self._row_shape) > 1
        arguments = (functions, alike, has_samples, width, rows, plan.sizes, state)
        rows, (*values, loss) = _map_groups(*arguments)
        with stored_dtypes():
            for variable, value in zip(variables, values):
                variable.assign(value)
        self.add_loss(loss)
        return ops.reshape(plan.combine(rows), (-1, *self._output_shape))

    def compute_all(self, tokens, training=None):
        # Each layer is called once, with all tokens.
        return ops.stack(
            [self._compute(layer(tokens, training=training)) for layer in self.layers], axis=1
        )

    def _serve(self, layer, rows, training, inside=None):
        """Apply a layer to flat rows (n, D), which it sees in their own shape."""
        rows = ops.reshape(rows, (-1, *self._row_shape))
        arguments = {"training": training}
        if inside is not None and len(self._row_shape) == 1:
            # A mixture counts tokens, of which padding is none.
            if any(isinstance(part, Gate) for part in layer._flatten_layers()):
                arguments["mask"] = inside
        shape = (rows.shape[0], *self._output_shape)
        output = call_part("layers", layer, rows, shape, **arguments)
        return ops.reshape(self._compute(output), (-1, math.prod(self._output_shape)))

    def _as_function(self, layer, variables, training):
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
                output = self._serve(layer, rows, training, inside)
            for variable, value in zip(constant, before):
                if scope.get_current_value(variable) is not value:
                    rule = "An expert must not write its trainable weights in a call"
                    raise ValueError(f"{rule}. Received: {variable.path!r} of `{layer.name}`")
            return output, [*map(scope.get_current_value, variables), _sum(scope.losses, loss)]

        return function

    def _as_one_function(self, training):
        """A function of weights and rows for all experts, and one that stacks weights, or None."""
        if not are_alike(self.layers):
            return None
        first = self.layers[0]

        def stack():
            variables = zip(*(layer.variables for layer in self.layers), strict=True)
            return [ops.stack([each.value for each in of_experts]) for of_experts in variables]

        def function(weights_and_rows):
            weights, rows = weights_and_rows
            mapping = zip(first.variables, weights)
            with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
                output = self._serve(first, rows, training)
            return output, _sum(scope.losses, ops.zeros((), "float32"))

        return function, stack

    def compute_output_shape(self, tokens_shape):
        if self.built:
            return (tokens_shape[0], *self._output_shape)
        return self.layers[0].compute_output_shape(tokens_shape)


def _sum(losses, start):
    return sum((ops.cast(loss, "float32") for loss in losses), start)


def are_alike(layers):
    """Whether built layers compute the same function, but for the values of their weights."""
    has_state = any(len(parameters_of(layer)) < len(layer.variables) for layer in layers)
    return len({_kind(layer) for layer in layers}) == 1 and not has_state


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
    names = ("activation", "recurrent_activation", "function")
    functions = [[id(vars(part).get(name)) for name in names] for part in parts]
    dtypes = [part.dtype_policy.name for part in parts]
    return repr((type(layer), _without_names(config), weights, functions, dtypes))


def _without_names(config):
    """A configuration without names and initializers, which do not change what is computed."""
    if isinstance(config, (list, tuple)):
        return list(map(_without_names, config))
    if not isinstance(config, dict):
        return config
    kept = [key for key in config if key != "name" and not key.endswith("_initializer")]
    return {key: _without_names(config[key]) for key in kept}


def _map_groups(functions, alike, has_samples, width, rows, sizes, state):
    """Apply function e to group e of the rows (R, D); return rows (R, D') and the state.

    Under XLA rows are cut into tiles of one group each, and functions see rows of `PADDING` after
    its own. Rows past the last group give zeros. The state is handed through the functions that
    run. `alike` is the same functions as one, where they have no state but a sum of losses.
    """
    if not backend.needs_static_shapes():
        return _map_slices(functions, width, rows, sizes, state)

    if alike and backend.platform_of(rows) != "cpu":
        return _map_alike(alike, None, rows, sizes, state)
    length = _unrolled_length(rows, sizes) if alike and has_samples else 0
    if length:
        return _map_alike(alike, length, rows, sizes, state)
    return _scan_tiles(functions, width, rows, sizes, state)


def _map_slices(functions, width, rows, sizes, state):
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
    return ops.concatenate([*outputs, ops.zeros((num_padding, width), outputs[0].dtype)]), state


def _scan_tiles(functions, width, rows, sizes, state):
    """Run tiles one after the other, with a switch to the function of each."""
    tiles = pad_tiles(sizes, ops.shape(rows)[0], SCAN_ROWS)

    def skip(tile_rows, state, inside):
        return ops.zeros((SCAN_ROWS, width), tile_rows.dtype), state

    def step(state, tile):
        expert, inside, tile_rows = tile
        output, state = ops.switch(expert, [*functions, skip], tile_rows, state, inside)
        return state, output

    xs = (tiles.expert, tiles.inside, tiles.cut(rows, PADDING))
    state, outputs = backend.scan(step, state, xs)  # type: ignore[attr-defined]
    return tiles.join(outputs), state


def _map_alike(alike, length, rows, sizes, state):
    """Run all tiles at once, each with a copy of its weights, or unrolled in tiles of a length."""
    (function, stack), num_rows = alike, ops.shape(rows)[0]
    tiles = pad_tiles(sizes, num_rows, length or tile_length(num_rows, sizes.shape[0]))
    is_full = tiles.expert < sizes.shape[0]
    expert = ops.where(is_full, tiles.expert, 0)
    inputs = [backend.gather_rows(each, expert) for each in stack()], tiles.cut(rows, PADDING)
    if length is None:
        outputs, losses = ops.vectorized_map(function, inputs)
    else:
        each = zip(*map(ops.unstack, (*inputs[0], inputs[1])))
        outputs, losses = map(ops.stack, zip(*(function((one[:-1], one[-1])) for one in each)))
    loss = ops.sum(ops.where(is_full, losses, 0.0))
    return tiles.join(outputs), [*state[:-1], state[-1] + loss]


def _unrolled_length(rows, sizes):
    """Rows of a tile, about half of an even group, if so few tiles can be unrolled; else 0.

    In a loop or a condition XLA computes the gradients of convolutions four times as slowly.
    """
    num_rows, num_experts = rows.shape[0], sizes.shape[0]
    if not isinstance(num_rows, int):
        return 0
    length = max(num_rows // (2 * num_experts), 1)
    return length if most_tiles(num_rows, num_experts, length) <= MAX_UNROLLED else 0
