"""Networks of experts: products, engines, dtypes, any network, no waste. Layers: test_ops_moe."""

import contextlib
import functools
import re

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    FAST_MODE,
    PLACES,
    assert_close,
    by_place,
    compiled,
    differentiated,
    forget,
    on_one_backend,
)
from drawn import MASKS, SKEWS, draw_mask
from keras import ops as keras_ops
from layer_checks import gradients, normal
from test_ops_moe import Config, build, check_against_oracle, draw_batch

from keras_moe import layers, ops
from keras_moe.backend import backend, tiles
from keras_moe.backend.base import named_platform
from keras_moe.backend.padded import tile_length
from keras_moe.layers import layer_experts
from keras_moe.ops import GroupedPlan, top_k_routing
from keras_moe.ops.linears import Kernel

T, D, H, E, K = 13, 8, 16, 3, 2


def mixture(activation="gelu", dtype="float32", bank=layers.FeedForwardExperts):
    layer = layers.MixtureOfExperts(bank(E, H, activation), router_losses=(), dtype=dtype)
    layer.build((None, D))
    return layer


def signed_root(values):
    return keras_ops.sign(values) * keras_ops.sqrt(keras_ops.abs(values))


def test_a_slope_that_is_infinite_at_zero_spoils_no_gradient(place):
    found = gradients(mixture(signed_root), normal(T, D), mode=place[1])
    assert all(np.isfinite(gradient).all() for gradient in found.values())


def wide_gelu(values):
    return keras_ops.gelu(keras_ops.cast(values, "float32"))


@functools.cache
def in_float32():
    """Tokens that half precision has as well, weights, and gradients for both."""
    x, layer = np.round(8 * normal(T, D)) / 8, mixture()
    return x, layer.get_weights(), gradients(layer, x).values()


HALF = [
    (wide_gelu, "bfloat16"),
    ("gelu", "mixed_float16"),
    ("gelu", "mixed_bfloat16"),
]


@by_place(HALF, HALF[:2])
def test_half_precision_is_near_float32(place, case):
    x, weights, expected = in_float32()
    layer = mixture(*case)
    layer.set_weights(weights)
    actual = gradients(layer, x, mode=place[1]).values()
    for gradient, wanted in zip(actual, expected, strict=True):
        assert_close(gradient, wanted, tolerance=0.1)


PLAIN = Config(num_tokens=13, features=8, hidden_dim=16)
CONFIGS = [
    PLAIN._replace(gated=True, activation="silu", use_bias=False, capacity_factor=0.8),
    PLAIN._replace(num_tokens=1, num_experts=5, top_k=3, capacity_factor=0.3),
]


@pytest.mark.parametrize(
    "place", [each for each in PLACES if each[0] != "cpu"] or PLACES, indirect=True, ids="-".join
)
@pytest.mark.parametrize("config", CONFIGS, ids=["gated", "one token"])
def test_layers_on_other_platforms_equal_the_oracle(config, place):
    run, rng = build.__wrapped__(config, place[1]), np.random.default_rng(0)
    for skew, kind, content in zip((*SKEWS, "zipf"), MASKS, (np.nan, 0.0, np.inf, np.nan)):
        x, weights, upstream = draw_batch(config, rng, skew)
        mask = draw_mask(rng, config.num_tokens, kind)
        x[~mask] = content
        result = run(x, weights, upstream, mask)
        check_against_oracle(config, result, x, weights, upstream, mask)


SIZES = ([3, 0, 2], [11, 0, 0], [0, 0, 0], [1, 4, 6])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_products_equal_a_loop_over_groups(dtype, place):
    platform, mode = place
    rng = np.random.default_rng(0)
    rows, right = (rng.normal(size=(11, width)).astype("float32") for width in (D, H))
    kernels = rng.normal(size=(3, D, H)).astype("float32")
    tolerance = 1e-5 if dtype == "float32" else 2e-2

    def both(rows, right, kernels, sizes):
        rows, right, kernels = (keras_ops.cast(each, dtype) for each in (rows, right, kernels))
        results = (
            backend.product(rows, Kernel(kernels), sizes, False, platform),
            backend.product(right, Kernel(kernels), sizes, True, platform),
            backend.outer(rows, right, sizes, "float32", platform),
        )
        return [keras_ops.cast(each, "float32") for each in results]

    function = compiled(both, mode)
    for sizes in SIZES:
        # What is past the last group reaches nothing.
        left, other = rows.copy(), right.copy()
        left[sum(sizes) :] = other[sum(sizes) :] = np.nan
        forward, transposed, outer = function(left, other, kernels, np.array(sizes, "int32"))
        ends, served = np.cumsum(sizes), sum(sizes)
        spans = [slice(end - size, end) for size, end in zip(sizes, ends)]
        expected = np.concatenate([rows[s] @ kernels[e] for e, s in enumerate(spans)])
        assert_close(forward[:served], expected, tolerance=tolerance)
        expected = np.concatenate([right[s] @ kernels[e].T for e, s in enumerate(spans)])
        assert_close(transposed[:served], expected, tolerance=tolerance)
        expected = np.stack([rows[s].T @ right[s] for s in spans])
        assert_close(outer, expected, tolerance=tolerance)


