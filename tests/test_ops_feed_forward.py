"""Grouped feed-forward networks: dtypes, any activation, no waste. Their values: test_ops_moe."""

import functools
import re

import keras
import numpy as np
import pytest
from backends import BACKEND, KERNEL_MODES, assert_close, forget, gradients
from keras import ops

from keras_moe import layers
from keras_moe.activations import quick_gelu
from keras_moe.backend import backend
from keras_moe.ops import grouped_feed_forward, plan_groups, top_k_routing
from keras_moe.ops.feed_forward import _grouped_feed_forward
from keras_moe.ops.grouped import tiles
from keras_moe.ops.grouped.records import Affine, Network
from keras_moe.ops.grouped.tiles import tile_length

T, D, H, E, K = 13, 4, 6, 3, 2


def network(activation, dtype="float32", stored_dtype=None, biases=2, widths=(D, H)):
    """The sum of the squared outputs, as a function of tokens, kernels and biases, and those.

    All have the `dtype`, unless another one is given for kernels and biases.
    """
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((T, E)).astype("float32")

    def function(*inputs):
        tokens = ops.cast(inputs[0], dtype)
        up, down, *biases = (ops.cast(tensor, stored_dtype or dtype) for tensor in inputs[1:])
        plan = plan_groups(top_k_routing(ops.convert_to_tensor(scores), K))
        outputs = grouped_feed_forward(
            tokens, plan.weights, plan.groups, activation, [up], down, biases
        )
        return ops.sum(ops.square(ops.cast(outputs, "float32")))

    features, hidden = widths
    shapes = [(T, features), (E, *widths), (E, hidden, features), (E, hidden), (E, features)]
    inputs = [generator.standard_normal(shape).astype("float32") for shape in shapes]
    return function, inputs[: 3 + biases]


@functools.cache
def gradients_in_float32():
    return gradients(*network(ops.gelu))


def signed_root(values):
    return ops.sign(values) * ops.sqrt(ops.abs(values))


def in_float32(values):
    return ops.gelu(ops.cast(values, "float32"))


def test_a_slope_that_is_infinite_at_zero_spoils_no_gradient(mode, small_tiles):
    function, inputs = network(signed_root, biases=0)
    for gradient in gradients(function, inputs, mode):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("activation", "dtype", "stored_dtype"),
    [
        (in_float32, "bfloat16", None),
        (ops.gelu, "float16", "float32"),
        (keras.activations.gelu, "bfloat16", None),
    ],
)
def test_gradients_in_half_precision_are_those_of_float32(activation, dtype, stored_dtype, mode):
    low = gradients(*network(activation, dtype, stored_dtype), mode)
    for gradient, expected in zip(low, gradients_in_float32()):
        assert_close(gradient, expected, tolerance=0.05)


@pytest.mark.backends("jax", "tensorflow")
def test_tiles_may_compute_in_half_precision_as_on_accelerators(monkeypatch, small_tiles):
    monkeypatch.setattr(tiles, "tile_dtype", lambda setting: setting.dtype)
    low = gradients(*network(ops.gelu, "bfloat16", "float32"), KERNEL_MODES[-1])
    for gradient, expected in zip(low, gradients_in_float32()):
        assert_close(gradient, expected, tolerance=0.05)


def traced(function, inputs):
    """The text of what JAX traces."""
    import jax

    forget()
    return str(jax.make_jaxpr(function)(*inputs))


def loss_of_half_precision():
    """The loss of a bank in mixed precision, as a function of its weights, and those."""
    bank = layers.FeedForwardExperts(E, H, dtype="mixed_bfloat16")
    bank.build((None, D))
    scores = np.random.default_rng(0).standard_normal((T, E)).astype("float32")
    plan = plan_groups(top_k_routing(ops.convert_to_tensor(scores), K))

    def loss(weights):
        outputs, _ = bank.stateless_call(weights, [], ops.ones((T, D), "bfloat16"), plan)
        return ops.sum(ops.cast(outputs, "float32"))

    return loss, [[weight.value for weight in bank.trainable_variables]]


@pytest.mark.backends("jax")
def test_kernels_of_idle_experts_are_not_converted():
    import jax

    loss, weights = loss_of_half_precision()
    bare = traced(jax.grad(loss), weights)
    layer = layers.MixtureOfExperts(
        layers.FeedForwardExperts(E, H, dtype="mixed_bfloat16"), dtype="mixed_bfloat16"
    )
    layer.build((None, D))
    inside = traced(layer, [np.ones((T, D), "float32")])
    for text in (bare, inside):
        assert "bf16[" in text
        for shape in ([E, D, H], [E, H, D], [E, H], [E, D]):
            size = ",".join(map(str, shape))
            assert f"f32[{size}]" in text and f"bf16[{size}]" not in text


@pytest.mark.backends("jax")
def test_products_on_cpus_are_those_of_float32(monkeypatch):
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("accelerators multiply in half precision")
    loss, weights = loss_of_half_precision()
    narrow_product = re.compile(r":bf16\[[0-9,]+\] = dot_general")
    assert not narrow_product.search(traced(jax.grad(loss), weights))
    monkeypatch.setattr(tiles, "tile_dtype", lambda setting: setting.dtype)
    assert narrow_product.search(traced(jax.grad(loss), weights))


