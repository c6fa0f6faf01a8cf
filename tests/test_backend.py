"""What every `Backend` promises, and what the package takes for granted of `keras.ops`.

Everything outside of `keras_moe/backend` is written in these two, so most of its tests run on one
backend. `test_networks.py` has `backend.product` and `backend.outer` on each platform,
`test_own_experts.py` `backend.layout`, with whole networks.
"""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import reference
from backends import BACKEND, FAST_MODE, MODES, assert_close, compiled, differentiated, gradients
from keras import ops
from test_second_derivatives import derivatives

from keras_moe import layers
from keras_moe.backend import backend
from keras_moe.backend.base import Backend, Devices
from keras_moe.backend.layouts import AllRows
from keras_moe.backend.tiles import ChunksAndTiles
from keras_moe.ops import any_derivative
from keras_moe.ops.linears import Kernel
from keras_moe.ops.networks import Problem
from keras_moe.ops.plans import GroupedPlan

RNG = np.random.default_rng(0)
NAN, INF = np.nan, np.inf


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("float32")


def ints(*values, dtype="int32"):
    return np.array(values, dtype)


every_mode = pytest.mark.parametrize("mode", MODES)

# From a function and its arguments to what NumPy says.
ROWS = normal(4, 3)
WITH_NAN = np.where(ROWS > 1, NAN, ROWS)
SCORES = np.array([[1, 3, 3], [-INF, -INF, -INF], [0, 0, -1], [-1, -INF, 0]], "float32")
COLUMNS = ints([0, 2], [-1, 1], [3, 0], [2, 2])
TAKEN = [[r[c] if 0 <= c < 3 else 0 for c in cs] for r, cs in zip(WITH_NAN, COLUMNS)]
EXPERTS = ints(2, 0, 2, 1, 0, 2, 5, -1)
VECTOR, BIAS = ints([1, 2], dtype="float32"), ints(4, 5, dtype="float32")
KERNEL = ints([3, 0], [1, 1], dtype="int8")


def without_gradient(function):
    """The function, on PyTorch with other operations, which have no gradient."""
    if BACKEND != "torch":
        return function
    import torch

    return torch.no_grad()(function)