@on_one_backend
def test_grouped_mm_serves_new_gpus_where_it_is_one_kernel(monkeypatch):
    import torch

    from keras_moe.backend.torch_groups import has_grouped_mm

    class Cuda(torch.Tensor):
        is_cuda = True

    def served(capability, dtype=torch.bfloat16, width=128):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        rows = torch.ones((4, 64), dtype=dtype).as_subclass(Cuda)
        return has_grouped_mm(rows, torch.ones((2, 64, width)))

    assert [major for major in range(7, 14) if served((major, 0))] == [9, 10]
    assert not served((9, 0), torch.float32) and not served((9, 0), width=100)


@on_one_backend
@pytest.mark.parametrize("kind", ["gated", "low-rank"])
def test_grouped_mm_computes_what_the_loop_computes_and_reads_no_size(kind, monkeypatch):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from keras_moe.backend import torch_groups

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            assert operation is not torch.ops.aten._local_scalar_dense.default  # what `item` calls
            return operation(*args, **(kwargs or {}))

    read, to_list = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or to_list(self))
    bank = layers.GatedExperts(4, 16, use_bias=True)
    if kind == "low-rank":
        bank = layers.LowRankExperts(layers.GatedExperts(1, 16), 4, 4)
    layer = layers.MixtureOfExperts(bank, capacity_factor=1.0)
    layer.build((None, 6, 8))

    def trained():
        x = torch.arange(96.0).reshape(2, 6, 8).sin().requires_grad_()
        outputs = layer(x, mask=torch.arange(12).reshape(2, 6) != 3, training=True)
        outputs.square().sum().backward()
        results = [outputs, x.grad, *(weight.value.grad for weight in layer.trainable_weights)]
        for weight in layer.trainable_weights:
            weight.value.grad = None
        return [each.detach().clone() for each in results if each is not None]

    with monkeypatch.context() as without, ops.platform("gpu"):
        without.setattr(torch_groups, "has_grouped_mm", lambda *tensors: False)
        expected = trained()
        assert len(read) == 2  # in the forward and in the backward pass
    read.clear()
    with ops.platform("gpu"), Operations():
        for actual, other in zip(trained(), expected):
            assert_close(actual, other)
    assert not read
    for actual, other in zip(trained(), expected):  # as CPUs compute it
        assert_close(actual, other)


@on_one_backend
@pytest.mark.parametrize("kind", [None, "gated", "LoRA", "int8", "frozen", "bfloat16"])
def test_small_problems_are_computed_as_large_ones(kind, monkeypatch):
    import torch

    dtype, tolerance = ("bfloat16", 0.05) if kind == "bfloat16" else ("float32", 1e-5)
    if kind == "gated":
        experts = layers.GatedExperts(E, H, dropout=0.3)
    else:
        experts = layers.FeedForwardExperts(E, H, dtype=dtype)
    layer = layers.MixtureOfExperts(experts, capacity_factor=1.0, dtype=dtype)
    layer.build((None, D))
    if kind == "LoRA":
        experts.enable_lora(2, b_initializer="he_uniform")
    elif kind == "int8":
        experts.quantize("int8")
    experts.trainable = kind != "frozen"
    x, mask = torch.from_numpy(normal(T, D)).to(getattr(torch, dtype)), torch.arange(T) != 2

    def trained():
        keras.utils.set_random_seed(0)
        if experts._dropout_seed is not None:
            experts._dropout_seed.state.assign([0, 1])
        inputs = x.clone().requires_grad_()
        outputs = layer(inputs, mask=mask, training=True)
        weights = [weight.value for weight in layer.trainable_weights]
        # Its gradient is the same number everywhere, in no memory of its own.
        gradients = torch.autograd.grad(outputs.float().sum(), [inputs, *weights])
        return [outputs.detach(), *gradients]

    small = trained()
    monkeypatch.setattr("keras_moe.backend.torch_groups.CPU_CHUNK_VALUES", 64)
    for actual, expected in zip(small, trained(), strict=True):
        assert_close(actual.float(), expected.float(), tolerance=tolerance)


