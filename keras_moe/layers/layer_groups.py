"""Arbitrary functions on groups of rows: only the chosen function runs on each row."""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_moe.backend import backend
from keras_moe.backend.padded import pad_tiles, tile_length
from keras_moe.ops.platforms import named_platform

SCAN_ROWS = 64
# Longer programs would compile for a minute.
MOST_UNROLLED = 64


class Alike(NamedTuple):
    """One function for all groups, which differ in their weights only.

    - `function(weights, rows (n, D)) -> (rows (n, D'), loss)`.
    - `weights()`: list of tensors (E, ...), made where they are needed.
    - `has_samples`: whether a row is a whole sample, which convolutions may see.
    """

    function: Callable
    weights: Callable
    has_samples: bool


def engine_of(alike, platform, static_shapes):
    """The way in which `map_groups` runs.

    - "slices": one call for each function, where shapes may depend on data.
    - "vectorized": over all tiles, each with a copy of the weights of its function.
    - "scan": over tiles, with a switch to the function of each. On CPUs, tiles of whole samples
      are unrolled instead if they are few: in a loop or a condition XLA computes the gradients of
      convolutions four times as slowly.
    """
    if not static_shapes:
        return "slices"
    return "vectorized" if alike and platform != "cpu" else "scan"


def map_groups(functions, rows, sizes, output_width, state, alike=None):
    """Apply function e to group e of the rows (R, D); returns rows (R, D') and the state.

    Where shapes are fixed at compile time the rows are cut into tiles of one group each, and a
    function sees rows of zeros after its own. Rows past the last group give zeros.

    Args:
        functions: E functions `(rows (n, D), state, inside) -> (rows (n, D'), state)`; `inside`
            (n,) is False for rows of zeros, or None.
        rows, sizes, output_width: (R, D), (E,) int32, and D'.
        state: list of tensors, handed through the functions that run; the last is a float32 sum of
            losses.
        alike: the same functions as one, an `Alike`, where they have no other state; or None.
    """
    static_shapes = backend.compiles_static_shapes()

    def run_on(platform, *operands):
        engine = engine_of(alike, platform, static_shapes)
        if engine == "vectorized":
            length = tile_length(ops.shape(rows)[0], sizes.shape[0])
            return _map_all_tiles(alike, ops.vectorized_map, length, *operands)
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
        # A function without rows runs on one row of zeros and its effects are discarded: all its
        # gradients exist then, and no NaN statistics of an empty batch enter the state.
        spare = ops.maximum(1 - size, 0)
        output, new = function(ops.pad(part, ((0, spare), (0, 0))), state, None)
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

    state, outputs = backend.scan(step, state, (tiles.expert, tiles.inside, tiles.cut(rows)))
    return tiles.join(outputs), state


def _map_all_tiles(alike, apply, length, rows, sizes, state):
    """Call the function on tiles of a length by `apply(function, (weights, tiles of rows))`."""
    num_experts = sizes.shape[0]
    tiles = pad_tiles(sizes, ops.shape(rows)[0], length)
    expert = ops.minimum(tiles.expert, num_experts - 1)
    weights = [backend.gather_rows(weight, expert) for weight in alike.weights()]
    outputs, losses = apply(lambda tile: alike.function(*tile), (weights, tiles.cut(rows)))
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
    return length if num_rows // length + num_experts <= MOST_UNROLLED else 0
