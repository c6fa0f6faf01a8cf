"""Engines of grouped computation: each against the oracle, wherever it would be chosen."""

import contextlib
import random

import keras
import numpy as np
import pytest
import reference
from backends import (
    BACKEND,
    FAST_MODE,
    assert_close,
    compiled,
    differentiated,
    gradients,
    to_tensors,
)
from drawn import MASKS, SKEWS, draw_mask
from keras import ops as keras_ops
from layer_checks import moe
from test_ops_feed_forward import check_bank, network, signed_root
from test_ops_grouped_matmul import check_against_oracle as check_groups
from test_ops_grouped_matmul import weighted_sum
from test_ops_moe import Config, build, check_against_oracle, draw_batch

from keras_moe import inspection, layers, ops, routers
from keras_moe.backend import backend
from keras_moe.ops import grouped_matmul
from keras_moe.ops.grouped import rows, run, slices
from keras_moe.ops.grouped.records import Setting
from keras_moe.ops.platforms import named_platform

# The engines of accelerators, as far as a CPU can run them: Pallas kernels are interpreted. All
# other tests run those of CPUs.
ENGINES = {
    "jax": [("rows", "tpu"), ("rows", "gpu"), ("padded", "gpu")],
    "tensorflow": [("padded", "gpu"), ("slices", "gpu"), ("loop", "cpu")],
    "torch": [("rows", "gpu"), ("slices", "gpu")],
}[BACKEND]
BY_NAME = {run.name_of(engine): engine for engine in run.ENGINES}
DYNAMIC = ("slices", "loop")


if backend.current_platform() != "cpu":  # kernels are interpreted on a CPU only
    ENGINES = [
        (name, platform) for name, platform in ENGINES if platform == backend.current_platform()
    ]


@pytest.fixture(params=ENGINES, ids="-".join)
def engine(request):
    return request.param


@pytest.fixture
def mode(engine, monkeypatch, small_tiles):
    """The mode to compile in, where one engine computes on one platform."""
    name, platform = engine
    monkeypatch.setattr(run, "choose", lambda setting: BY_NAME[name])
    with ops.platform(platform):
        yield "xla" if BACKEND == "tensorflow" and name not in DYNAMIC else FAST_MODE


