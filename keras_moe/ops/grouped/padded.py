"""Engine without a loop: one batched product over padded tiles, each with a copy of its kernel.

For XLA on devices that wait for the host, or run one product at a time, at each trip of a loop.
"""

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.grouped.padded_tiles import pad_tiles
from keras_moe.ops.grouped.records import Gradients
from keras_moe.ops.grouped.steps import products_of
from keras_moe.ops.groups import row_sums


def supports(setting):
    return setting.static_shapes and setting.platform != "cpu"


def tile_length(num_rows, num_experts):
    """Rows of a tile, a power of two.

    With B rows a tile, up to E * B rows are computed in vain, and R / B kernels are copied, two
    bytes for each weight. Where a byte of memory costs as much as 240 multiplications and
    additions, as on today's accelerators, both cost the least together at B = sqrt(480 * R / E).

    Args:
        num_rows: an integer, or a tensor where it is not known at compile time.
        num_experts: an integer.
    """
    mean = num_rows / num_experts if isinstance(num_rows, int) else 256
    return 2 ** min(max(round((480 * mean) ** 0.5).bit_length() - 1, 3), 9)


def forward(setting, step, tokens, parameters, groups, keep):
    tiles = _tiles(groups)
    rows = tiles.cut(backend.gather_rows(tokens, groups.token_of_row()))
    outputs, saved = step.forward(rows, _products(parameters, tiles, setting.dtype), keep)
    return tiles.join(outputs), saved


def backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient):
    tiles = _tiles(groups)
    token_of_row = groups.token_of_row()
    output_gradient = backend.gather_rows(gradient, token_of_row)
    scaled = output_gradient * ops.cast(ops.expand_dims(row_weights, 1), setting.dtype)
    row_gradient, factors = step.backward(
        tiles.cut(backend.gather_rows(tokens, token_of_row)),
        _products(parameters, tiles, setting.dtype),
        # Not zeros, where an activation may have no derivative: NaN times 0 is NaN.
        [tiles.fill(each, 1.0) for each in saved],
        tiles.cut(scaled),
    )
    return Gradients(
        tiles.join(row_gradient),
        groups.at_assignments(row_sums(output_gradient, outputs)[:, 0]),
        [
            {
                name: _sum_by_expert(tiles, _OF_TILES[name](*pair), parameter)
                for name, parameter in trained.items()
            }
            for trained, pair in zip(parameters.trained, factors)
        ],
    )


def _tiles(groups):
    num_rows, num_experts = groups.num_rows(), groups.sizes.shape[0]
    return pad_tiles(groups.sizes, num_rows, tile_length(num_rows, num_experts))


def _products(parameters, tiles, dtype):
    expert = ops.minimum(tiles.expert, parameters.num_experts - 1)
    projections = parameters.take(lambda weights: backend.gather_rows(weights, expert), dtype)

    def project(rows, number):
        kernel, bias, _ = projections[number]
        product = ops.matmul(rows, kernel)
        return product if bias is None else product + ops.expand_dims(bias, 1)

    def pull(gradient, number):
        return ops.matmul(gradient, ops.transpose(projections[number].kernel, (0, 2, 1)))

    return products_of(project, pull)


# The gradients of each tile, float32, from the tiles (N, B, D) that were multiplied and the
# gradients (N, B, H) of their products.
_OF_TILES = {
    "kernel": lambda left, right: backend.batched_product(ops.transpose(left, (0, 2, 1)), right),
    "bias": lambda left, right: ops.sum(ops.cast(right, "float32"), axis=1),
}


def _sum_by_expert(tiles, parts, parameter):
    # Empty tiles are summed into a spare expert.
    num_experts = parameter.shape[0]
    totals = ops.segment_sum(parts, tiles.expert, num_experts + 1)[:num_experts]
    return ops.cast(totals, parameter.dtype)