METHODS = {
    "rows of vectors and matrices of indices, and none": (
        lambda x, *indices: [backend.gather_rows(x, each) for each in indices],
        (ROWS, ints(3, 0, 3), ints([3, 0], [1, 1]), np.zeros((0, 2), "int32")),
        [ROWS[[3, 0, 3]], ROWS[[[3, 0], [1, 1]]], np.zeros((0, 2, 3), "float32")],
    ),
    "a softmax, in which one NaN hides nothing": (
        lambda x: backend.softmax(x, axis=0),
        (ints([0, NAN], [-999, 0], dtype="float32"),),
        ints([1, NAN], [0, NAN], dtype="float32"),
    ),
    "a number in place of unserved assignments": (
        lambda x, indices: backend.fill_unserved(x, indices, 7),
        (ints([1, 2], [3, 4]), ints([-1, 0], [5, -1])),
        ints([7, 2], [3, 7]),
    ),
    "the first of equal entries is the largest, also of more than are sorted": (
        lambda x: [backend.top_k(x, 2), backend.top_k(ops.tile(x, (1000, 1)), 2)[-len(SCORES) :]],
        (SCORES,),
        [ints([1, 2], [0, 1], [0, 1], [2, 0])] * 2,
    ),
    "entries of columns, and 0 where there is none": (
        backend.take_columns,
        (WITH_NAN, COLUMNS),
        np.array(TAKEN, "float32"),
    ),
    "counts of integers, also of none, of small ones, and of more than are compared": (
        lambda x, none: [
            *(backend.count_integers(each, 4) for each in (x, none, ops.tile(x, 5000))),
            backend.count_integers(ops.cast(x, "int8"), 3),
        ],
        (EXPERTS, np.zeros(0, "int32")),
        [ints(2, 1, 3, 0), ints(0, 0, 0, 0), ints(10000, 5000, 15000, 0), ints(2, 1, 3)],
    ),
    "a stable order and its inverse, also of integers too large to be packed": (
        lambda x, large: [*backend.order_and_rank(x, 4), *backend.order_and_rank(large, 2**31 - 1)],
        (ints(2, 0, 2, 1, 0, 3, 2), ints(2**31 - 2, 7, 2**31 - 2, 0)),
        [ints(1, 4, 3, 0, 2, 6, 5), ints(3, 0, 4, 2, 1, 6, 5), ints(3, 1, 0, 2), ints(2, 1, 3, 0)],
    ),
    "sums of chosen rows, whether or not there is a row for each place": (
        lambda rows, places, weights: [
            sum_rows(each, places, *some)
            for sum_rows in (backend.sum_chosen_rows, without_gradient(backend.sum_chosen_rows))
            for each in (rows[:3], rows)
            for some in ((), (weights,))
        ],
        (
            np.concatenate([ROWS[:3], NAN * ROWS]),
            ints([0, -1], [-1, -1], [2, 1]),
            ints([2, 3], [4, 5], [6, 7], dtype="float32"),
        ),
        [
            np.stack([ROWS[0], 0 * ROWS[0], ROWS[2] + ROWS[1]]),
            np.stack([2 * ROWS[0], 0 * ROWS[0], 6 * ROWS[2] + 7 * ROWS[1]]),
        ]
        * 4,
    ),
    "the larger size": (lambda n: backend.larger_size(1, n), (np.int32(0),), np.int32(1)),
    "a product with a matrix, and with its transpose": (
        lambda *each: [backend.matmul(*each), backend.matmul(*each, transposed=True)],
        (VECTOR, KERNEL.astype("float32")),
        [ints([5, 2], dtype="float32"), ints([3, 3], dtype="float32")],
    ),
    "rows times a kernel of integers, with a bias, and transposed with a scale": (
        lambda rows, kernel, bias, scale: [
            Kernel(kernel).multiply(rows, bias),
            Kernel(kernel, scale).multiply(rows, transposed=True),
        ],
        (VECTOR, KERNEL, BIAS, ints([2, 4], dtype="float32")),
        [ints([9, 7], dtype="float32"), ints([6, 10], dtype="float32")],
    ),
    "a value that waits for a tensor": (backend.control_dependency, (ROWS, ints(3)), ints(3)),
    "sums, rows and counts of one replica": (
        lambda x, *counts: [
            backend.devices.sum(x),
            backend.devices.gather(x),
            *backend.devices.sum_counts(list(counts)),
        ],
        (ROWS, ints(1, 2), ints([3], [4])),
        [ROWS, ROWS, ints(1, 2), ints([3], [4])],
    ),
}
if BACKEND != "torch":  # which has no shapes that are static
    METHODS |= {
        "a slice at a place": (
            lambda x, i: backend.slice_at(x, [i, 0], (2, 3)),
            (ROWS, np.int32(1)),
            ROWS[1:3],
        ),
        "rows that are added at places, some at the same": (
            backend.add_at,
            (
                np.ones((3, 2), "float32"),
                ints(2, 0, 2),
                ints([1, 2], [3, 4], [5, 6], dtype="float32"),
            ),
            ints([4, 5], [1, 1], [7, 9], dtype="float32"),
        ),
        "the product of two stacks over their rows": (
            backend.product_over_rows,
            (ints([[1, 2], [3, 4]], dtype="float32"), ints([[5], [6]], dtype="float32")),
            ints([[23], [34]], dtype="float32"),
        ),
    }