# Widths are multiples of 8, as PyTorch's grouped_mm wants them.
PLAIN = Config(num_tokens=13, features=8, hidden_dim=16)
CONFIGS = {
    "plain": PLAIN,
    "gated": PLAIN._replace(gated=True, activation="silu", use_bias=False, capacity_factor=0.8),
    "one token": PLAIN._replace(num_tokens=1, num_experts=5, top_k=3, capacity_factor=0.3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_outputs_and_all_gradients_equal_the_oracle(config, mode):
    run, rng = build.__wrapped__(config, mode), np.random.default_rng(0)
    for skew, kind, content in zip((*SKEWS, "zipf"), MASKS, (np.nan, 0.0, np.inf, np.nan)):
        x, weights, upstream = draw_batch(config, rng, skew)
        mask = draw_mask(rng, config.num_tokens, kind)
        x[~mask] = content
        result = run(x, weights, upstream, mask)
        check_against_oracle(config, result, x, weights, upstream, mask)


def test_a_slope_that_is_infinite_at_zero_spoils_no_gradient(mode):
    function, inputs = network(signed_root, biases=0, widths=(8, 16))
    for gradient in gradients(function, inputs, mode):
        assert np.isfinite(gradient).all()


def test_groups_of_rows_equal_the_oracle(mode):
    """Also without rows, with rows past the last group, and sizes that count too many."""
    function, rng = differentiated(weighted_sum, mode), np.random.default_rng(0)
    for num_rows, sizes in ((11, [3, 0, 2]), (0, [0, 0])):
        check_groups(function, rng, num_rows, sizes, (8, 16))
    inputs, kernels = rng.normal(size=(9, 8)), rng.normal(size=(3, 8, 16))
    inputs, kernels = inputs.astype("float32"), kernels.astype("float32")
    output = compiled(grouped_matmul, mode)(inputs, kernels, np.array([4, 90, 7], "int32"))
    assert_close(output, reference.grouped_matmul(inputs, kernels, [4, 5, 0]))


def layer_gradients(policy, mode):
    """Gradients of a loss of a layer, for its inputs and weights."""
    random.seed(0)
    bank = layers.GatedExperts(3, 16, use_bias=True, dtype=policy)
    layer = layers.MixtureOfExperts(bank, routers.TopKRouter(3, 2), dtype=policy)
    layer.build((None, 8))

    def loss(inputs, fixed):
        outputs, _ = layer.stateless_call(inputs[1:], fixed, inputs[0])
        assert keras.backend.standardize_dtype(outputs.dtype) == layer.compute_dtype
        return keras_ops.sum(keras_ops.square(keras_ops.cast(outputs, "float32"))), ()

    x = np.random.default_rng(0).normal(size=(13, 8)).astype("float32")
    inputs = [x, *map(keras_ops.convert_to_numpy, layer.trainable_variables)]
    fixed = list(map(keras_ops.convert_to_numpy, layer.non_trainable_variables))
    return differentiated(loss, mode)(inputs, fixed)[2]


@pytest.fixture(scope="module")
def gradients_in_float32():
    return layer_gradients("float32", FAST_MODE)


def test_half_precision_is_near_float32(mode, engine, gradients_in_float32):
    dtype = "float16" if engine == ("rows", "gpu") and BACKEND == "jax" else "bfloat16"
    for low, full in zip(layer_gradients(f"mixed_{dtype}", mode), gradients_in_float32):
        assert low.dtype == np.float32
        assert_close(low, full, tolerance=0.1)


TABLE = np.float32([0.5, 2.0])
ACTIVATIONS = [
    lambda x: keras_ops.erf(x) + keras_ops.sin(x),
    # Not for kernels: looks across a row, or takes a number from outside.
    lambda x: x * keras_ops.softmax(x, axis=-1),
    lambda x: x * keras_ops.convert_to_tensor(TABLE)[0],
    lambda x: keras_ops.cast(keras_ops.gelu(keras_ops.cast(x, "float32")), x.dtype),
]


def test_any_activation_is_computed_inside_a_kernel_or_after_it(engine, mode):
    for activation in ACTIVATIONS if engine[0] == "rows" else ACTIVATIONS[:1]:
        check_bank((8, 16, 8), [False] * 2, None, {"activation": activation}, mode)


PLATFORMS = ("cpu", "gpu", "tpu")
CHOICES = {
    ("jax", True, "float32"): ("tiles", "rows", "rows"),
    ("jax", True, "bfloat16"): ("tiles", "rows", "rows"),
    ("jax", True, "float16"): ("tiles", "rows", "padded"),
    ("tensorflow", True, "bfloat16"): ("tiles", "padded", "padded"),
    ("tensorflow", False, "bfloat16"): ("slices", "slices", "slices"),
    ("torch", False, "bfloat16"): ("slices", "slices", "slices"),
}


@pytest.mark.parametrize(("case", "names"), [i for i in CHOICES.items() if i[0][0] == BACKEND])
def test_the_engine_follows_from_the_setting(case, names):
    _, static_shapes, dtype = case
    for platform, name in zip(PLATFORMS, names):
        engine = run.choose(Setting(platform, static_shapes, dtype, (64, 128, 64)))
        assert run.name_of(engine) == name


@pytest.mark.backends("tensorflow")
def test_few_rows_go_to_a_loop_on_a_cpu():
    def engine(num_rows, platform="cpu", **kernels):
        setting = Setting(platform, False, "float32", (64, 128, 64), 8, num_rows, **kernels)
        return run.name_of(run.choose(setting))

    assert engine(0) == engine(4) == engine(128, converts=True) == "loop"
    assert engine(5) == engine(129, converts=True) == engine(4, "gpu") == "slices"
    assert engine(None) == engine(None, converts=True) == "slices"
    assert engine(None, converts=True, is_quantized=True) == "loop"


@pytest.mark.backends("torch")
def test_grouped_mm_serves_new_gpus_where_it_is_one_kernel(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def engine(capability, dtype="bfloat16", widths=(64, 128, 64)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        run.choose.cache_clear()
        return run.name_of(run.choose(Setting("gpu", False, dtype, widths)))

    assert engine((9, 0)) == engine((10, 0)) == "rows"
    assert engine((8, 9)) == engine((9, 0), "float32") == "slices"
    assert engine((9, 0), widths=(64, 100, 64)) == "slices"
    run.choose.cache_clear()


def test_users_can_read_the_engine():
    dense = keras.layers.Dense
    banks = {
        "dense": None,
        "alike": layers.LayerExperts([dense(8), dense(8)]),
        "different": layers.LayerExperts([dense(8), dense(8, "relu")]),
    }
    model = keras.Sequential(
        [keras.Input((6, 8)), *(moe(bank, name=name) for name, bank in banks.items())]
    )

    def engines_on(platform):
        with ops.platform(platform):
            described = inspection.summarize(model)
        assert [each.name for each in described] == list(banks)
        assert {each.platform for each in described} == {platform}
        return tuple(each.engine for each in described)

    on_cpu, on_gpu = map(engines_on, ("cpu", "gpu"))
    if BACKEND == "jax":
        assert on_cpu == ("tiles", "scan", "scan") and on_gpu == ("rows", "vectorized", "scan")
    else:
        assert on_cpu == on_gpu == ("slices",) * 3
    if BACKEND == "tensorflow":
        model.compile(jit_compile=True)
        assert engines_on("gpu") == ("padded", "vectorized", "scan")
    assert inspection.summarize(model)[0].platform == backend.current_platform()


def test_a_platform_ends_with_its_context():
    with contextlib.suppress(KeyError), ops.platform("tpu"), ops.platform("gpu"):
        raise KeyError
    assert named_platform() is None


def loss_of_alike_layers(platform, x):
    """Value, outputs and gradients of a loss, as a flat list of arrays."""
    random.seed(0)

    def expert():
        return keras.Sequential(
            [
                keras.layers.Dense(16, "gelu", activity_regularizer=keras.regularizers.L2(0.1)),
                keras.layers.Dense(8),
            ]
        )

    bank = layers.LayerExperts([expert() for _ in range(3)])
    layer = layers.MixtureOfExperts(bank, router_losses=())
    layer.build((None, 8))
    fixed = [keras_ops.convert_to_numpy(weight) for weight in layer.non_trainable_variables]
    weights = [keras_ops.convert_to_numpy(weight) for weight in layer.trainable_variables]

    def loss(inputs):
        outputs, _, losses = layer.stateless_call(
            inputs[1:], to_tensors(fixed), inputs[0], training=True, return_losses=True
        )
        # An activity regularizer counts once a tile: here an expert has one tile at most.
        return keras_ops.sum(outputs * keras_ops.sin(outputs)) + sum(losses), outputs

    with ops.platform(platform):
        mode = "xla" if BACKEND == "tensorflow" else FAST_MODE
        return keras.tree.flatten(differentiated(loss, mode)([x, *weights]))


@pytest.mark.backends("jax", "tensorflow")
def test_layers_that_are_alike_give_on_accelerators_what_they_give_on_a_cpu():
    x = np.random.default_rng(0).normal(size=(20, 8)).astype("float32")
    results = [loss_of_alike_layers(platform, x) for platform in ("cpu", "gpu")]
    for one, other in zip(*results):
        assert_close(one, other)


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


@pytest.mark.backends("torch")
def test_layers_are_alike_if_only_their_weights_differ():
    dense, normal = keras.layers.Dense, keras.initializers.HeNormal

    def engine(*experts):
        bank = layers.LayerExperts(experts)
        bank.build((None, 4))
        return bank.engine_on("gpu", True)

    for experts in (
        [dense(4), dense(4, name="b")],
        [dense(4, kernel_initializer=normal(seed)) for seed in (1, 2)],
    ):
        assert engine(*experts) == "vectorized"
    for experts in (
        [dense(4, scaled(factor)) for factor in (1.0, 2.0)],  # closures of one name
        [dense(4, dtype=dtype) for dtype in ("float32", "mixed_bfloat16")],
        [Secretive(1.0), Secretive(2.0)],
        [dense(4), dense(4, "relu")],
        [dense(4), keras.layers.EinsumDense("ab,bc->ac", 4)],
        [keras.layers.BatchNormalization() for _ in range(2)],
        [keras.layers.Dropout(0.1, seed=1) for _ in range(2)],
    ):
        assert engine(*experts) == "scan"


@pytest.mark.backends("torch")
def test_the_host_reads_no_size_where_grouped_mm_computes(monkeypatch):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
                read.append(function)
            return function(*args, **(kwargs or {}))

    to_list = torch.Tensor.tolist  # tells no dispatcher
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or to_list(self))

    def reads(engine):
        monkeypatch.setattr(run, "choose", lambda setting: engine)
        layer = layers.MixtureOfExperts(layers.FeedForwardExperts(4, 16), capacity_factor=1.0)
        layer.build((None, 6, 8))
        mask = torch.arange(12).reshape(2, 6) != 3
        read.clear()
        with Reads():
            outputs = layer(torch.ones((2, 6, 8), requires_grad=True), mask=mask, training=True)
            (outputs.sum() + sum(layer.losses)).backward()
        return len(read)

    assert reads(slices) == 2  # in the forward and in the backward pass
    assert reads(rows) == 0


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


def exported(platforms, *step):
    """The text of a program that JAX exports."""
    from jax import export

    function, arguments = training_step(*step)
    # JAX promises no future for Triton kernels in exported programs.
    triton = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    program = export.export(function, platforms=platforms, disabled_checks=[triton])
    return program(*arguments).mlir_module()


@pytest.mark.backends("jax")
def test_an_exported_program_has_the_engine_of_its_platform():
    for platform, kernel, other in (
        ("tpu", "tpu_custom_call", "gpu.triton"),
        ("cuda", "gpu.triton", "tpu_custom_call"),
    ):
        program = exported([platform])
        assert kernel in program and other not in program and "stablehlo.while" not in program
    program = exported(["cpu"])
    assert "custom_call" not in program and "stablehlo.while" in program
    program = exported(["cpu", "tpu", "cuda"])
    for sign in ("tpu_custom_call", "gpu.triton", "stablehlo.while"):
        assert sign in program


@pytest.mark.backends("jax")
def test_half_precision_of_an_exported_program_is_that_of_its_platform():
    # float16 is not a dtype of kernels for TPUs, so products are XLA's there.
    products = [
        line for line in exported(["tpu"], "mixed_float16").splitlines() if "dot_general" in line
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
        product = jax.vmap(lambda rows, sizes: grouped_matmul(rows, kernels, sizes))
        outputs = jax.jit(product)(inputs, sizes)
    for output, *arguments in zip(outputs, inputs, sizes):
        assert_close(output, grouped_matmul(arguments[0], kernels, arguments[1]))


@pytest.mark.backends("jax")
def test_second_derivatives_are_those_of_a_cpu_on_other_platforms():
    import jax

    layer = moe(layers.GatedExperts(3, 16, use_bias=True), capacity_factor=1.0)
    layer.build((None, 8))
    weights = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]
    x = np.random.default_rng(0).normal(size=(9, 8)).astype("float32")

    def second_derivative(x):
        def loss(x):
            return keras_ops.sum(layer.stateless_call(weights, fixed, x)[0] ** 2)

        return jax.jvp(jax.grad(loss), (x,), (keras_ops.cos(x),))[1]

    expected = jax.jit(second_derivative)(x)
    with ops.platform("gpu"):
        assert_close(jax.jit(lambda x: second_derivative(x))(x), expected)


@pytest.mark.backends("jax")
def test_a_program_for_another_accelerator_than_it_was_traced_for_is_an_error():
    function, arguments = training_step()
    with ops.platform("tpu"):
        traced = function.trace(*arguments)
    with pytest.raises(NotImplementedError, match="traced for 'tpu' must be compiled for it"):
        traced.lower(lowering_platforms=("cuda",))
