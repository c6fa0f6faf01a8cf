"""grouped_matmul: every group of rows times its own kernel, and nothing else."""

import itertools

import numpy as np
import pytest
import reference
from backends import assert_close, differentiated, on_one_backend
from keras import ops

from keras_moe.backend.padded import most_tiles, tile_length
from keras_moe.ops import grouped_matmul


def weighted_sum(inputs, sizes, upstream):
    output = grouped_matmul(*inputs, sizes)
    is_served = ops.arange(ops.shape(output)[0]) < ops.sum(sizes)
    used = ops.where(ops.expand_dims(is_served, 1), output * upstream, 0.0)
    return ops.sum(used), output


def check_against_oracle(function, rng, num_rows, sizes, shape=(3, 4)):
    """Values and gradients, whatever the rows past the last group hold."""
    rows = rng.normal(size=(num_rows, shape[0])).astype("float32")
    kernels = rng.normal(size=(len(sizes), *shape)).astype("float32")
    upstream = rng.normal(size=(num_rows, shape[1])).astype("float32")
    rows[sum(sizes) :] = upstream[sum(sizes) :] = rng.choice([np.nan, np.inf, 1e30])
    _, output, (d_rows, d_kernels) = function([rows, kernels], np.array(sizes, "int32"), upstream)
    expected = reference.grouped_matmul_gradients(rows, kernels, sizes, upstream)
    assert_close(output, reference.grouped_matmul(rows, kernels, sizes))
    assert_close(d_rows, expected[0])
    assert_close(d_kernels, expected[1])
    for size, d_kernel in zip(sizes, d_kernels):
        assert size or not np.any(d_kernel)


GROUP_SIZES = [
    [1, 3, 7, 15],  # full tiles and tails
    [8, 8, 8, 8],
    [1, 1, 1, 1],
    [40, 0, 0, 0],
    [0, 0, 0, 40],
    [17, 0, 5, 0],
    [0, 0, 0, 0],
]


def test_groups_of_all_kinds_equal_the_oracle(mode, small_tiles):
    # The sizes are data: one compilation serves them all.
    function = differentiated(weighted_sum, mode)
    for sizes in GROUP_SIZES:
        check_against_oracle(function, np.random.default_rng(0), 40, sizes)


def test_groups_around_the_real_length_of_a_tile_equal_the_oracle(mode):
    function = differentiated(weighted_sum, mode)
    length = tile_length(1152, 3, "cpu")
    around = [[number - 1, number, number + 1] for number in (length, 4 * length)]
    # The last tile of 49 rows reaches far past the end of all rows.
    for sizes in (*around, [402, 701, 49], [1152, 0, 0]):
        check_against_oracle(function, np.random.default_rng(1), 1152, sizes, shape=(2, 3))


def test_group_sizes_may_be_a_list_or_any_integer_tensor():
    rows, kernels = np.ones((4, 2), "float32"), np.ones((2, 2, 3), "float32")
    expected = [[2.0] * 3] * 3 + [[0.0] * 3]
    for sizes in ([1, 2], np.array([1, 2], "int64"), np.array([1, 2], "uint8")):
        output = ops.convert_to_numpy(grouped_matmul(rows, kernels, sizes))
        np.testing.assert_array_equal(output, expected)


@on_one_backend
@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_there_are_as_many_tiles_as_the_worst_groups_need(num_experts, length):
    for num_rows in range(14):
        every_group = itertools.product(range(num_rows + 1), repeat=num_experts)
        groups = (sizes for sizes in every_group if sum(sizes) <= num_rows)
        needed = max(sum(-(-size // length) for size in sizes) for sizes in groups)
        assert most_tiles(num_rows, num_experts, length) == max(needed, 1)