@every_mode
def test_methods_equal_numpy(mode):
    functions, arguments, expected = zip(*METHODS.values())

    def every(*arguments):
        return [function(*each) for function, each in zip(functions, arguments)]

    for name, actual, wanted in zip(METHODS, compiled(every, mode)(*arguments), expected):
        for one, other in zip(keras.tree.flatten(actual), keras.tree.flatten(wanted), strict=True):
            assert (one.dtype, np.shape(one)) == (other.dtype, other.shape), name
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_gradients_of_gathered_and_taken_entries_are_sums_over_their_places():
    indices, weights = ints([3, 0], [3, 3]), normal(2, 2, 3)

    def objective(rows):
        gathered = backend.gather_rows(rows, ops.convert_to_tensor(indices))
        taken = backend.take_columns(rows, ops.convert_to_tensor(COLUMNS))
        return ops.sum(gathered * ops.convert_to_tensor(weights)) + ops.sum(
            taken * ops.convert_to_tensor(ROWS[:, :2])
        )

    expected = np.zeros_like(ROWS)
    for place in np.ndindex(2, 2):
        expected[indices[place]] += weights[place]
    for row, k in np.ndindex(4, 2):
        if 0 <= COLUMNS[row, k] < 3:
            expected[row, COLUMNS[row, k]] += ROWS[row, k]
    assert_close(gradients(objective, [ROWS])[0], expected)


@pytest.mark.backends("tensorflow", "jax")
@every_mode
def test_a_loop_carries_stacks_and_has_a_gradient(mode):
    def objective(inputs):
        def step(carry, xs):
            carry = carry * xs[0] + ops.sum(xs[1])
            return carry, ops.tanh(carry) * xs[1]

        last, stacked = backend.scan(step, ops.ones(()), inputs)
        return ops.sum(stacked**2) + last, (last, stacked)

    numbers, rows = normal(4), ROWS
    _, (last, stacked), actual = differentiated(objective, mode)([numbers, rows])

    def oracle(numbers, rows):
        carry, outputs = 1.0, []
        for number, row in zip(numbers, rows):
            carry = carry * number + row.sum()
            outputs.append(np.tanh(carry) * row)
        return carry, np.stack(outputs)

    assert_close(last, oracle(numbers, rows)[0])
    assert_close(stacked, oracle(numbers, rows)[1])

    def value(numbers, rows):
        last, stacked = oracle(numbers, rows)
        return np.sum(stacked**2) + last

    numbers, rows = numbers.astype("float64"), rows.astype("float64")
    of_numbers = reference.finite_differences(lambda x: value(x, rows), numbers)
    assert_close(actual[0], of_numbers, tolerance=1e-4)
    of_rows = reference.finite_differences(lambda x: value(numbers, x), rows)
    assert_close(actual[1], of_rows, tolerance=1e-4)


def test_groups_are_split_with_the_rest():
    if backend.needs_static_shapes():
        with pytest.raises(NotImplementedError):
            backend.split_groups(ROWS, ints(2, 0, 1))
        return
    parts, sizes = backend.split_groups(*map(ops.convert_to_tensor, (ROWS, ints(2, 0, 1))))
    assert [int(size) for size in sizes] == [2, 0, 1, 1]
    for part, expected in zip(parts, np.split(ROWS, [2, 2, 3]), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(part), expected)


# Gradients


def square(inputs, context, save):
    x, scale = inputs["x"][0], inputs["scale"]
    saved = (x,) if save else ()
    return scale * x**2 + (0 if context is None else context[0]), saved


def backward(inputs, context, saved, gradient):
    """Three times the gradient of `square`, so that one sees which is taken."""
    x, scale = saved[0], inputs["scale"]
    of_scale = ops.sum(gradient * x**2)
    return {"x": [3 * 2 * scale * x * gradient], "scale": 3 * of_scale}


