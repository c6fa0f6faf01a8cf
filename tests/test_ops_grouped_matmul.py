"""grouped_matmul: every group of rows times its own kernel, and nothing else."""

import keras
import numpy as np
import pytest
import reference
from backends import (
    BACKEND,
    EXAMPLES,
    FAST_MODE,
    KERNEL_MODES,
    MODES,
    assert_close,
    compiled,
    differentiated,
    some,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.ops import grouped_matmul
from keras_moe.ops.grouped import tiles


def weighted_sum(inputs, sizes, upstream):
    output = grouped_matmul(*inputs, sizes)
    return ops.sum(output * upstream), output


def check_against_oracle(function, rng, num_rows, sizes, shape=(3, 4)):
    rows = rng.normal(size=(num_rows, shape[0])).astype("float32")
    kernels = rng.normal(size=(len(sizes), *shape)).astype("float32")
    upstream = rng.normal(size=(num_rows, shape[1])).astype("float32")
    _, output, (d_rows, d_kernels) = function([rows, kernels], np.array(sizes, "int32"), upstream)
    expected = reference.grouped_matmul_gradients(rows, kernels, sizes, upstream)
    assert_close(output, reference.grouped_matmul(rows, kernels, sizes))
    assert_close(d_rows, expected[0])
    assert_close(d_kernels, expected[1])
    for size, d_kernel in zip(sizes, d_kernels):
        assert size or not np.any(d_kernel)


GROUP_SIZES = {
    "full tiles and tails": [1, 3, 7, 15],
    "equal": [8, 8, 8, 8],
    "one row each": [1, 1, 1, 1],
    "one huge group first": [40, 0, 0, 0],
    "one huge group last": [0, 0, 0, 40],
    "empty between": [17, 0, 5, 0],
    "rows behind the last group": [3, 2, 9, 1],
    "all empty": [0, 0, 0, 0],
}


@pytest.mark.parametrize("mode", MODES)
def test_groups_of_all_kinds_equal_the_oracle(mode, small_tiles):
    # The sizes are data: one compilation serves them all.
    function = differentiated(weighted_sum, mode)
    for sizes in some(GROUP_SIZES.values(), mode):
        check_against_oracle(function, np.random.default_rng(0), 40, sizes)


@pytest.mark.parametrize("mode", MODES)
def test_drawn_groups_and_shapes_equal_the_oracle(mode, small_tiles):
    @settings(max_examples=EXAMPLES[mode])
    @given(
        st.lists(st.integers(0, 20), min_size=1, max_size=5),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.integers(0, 9),
        st.randoms(use_true_random=False),
    )
    def check(sizes, shape, num_behind, shuffler):
        num_rows = max(sum(sizes) + num_behind, 1)
        function = differentiated(weighted_sum, mode)
        for _ in some(range(3), mode):
            rng = np.random.default_rng(shuffler.randrange(2**32))
            shuffler.shuffle(sizes)
            check_against_oracle(function, rng, num_rows, sizes, shape)

    check()


@pytest.mark.parametrize("mode", KERNEL_MODES)
def test_groups_around_the_real_tile_sizes_equal_the_oracle(mode):
    function = differentiated(weighted_sum, mode)
    around = [[length - 1, length, length + 1] for length in tiles.tile_sizes(1152, 3)]
    # The last tile of 49 rows reaches far past the end of all rows.
    for sizes in (*around, [402, 701, 49], [1152, 0, 0]):
        check_against_oracle(function, np.random.default_rng(1), 1152, sizes, shape=(2, 3))


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True).map(sorted),
    st.integers(0, 20),
)
def test_no_cover_is_cheaper_than_the_chosen_one(lengths, overhead):
    covers = tiles.cheapest_covers(tuple(lengths), overhead)
    price = np.array(lengths) + overhead
    choices = np.array(list(np.ndindex(*(3 * lengths[-1] // length + 2 for length in lengths))))
    for rows, cover in enumerate(covers.T):
        enough = choices[choices @ lengths >= rows]
        assert cover @ lengths >= rows
        assert cover @ price == min(enough @ price)


def test_there_are_few_sizes_of_blocks_and_one_holds_a_mean_group():
    for mean in range(1100):
        sizes = tiles.tile_sizes(8 * mean, 8)
        assert len(sizes) == 3 and list(sizes) == sorted(set(sizes))
        assert 4 <= sizes[0] <= 32
        assert min(mean, 512) <= sizes[-1] < max(min(mean, 512), 32) + sizes[0]
        # Fewer experts have more tiles, not longer ones.
        assert tiles.tile_sizes(8 * mean, 2) == sizes


@pytest.mark.parametrize("mode", MODES)
def test_rows_behind_the_last_group_are_not_computed(mode, small_tiles):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(11, 2)).astype("float32")
    kernels = rng.normal(size=(2, 2, 2)).astype("float32")
    sizes, upstream = np.array([3, 2], "int32"), np.ones((11, 2), "float32")

    def of_first_rows(inputs, sizes, upstream):
        output = grouped_matmul(*inputs, sizes)
        first = ops.expand_dims(ops.arange(11) < 5, 1)
        return ops.sum(ops.where(first, output * upstream, 0.0)), output

    function = differentiated(of_first_rows, mode)
    for content in some((np.nan, np.inf, 1e30), mode):
        rows[5:] = upstream[5:] = content
        _, output, (d_rows, d_kernels) = function([rows, kernels], sizes, upstream)
        assert_close(output, reference.grouped_matmul(rows, kernels, sizes))
        expected = reference.grouped_matmul_gradients(rows, kernels, sizes, upstream)
        assert_close(d_rows, expected[0])
        assert_close(d_kernels, expected[1])


def test_one_group_is_a_matrix_product():
    rng = np.random.default_rng(0)
    rows, kernel = rng.normal(size=(9, 4)), rng.normal(size=(1, 4, 3))
    output = compiled(grouped_matmul, FAST_MODE)(
        rows.astype("float32"), kernel.astype("float32"), np.array([9], "int32")
    )
    assert_close(output, rows @ kernel[0])


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_give_no_rows(mode):
    function = differentiated(weighted_sum, mode)
    check_against_oracle(function, np.random.default_rng(0), 0, [0, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_half_precision(dtype):
    rng = np.random.default_rng(0)
    rows, kernels = rng.normal(size=(20, 4)), rng.normal(size=(3, 4, 2))

    def product(rows, kernels):
        output = grouped_matmul(ops.cast(rows, dtype), ops.cast(kernels, dtype), [9, 0, 6])
        assert keras.backend.standardize_dtype(output.dtype) == dtype
        return ops.cast(output, "float32")

    output = compiled(product, FAST_MODE)(rows.astype("float32"), kernels.astype("float32"))
    assert_close(output, reference.grouped_matmul(rows, kernels, [9, 0, 6]), tolerance=2e-2)


def test_group_sizes_may_be_a_list_or_any_integer_tensor():
    rows, kernels = np.ones((4, 2), "float32"), np.ones((2, 2, 3), "float32")
    expected = [[2.0] * 3] * 3 + [[0.0] * 3]
    for sizes in ([1, 2], np.array([1, 2], "int64"), np.array([1, 2], "uint8")):
        output = ops.convert_to_numpy(grouped_matmul(rows, kernels, sizes))
        np.testing.assert_array_equal(output, expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow traces unknown sizes")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_number_of_rows_may_be_unknown_when_traced(jit_compile, small_tiles):
    import tensorflow as tf

    signature = [
        tf.TensorSpec((None, 3)),
        tf.TensorSpec((4, 3, 4)),
        tf.TensorSpec((4,), "int32"),
        tf.TensorSpec((None, 4)),
    ]

    @tf.function(input_signature=signature, jit_compile=jit_compile)
    def traced(rows, kernels, sizes, upstream):
        with tf.GradientTape() as tape:
            tape.watch([rows, kernels])
            value, output = weighted_sum([rows, kernels], sizes, upstream)
        return value, output, tape.gradient(value, [rows, kernels])

    def function(inputs, sizes, upstream):
        return keras.tree.map_structure(ops.convert_to_numpy, traced(*inputs, sizes, upstream))

    for num_rows, sizes in ((12, [3, 0, 5, 1]), (31, [2, 20, 0, 9])):
        check_against_oracle(function, np.random.default_rng(0), num_rows, sizes)


SHAPE_ERRORS = [
    (
        ((2, 3, 4), (2, 4, 5), (2,)),
        "grouped_matmul takes rows (N, D), kernels (E, D, H) and group_sizes (E,). Received: "
        "rows.shape=(2, 3, 4), kernels.shape=(2, 4, 5), group_sizes.shape=(2,). "
        "Flatten all leading axes of rows into one.",
    ),
    (
        ((3, 4), (4, 5), (2,)),
        "grouped_matmul takes rows (N, D), kernels (E, D, H) and group_sizes (E,). Received: "
        "rows.shape=(3, 4), kernels.shape=(4, 5), group_sizes.shape=(2,). "
        "Flatten all leading axes of rows into one.",
    ),
    (
        ((3, 4), (2, 5, 6), (2,)),
        "The last axis of rows must equal the middle axis of kernels, and there must be one "
        "group size for each kernel. Received: rows.shape=(3, 4), kernels.shape=(2, 5, 6), "
        "group_sizes.shape=(2,). Change one of them.",
    ),
    (
        ((3, 4), (2, 4, 6), (3,)),
        "The last axis of rows must equal the middle axis of kernels, and there must be one "
        "group size for each kernel. Received: rows.shape=(3, 4), kernels.shape=(2, 4, 6), "
        "group_sizes.shape=(3,). Change one of them.",
    ),
]


@pytest.mark.parametrize(("shapes", "message"), SHAPE_ERRORS)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    rows, kernels, sizes = (np.zeros(shape, "float32") for shape in shapes)
    with pytest.raises(ValueError) as error:
        grouped_matmul(rows, kernels, sizes.astype("int32"))
    assert str(error.value) == message