def test_a_platform_ends_with_its_context():
    with contextlib.suppress(KeyError), ops.platform("tpu"), ops.platform("gpu"):
        raise KeyError
    assert named_platform() is None


@pytest.mark.backends("jax", "tensorflow")
def test_layers_that_are_alike_give_on_accelerators_what_they_give_on_a_cpu():
    # An activity regularizer counts once a tile: here an expert has one tile at most.
    options = {"activity_regularizer": keras.regularizers.L2(0.1)}
    experts = [
        keras.Sequential([keras.layers.Dense(16, "gelu", **options), keras.layers.Dense(D)])
        for _ in range(3)
    ]
    layer = layers.MixtureOfExperts(layers.LayerExperts(experts), router_losses=())
    layer.build((None, D))
    results = []
    for platform in ("cpu", "gpu"):
        with ops.platform(platform):
            results.append(gradients(layer, normal(20, D), PLACES[-1][1], training=True))
    for name, gradient in results[0].items():
        assert_close(results[1][name], gradient)


class Secretive(keras.layers.Layer):
    """A layer whose configuration does not tell everything."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return x * self.factor

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        return super().get_config()


def scaled(factor):
    return lambda x: x * factor


@on_one_backend
def test_layers_are_alike_if_only_their_weights_differ():
    dense, normal = keras.layers.Dense, keras.initializers.HeNormal

    def are_alike(*experts):
        for expert in experts:
            expert.build((None, 4))
        return layer_experts.are_alike(experts)

    for experts in (
        [dense(4), dense(4, name="b")],
        [dense(4, kernel_initializer=normal(seed)) for seed in (1, 2)],
    ):
        assert are_alike(*experts)
    for experts in (
        [dense(4, scaled(factor)) for factor in (1.0, 2.0)],  # closures of one name
        [dense(4, dtype=dtype) for dtype in ("float32", "mixed_bfloat16")],
        [Secretive(1.0), Secretive(2.0)],
        [dense(4), dense(4, "relu")],
        [dense(4), keras.layers.EinsumDense("ab,bc->ac", 4)],
        [keras.layers.BatchNormalization() for _ in range(2)],
        [keras.layers.Dropout(0.1, seed=1) for _ in range(2)],
    ):
        assert not are_alike(*experts)


def training_step(dtype="mixed_bfloat16", bank=layers.FeedForwardExperts):
    """A jitted training step of a layer, and the shapes of its arguments."""
    import jax

    layer = layers.MixtureOfExperts(bank(4, 128, dtype=dtype), dtype=dtype)
    layer.build((None, 64))
    trainable = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]

    def loss(trainable, x):
        outputs, _, losses = layer.stateless_call(
            trainable, fixed, x, training=True, return_losses=True
        )
        return keras_ops.sum(keras_ops.cast(outputs, "float32") ** 2) + sum(losses)

    x = jax.ShapeDtypeStruct((64, 64), layer.compute_dtype)
    return jax.jit(jax.value_and_grad(loss)), (trainable, x)


def exported(platform, *step, platforms=None):
    """The text of a program that JAX exports for a platform."""
    from jax import export

    function, arguments = training_step(*step)
    with ops.platform(platform):
        program = export.export(function, platforms=platforms or [platform])(*arguments)
    return program.mlir_module()


def loops_over_tiles(program):
    """Whether a program has loops over matrices of floats; sums and searches are loops as well."""
    return re.search(r"stablehlo\.while.*\dx\d+x(f32|bf16)", program)


@pytest.mark.backends("jax")
def test_an_exported_program_has_the_engine_of_its_platform():
    program = exported("tpu")
    assert "tpu_custom_call" in program and not loops_over_tiles(program)
    # One program may be for all platforms.
    program = exported("gpu", platforms=["cpu", "tpu", "cuda"])
    assert "custom_call" not in program and loops_over_tiles(program)
    # The first rows of all experts are one batched product, with kernels as they are.
    assert "batching_dims = [0] x [0]" in program and "ragged_dot" not in program
    program = exported("cpu")
    assert "custom_call" not in program and loops_over_tiles(program)


@pytest.mark.backends("jax")
def test_half_precision_of_an_exported_program_is_that_of_its_platform():
    # float16 is not a dtype of kernels for TPUs, so products are XLA's there.
    products = [
        line for line in exported("tpu", "mixed_float16").splitlines() if "dot_general" in line
    ]
    experts = [line for line in products if "x64x128x" in line]
    assert experts and all("xf16>, tensor<" in line for line in experts)


@pytest.mark.backends("jax")
def test_kernels_run_one_after_the_other_under_vmap():
    import jax

    rng = np.random.default_rng(0)
    inputs, kernels = rng.normal(size=(2, 9, 8)), rng.normal(size=(3, 8, 4))
    inputs, kernels = inputs.astype("float32"), kernels.astype("float32")
    sizes = np.array([[4, 0, 5], [1, 6, 2]], "int32")
    with ops.platform("tpu"):
        product = jax.vmap(lambda rows, sizes: ops.grouped_matmul(rows, kernels, sizes))
        outputs = jax.jit(product)(inputs, sizes)
    for output, *arguments in zip(outputs, inputs, sizes):
        assert_close(output, ops.grouped_matmul(arguments[0], kernels, arguments[1]))


@pytest.mark.backends("jax")
def test_a_program_for_another_accelerator_than_it_was_traced_for_is_an_error():
    function, arguments = training_step()
    with ops.platform("tpu"):
        traced = function.trace(*arguments)
    with pytest.raises(NotImplementedError, match="platform cuda"):
        traced.lower(lowering_platforms=("cuda",))


def traced(function, inputs):
    """The text of what JAX traces for a CPU."""
    import jax

    forget()
    with ops.platform("cpu"):
        return str(jax.make_jaxpr(function)(*inputs))


def loss_of_half_precision():
    """The loss of a bank in mixed precision, as a function of its weights, and those."""
    bank = layers.FeedForwardExperts(E, H, dtype="mixed_bfloat16")
    bank.build((None, D))
    scores = np.random.default_rng(0).standard_normal((T, E)).astype("float32")
    routing = top_k_routing(keras_ops.convert_to_tensor(scores), K)
    plan = GroupedPlan.of(routing.indices, routing.weights, E)

    def loss(weights):
        outputs, _ = bank.stateless_call(weights, [], keras_ops.ones((T, D), "bfloat16"), plan)
        return keras_ops.sum(keras_ops.cast(outputs, "float32"))

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
    monkeypatch.setattr(tiles, "computed_dtype", lambda *_: "bfloat16")
    assert narrow_product.search(traced(jax.grad(loss), weights))


@pytest.mark.backends("jax")
def test_a_forward_pass_keeps_no_pre_activations(monkeypatch):
    import jax

    monkeypatch.setattr(tiles, "MIN_WIDE_ROWS", T)  # all rows in the loop
    loss, weights = loss_of_half_precision()
    padding = tile_length(T * K, E, "cpu")
    buffer = f"f32[{T * K + padding},{H}]"
    assert buffer not in traced(loss, weights)
    assert buffer in traced(jax.grad(loss), weights)


@on_one_backend
def test_what_is_saved_for_the_gradient_is_freed_with_it(small_tiles):
    layer = mixture()
    loss = keras_ops.sum(layer(keras_ops.convert_to_tensor(normal(T, D))))
    node = loss.grad_fn
    while "Differentiable" not in node.name():
        node = node.next_functions[0][0]
    assert len(node.saved_tensors) > len(layer.experts.weights) + 1
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        print(node.saved_tensors)


def test_nothing_is_saved_for_a_gradient_that_is_not_taken():
    kept = []

    def forward(inputs, context, save):
        kept.append(save)
        return inputs[0] * 2.0, ()

    def backward(inputs, context, saved, gradient):
        return (gradient * 2.0,)

    def double(x):
        return keras_ops.sum(backend.differentiable(forward, backward, (x,), ()))

    x = keras_ops.ones((3,))
    double(x)
    assert kept == [BACKEND == "tensorflow"]  # which does not tell
    differentiated(lambda inputs: (double(*inputs), ()), FAST_MODE)([np.ones(3, "float32")])
    assert kept[-1]
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            double(x.requires_grad_())
        assert not kept[-1]