@every_mode
@pytest.mark.parametrize("has_context", [True, False])
def test_the_given_backward_pass_computes_the_gradient(mode, has_context):
    def objective(inputs, context):
        structure = {"x": [inputs[0]], "scale": inputs[1]}
        context = (context,) if has_context else None
        output = backend.differentiable(square, backward, structure, context)
        return ops.sum(output * ops.arange(1, 5, dtype="float32")), output

    x, scale, context = normal(4), np.float32(2), normal(4)
    _, output, actual = differentiated(objective, mode)([x, scale], context)
    assert_close(output, 2 * x**2 + has_context * context)
    assert_close(actual[0], 3 * 4 * x * [1, 2, 3, 4])
    assert_close(actual[1], 3 * np.sum(x**2 * [1, 2, 3, 4]))


def test_derivatives_of_any_order_are_those_of_the_forward_pass_where_they_are_asked_for():
    def output(x):
        return backend.differentiable(
            lambda inputs, context, save: (inputs[0] ** 3, (inputs[0],)),
            lambda inputs, context, saved, gradient: (5 * saved[0] ** 2 * gradient,),
            (x,),
            None,
        )

    def loss(x):
        (slope,) = derivatives(lambda inputs: ops.sum(output(*inputs)), [x])
        return ops.sum(slope**2)

    x = normal(4)
    with any_derivative():
        assert_close(gradients(loss, [x])[0], 2 * 3 * x**2 * 6 * x)
    with pytest.raises(NotImplementedError, match=r"inside of `keras_moe.ops.any_derivative\(\)`"):
        gradients(loss, [x])


def test_activations_are_those_of_keras():
    for theirs, ours in backend.activations.items():
        for dtype, tolerance in (("float32", 1e-6), ("float16", 1e-3)):
            values = ops.cast(3 * normal(50), dtype)
            assert_close(ours(values), theirs(values), tolerance=tolerance)


@every_mode
def test_a_gradient_is_attached_to_a_value(mode):
    def objective(inputs):
        value, other = inputs
        attached = backend.attach_gradient(value, other, lambda gradient: 5 * gradient)
        return ops.sum(attached * ops.arange(1, 5, dtype="float32")), attached

    value, other = normal(4), normal(4) + 1
    _, attached, actual = differentiated(objective, mode)([value, other])
    assert_close(attached, value)
    assert_close(actual[0], [1, 2, 3, 4])
    assert_close(actual[1], [5, 10, 15, 20])


@every_mode
def test_a_pullback_is_the_gradient_times_a_vector_and_zero_for_what_is_unused(mode):
    def function(x, kernel, unused, cotangent):
        others, pullback = backend.vjp(
            lambda x, kernel, unused: (ops.tanh(x @ kernel), ops.exp(x)), [x, kernel, unused]
        )
        return others, pullback(cotangent)

    x, kernel, cotangent = normal(4, 3), normal(3, 2), normal(4, 2)
    others, (of_x, of_kernel, unused) = compiled(function, mode)(x, kernel, kernel, cotangent)
    inner = cotangent * (1 - np.tanh(x @ kernel) ** 2)
    assert_close(others, np.exp(x))
    assert_close(of_x, inner @ kernel.T)
    assert_close(of_kernel, x.T @ inner)
    assert not np.any(unused)


# Programs and places


def test_programs_compute_what_their_functions_do():
    """Also with other shapes, plain values and scalars."""

    def function(x, scale=1, *, negative=False):
        assert isinstance(negative, bool)
        return (-x if negative else x) * scale

    program = backend.jit_when_eager(function)
    for x in (ROWS, ROWS[:2]):
        tensor = ops.convert_to_tensor(x)
        assert_close(ops.convert_to_numpy(program(tensor)), x)
        assert_close(ops.convert_to_numpy(program(tensor, 2, negative=True)), -2 * x)
        assert_close(ops.convert_to_numpy(program(tensor, ops.convert_to_tensor(3.0))), 3 * x)
    # True equals 1, and is another value.
    shown = backend.jit_when_eager(lambda x, value: x + (10 if value is True else 20))
    results = [ops.convert_to_numpy(shown(ops.zeros((1,)), value)) for value in (1, True)]
    assert [float(each[0]) for each in results] == [20, 10]