@pytest.mark.backends("jax")
def test_a_forward_pass_keeps_no_pre_activations():
    import jax

    loss, weights = loss_of_half_precision()
    padding = tile_length(T * K, E)
    buffer = f"f32[{T * K + padding},{H}]"
    assert buffer not in traced(loss, weights)
    assert buffer in traced(jax.grad(loss), weights)


def test_nothing_is_saved_for_a_gradient_that_is_not_taken():
    kept = []

    def forward(inputs, context, keep):
        kept.append(keep)
        return inputs[0] * 2.0, ()

    def backward(inputs, context, saved, gradient):
        return (gradient * 2.0,)

    def double(x):
        return ops.sum(backend.differentiable(forward, backward, (x,), ()))

    x = ops.ones((3,))
    double(x)
    assert kept == [BACKEND == "tensorflow"]  # which does not tell
    gradients(double, [np.ones(3, "float32")])
    assert kept[-1]
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            double(x.requires_grad_())
        assert not kept[-1]


@pytest.mark.backends("torch")
def test_frozen_kernels_cost_no_gradients():
    function, inputs = network(ops.gelu)
    tokens, *parameters = map(ops.convert_to_tensor, inputs)
    trained = [{"kernel": kernel} for kernel in parameters[:2]]
    assert backend.stacked_gradients(trained).result() == [{"kernel": None}] * 2
    tokens.requires_grad_()
    function(tokens, *parameters).backward()
    assert tokens.grad is not None and all(parameter.grad is None for parameter in parameters)


@pytest.mark.backends("torch")
def test_what_is_saved_for_the_gradient_is_freed_with_it():
    function, inputs = network(ops.gelu)
    loss = function(*(ops.convert_to_tensor(array).requires_grad_() for array in inputs))
    node = loss.grad_fn
    while "Differentiable" not in node.name():
        node = node.next_functions[0][0]
    assert len(node.saved_tensors) > len(inputs)
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        print(node.saved_tensors)


# The widths of the projections, which of them have a bias, a factor of low rank, and options.
BANKS = {
    "linear": ((D, H), [True], None, {}),
    "linear, low rank": ((D, H), [True], 0.5, {}),
    "wider outputs, one bias": ((D, H, D + 3), [False, True], None, {}),
    "gate, low rank, no bias": ((D, H, H, D + 3), [False] * 3, 2.0, {}),
    "gate of gpt-oss": (
        (D, H, H, D),
        [True] * 3,
        None,
        {"activation": quick_gelu, "clip": 0.5, "up_shift": 1.0},
    ),
}


@pytest.mark.parametrize("bank", BANKS.values(), ids=list(BANKS))
def test_banks_equal_a_formula(bank, mode, small_tiles):
    check_bank(*bank, mode)


def check_bank(widths, has_bias, scale, options, mode):
    """Gradients of a bank of any projections are those of one product for each row."""
    generator, expert = np.random.default_rng(0), np.arange(T) % E
    options = {"activation": ops.gelu if len(widths) > 2 else None, **options}

    def normal(*shape):
        return (generator.normal(size=shape) / 2).astype("float32")

    shapes = list(zip([widths[0]] * max(len(widths) - 2, 1) + [widths[1]], widths[1:]))
    kernels = [normal(E, *shape) for shape in shapes]
    routing = top_k_routing(10 * ops.one_hot(expert, E), 1, renormalize=True)

    def affines(flat):
        """Projections of an iterator over what has a gradient: no kernel that is corrected."""
        for kernel, has in zip(kernels, has_bias):
            kernel = next(flat) if scale is None else ops.convert_to_tensor(kernel)
            bias = next(flat) if has else None
            yield Affine(kernel, bias, None if scale is None else (next(flat), next(flat)))

    def grouped(tokens, *flat):
        network = Network(low_rank_scale=scale, **options)
        projections = list(affines(iter(flat)))
        outputs = _grouped_feed_forward(tokens, plan_groups(routing), network, projections)
        return ops.sum(ops.sin(outputs))

    def plain(tokens, *flat):
        def times(rows, stacked):
            return ops.einsum("td,tdh->th", rows, ops.take(stacked, expert, axis=0))

        def project(rows, affine):
            product = times(rows, affine.kernel)
            if affine.bias is not None:
                product = product + ops.take(affine.bias, expert, axis=0)
            if affine.low_rank is not None:
                a, b = affine.low_rank
                product = product + scale * times(times(rows, a), b)
            return product

        *ups, down = affines(iter(flat))
        rows, *hidden = [tokens, *(project(tokens, up) for up in ups)]
        if "clip" in options:
            clip, (gate, up) = options["clip"], hidden
            hidden = ops.minimum(gate, clip), ops.clip(up, -clip, clip) + options["up_shift"]
        if hidden:
            rows = options["activation"](hidden[0])
        if len(hidden) > 1:
            rows = rows * hidden[1]
        return ops.sum(ops.sin(project(rows, down)))

    inputs = [(T, widths[0])]
    for (depth, width), has in zip(shapes, has_bias):
        inputs += [(E, depth, width)] if scale is None else []
        inputs += [(E, width)] if has else []
        inputs += [] if scale is None else [(E, depth, 2), (E, 2, width)]
    inputs = [normal(*shape) for shape in inputs]
    for gradient, expected in zip(gradients(grouped, inputs, mode), gradients(plain, inputs)):
        assert_close(gradient, expected)