@every_mode
def test_a_program_says_what_it_is(mode):
    seen = []

    def function(x):
        seen.append((backend.needs_static_shapes(), backend.is_exporting()))
        with backend.scope_of_call(keras.layers.Dense(1), x):
            return x + (backend.platform_of(x) in ("cpu", "gpu", "tpu"))

    assert_close(compiled(function, mode)(ROWS), ROWS + 1)
    assert seen[-1] == (BACKEND == "jax" or mode == "xla", False)


def test_a_network_runs_in_a_layout_on_the_platform_of_its_tokens():
    class Network:
        def forward(self, layout, inputs, context, save=False):
            assert layout.args == (backend, backend.platform_of(inputs[0]))
            return inputs[0] + 1, ()

        backward = forward  # which nothing asks for

    trained = {("up", "kernel"): ops.zeros((1, 3, 3))}
    plan = GroupedPlan.of(ops.zeros((2, 1), "int32"), ops.ones((2, 1)), 1)
    problem = Problem(ops.zeros((2, 3)), plan.weights, trained, {}, plan)
    assert_close(ops.convert_to_numpy(backend.run(Network(), problem)), np.ones((2, 3)))


def test_derivatives_of_any_order_have_a_layout_of_their_own():
    trained = {("up", "kernel"): ops.zeros((1, 4, 2**20))}
    plan = GroupedPlan.of(ops.zeros((2, 1), "int32"), ops.ones((2, 1)), 1)
    problem = Problem(ops.zeros((2, 4)), plan.weights, trained, {}, plan)
    assert not backend.layout(problem, "cpu").is_differentiable
    with any_derivative():
        assert backend.layout(problem, "cpu") is AllRows


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "dtype, layout", [("float32", AllRows), ("bfloat16", ChunksAndTiles), ("int8", ChunksAndTiles)]
)
def test_a_traced_loop_skips_experts_without_rows_where_kernels_are_converted(dtype, layout):
    tf = pytest.importorskip("tensorflow")
    kernel = keras.Variable(np.zeros((2, 4, 3)), dtype="int8" if dtype == "int8" else "float32")
    chosen = []

    @tf.function(jit_compile=False)
    def traced(tokens, indices):
        plan = GroupedPlan.of(indices, ops.ones((2, 1)), 2)
        trained = {("up", "kernel"): kernel}
        chosen.append(backend.layout(Problem(tokens, plan.weights, trained, {}, plan), "cpu"))

    traced(ops.zeros((2, 4), "float32" if dtype == "int8" else dtype), ops.zeros((2, 1), "int32"))
    assert chosen == [layout]


def test_one_device_has_no_others():
    assert backend.devices.num_replicas() == 1
    assert backend.devices.expert_processes() is None and backend.devices.token_shards() is None
    assert backend.devices.sharing(layers.LinearExperts(2, 1)) is None
    layer = keras.layers.Dense(1)
    backend.devices.separate_losses(layer)
    layer.add_loss(ops.ones(()))
    assert len(layer._losses[:]) == 1
    if BACKEND == "jax":
        assert backend.devices.split_experts(None, None) is None
    elif BACKEND == "tensorflow":  # Of PyTorch `test_replicas.py` has it.
        with pytest.raises(ValueError, match="MirroredStrategy"):
            backend.devices.split_experts(None, None)


def test_numbers_take_masked_places_and_what_is_not_compiled_is_called():
    values = ops.convert_to_tensor(np.array([1.0, np.nan, 3.0], "float32"))
    mask = ops.convert_to_tensor(np.array([False, True, True]))
    filled = backend.uncompiled(backend.masked_fill)(values, mask, 2.0)
    assert_close(ops.convert_to_numpy(filled), np.array([1.0, 2.0, 2.0]))


@pytest.mark.backends("torch")
def test_what_was_noted_of_integers_holds_until_they_change():
    integers = ops.convert_to_tensor(ints(0, 2, 1))
    assert not backend.is_complete(integers)
    assert backend.mark_complete(integers, 3) is integers
    assert backend.is_complete(integers, 3) and not backend.is_complete(integers, 2)
    assert not backend.is_complete(integers + 0, 3)
    assert not backend.is_written(integers)
    integers[0] = -1
    assert not backend.is_complete(integers, 3)
    assert backend.is_written(integers)
    assert not backend.is_complete(backend.mark_complete(ops.zeros((0,), "bool")))


def test_every_method_is_named_here():
    """A method that is added has no contract until it is."""
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    for cls, prefix in ((Backend, "backend."), (Devices, "backend.devices.")):
        public = [name for name in dir(cls) if not name.startswith("_")]
        assert len(public) > 7
        assert not [name for name in public if f"{prefix}{name}" not in text]


# `keras.ops`

OPS = {
    "NaN is no number": (ops.isfinite, ([1, NAN, INF, -INF],), [True, False, False, False]),
    "zero for what is no number": (
        lambda x: ops.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0),
        ([1, NAN, INF, -INF],),
        [1.0, 0, 0, 0],
    ),
    "NaN compares as false": (lambda x: x >= x, ([1, NAN],), [True, False]),
    "a choice leaves NaN out": (lambda x: ops.where(x > 0, x, 0.0), ([1, NAN, -1],), [1.0, 0, 0]),
    "NaN is larger than a bound": (lambda x: ops.maximum(x, 0.0), ([NAN, -1],), [NAN, 0.0]),
    "a sign of zero": (ops.sign, ([-2, 0, 3],), [-1.0, 0, 1]),
    "halves are rounded to even numbers": (ops.round, ([0.5, 1.5, 2.5, -0.5],), [0.0, 2, 2, -0.0]),
    "integers of floats are cut off": (
        lambda x: ops.cast(x, "int32"),
        ([1.9, -1.9, 2.0],),
        ints(1, -1, 2),
    ),
    "logarithms of sums of nothing": (
        lambda x: ops.logsumexp(x, axis=-1),
        ([[-INF, 0.0], [0, 0]],),
        [0.0, np.log(2)],
    ),
    "a softmax of what is out of reach": (ops.softmax, ([0.0, -INF, 0.0],), [0.5, 0, 0.5]),
    "a softmax of large numbers": (ops.softmax, ([3e38, 0.0],), [1.0, 0]),
    "sums and products of nothing": (
        lambda x, y: [ops.sum(x, axis=0), ops.matmul(x, y), ops.matmul(ops.transpose(x), x)],
        (np.zeros((0, 2), "float32"), np.ones((2, 3), "float32")),
        [np.zeros(each, "float32") for each in ((2,), (0, 3), (2, 2))],
    ),
    "no one-hot row of what is no class": (
        lambda x: ops.one_hot(x, 3),
        (ints(2, -1),),
        [[0.0, 0, 1], [0, 0, 0]],
    ),
    "a stable order, of booleans, and of infinite numbers": (
        lambda x, y: [ops.cast(ops.argsort(each), "int32") for each in (x, x > 0, -y)],
        (ints(1, 0, 1, 0, 1), [0, INF, -INF, 1]),
        [ints(1, 3, 0, 2, 4), ints(1, 3, 0, 2, 4), ints(1, 3, 0, 2)],
    ),
    "int32 stays int32": (
        lambda x: [ops.sum(x), ops.cumsum(x), x // 2, x % 3, ops.max(x), ops.maximum(x, 1)],
        (ints(5, -5),),
        [ints(0)[0], ints(5, 0), ints(2, -3), ints(2, 1), ints(5)[0], ints(5, 1)],
    ),
    "sums of booleans that are cast": (
        lambda x: ops.sum(ops.cast(x > 0, "int32")),
        (ints(1, 0, 1),),
        ints(2)[0],
    ),
    "bits": (
        lambda x: [ops.bitwise_and(x, 6), ops.bitwise_xor(x, 5), ops.right_shift(x, 1)],
        (ints(5, 12),),
        [ints(4, 4), ints(0, 9), ints(2, 6)],
    ),
    "sums of segments, also of empty ones": (
        lambda x, i: ops.segment_sum(x, i, 4),
        ([1, 2, 3], ints(2, 0, 2)),
        [2.0, 0, 4, 0],
    ),
    "rows of repeated indices": (
        lambda x, i: ops.take(x, i, axis=0),
        ([[1], [2]], ints(1, 1, 0)),
        [[2.0], [2], [1]],
    ),
    "the largest entries in their order, of equal ones the first": (
        lambda x: ops.cast(ops.argmax(x, axis=-1), "int32"),
        ([[0, 2, 2], [1, 1, 0]],),
        ints(1, 0),
    ),
    "a loop of no steps": (
        lambda x: ops.fori_loop(0, 0, lambda _, y: y + 1, x),
        ([1, 2],),
        [1.0, 2],
    ),
    "a loop that stops by a number of its own": (
        lambda x: ops.while_loop(
            lambda i, y: i < 3, lambda i, y: (i + 1, 2 * y), (ops.zeros((), "int32"), x)
        )[1],
        ([1, 2],),
        [8.0, 16],
    ),
}


@every_mode
def test_keras_does_what_is_taken_for_granted(mode):
    functions, arguments, expected = zip(*OPS.values())
    as_float = lambda x: x if getattr(x, "dtype", None) == "int32" else np.asarray(x, "float32")  # noqa: E731
    arguments = [tuple(map(as_float, each)) for each in arguments]

    def every(*arguments):
        return [function(*each) for function, each in zip(functions, arguments)]

    for name, actual, wanted in zip(OPS, compiled(every, mode)(*arguments), expected):
        wanted = wanted if isinstance(wanted, list) and hasattr(wanted[0], "dtype") else [wanted]
        actual = actual if isinstance(actual, (list, tuple)) else [actual]
        for one, other in zip(actual, wanted, strict=True):
            other = np.asarray(other)
            other = other.astype("float32") if other.dtype == "float64" else other
            assert (one.dtype, np.shape(one)) == (other.dtype, other.shape), name
            np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)


def test_gradients_of_what_is_not_chosen_are_zero_and_finite():
    """A choice passes no gradient to the other side, a softmax none to what is out of reach."""
    x = np.array([1.0, 0.0, 4.0], "float32")

    def objective(x):
        safe = ops.sqrt(ops.where(x > 0, x, 1.0))
        logits = ops.where(ops.convert_to_tensor([True, False, True]), x, -np.inf)
        return ops.sum(ops.where(x > 0, safe, 0.0)) + ops.softmax(logits)[0]

    (gradient,) = gradients(objective, [x])
    p = np.exp([1.0, 4.0]) / np.exp([1.0, 4.0]).sum()
    assert_close(gradient, [0.5 + p[0] * p[1], 0, 0.25 - p[0] * p[1]])


def test_no_gradient_passes_a_stop_and_ties_of_a_maximum_share_none_twice():
    def objective(x):
        return ops.sum(ops.stop_gradient(x) * x) + ops.max(x)

    (gradient,) = gradients(objective, [np.array([2.0, 1.0], "float32")], FAST_MODE)
    assert_close(gradient, [3, 1])


def test_a_platform_is_that_of_the_devices(monkeypatch):
    named = SimpleNamespace
    if BACKEND == "tensorflow":
        import tensorflow as tf

        monkeypatch.setattr(tf.config, "list_logical_devices", lambda: [named(device_type="GPU")])
        found = backend.platform_of(None)
    elif BACKEND == "jax":
        from keras_moe.backend.jax_sharding import Shards

        mesh = named(devices=np.array([named(platform="gpu")]))
        found = Shards(mesh, ("batch",)).platform
    else:
        tensor = named(device=named(type="cuda"))
        found = backend.platform_of(tensor)
    assert found == "gpu"
