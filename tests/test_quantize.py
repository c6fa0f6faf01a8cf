"""Integers as kernels: how near, how small, what is saved."""

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    QUICK_JIT,
    assert_close,
    compiled,
    gradients,
    on_one_backend,
    saved_and_loaded,
    to_numpy,
    unless_compiled,
)
from layer_checks import normal

from keras_moe import layers, routers
from keras_moe.backend import tiles

# Keras asks each layer, and warns of those that cannot: 3.15 of its `InputLayer`, 3.16 of layers
# that hold others.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method"),
    pytest.mark.filterwarnings("ignore:.*they do not support quantization"),
]

D, H, E = 64, 127, 16
BANKS = {
    "gated": lambda **kwargs: layers.GatedExperts(E, H, **kwargs),
    "biased": lambda **kwargs: layers.FeedForwardExperts(E, H, **kwargs),
    "linear": lambda **kwargs: layers.LinearExperts(E, D, **kwargs),
}


def model_of(bank):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((D,))
    shared = layers.GatedFeedForward(16) if isinstance(bank, layers.GatedExperts) else None
    layer = layers.MixtureOfExperts(bank, shared_expert=shared, gated_shared_expert=bool(shared))
    return keras.Model(inputs, layer(inputs))


def quantize(model, mode, block_size):
    config = None
    if mode == "int4":
        config = keras.quantizers.Int4QuantizationConfig(block_size=block_size)
    model.quantize(mode, config)


@pytest.fixture(params=unless_compiled(BANKS, ["gated"]))
def model(request):
    return model_of(BANKS[request.param]())


def bank_of(model):
    return model.layers[-1].experts


# Keras holds its quantized `Dense` to a mean squared error of 1e-3, with "int4" of 2e-3, of outputs
# that are about 1.
@on_one_backend
@pytest.mark.parametrize(
    ("mode", "block_size", "error", "size"),
    unless_compiled(
        [("int8", None, 1e-3, 0.3), ("int4", 24, 0.03, 0.25)]
        + [("int4", 128, 0.05, 0.2), ("int4", None, 0.05, 0.2)],
        [("int8", None, 1e-3, 0.3), ("int4", 24, 0.03, 0.25)],
    ),
)
def test_outputs_stay_near_and_the_file_is_small(model, tmp_path, mode, block_size, error, size):
    x = normal(64, D)
    exact = to_numpy(model(x))
    model.save(tmp_path / "float.keras")
    quantize(model, mode, block_size)
    assert bank_of(model).quantization_mode == mode
    near = to_numpy(model(x))
    assert np.mean((near - exact) ** 2) < error * np.mean(exact**2)
    model.save(tmp_path / "small.keras")
    small, large = ((tmp_path / f"{kind}.keras").stat().st_size for kind in ("small", "float"))
    if not isinstance(bank_of(model), layers.LinearExperts):  # too few weights to show
        assert small < size * large
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    assert_close(to_numpy(loaded(x)), near)


@on_one_backend
def test_integers_are_the_nearest_of_each_expert(model):
    bank = bank_of(model)
    last = bank.projections[-1]
    kernel = to_numpy(last.kernel)
    bank.quantize("int8")
    values, scale = to_numpy((last.kernel, last.scale))
    assert values.dtype == "int8" and scale.shape == (E, 1, D)
    assert np.all(np.abs(values * scale - kernel) <= 0.5001 * scale)


STORED = [("int8", None), ("int4", None), ("int4", 24)]


@pytest.mark.parametrize("block", [2**10, 2**20] if BACKEND == "torch" else [None])
@pytest.mark.parametrize(("mode", "block_size"), unless_compiled(STORED, STORED[::2]))
def test_outputs_and_gradients_are_those_of_the_integers_as_floats(
    model, mode, block_size, block, monkeypatch
):
    if BACKEND == "torch":
        monkeypatch.setattr("keras_moe.backend.torch_groups.CPU_CHUNK_VALUES", block)
    bank, x = bank_of(model), normal(64, D)
    config = keras.quantizers.Int4QuantizationConfig(block_size=block_size)
    bank.quantize(mode, config=config if mode == "int4" else None)
    width = D if isinstance(bank, layers.LinearExperts) else H
    floats = model_of(type(bank)(E, width))  # with the same router
    for projection in bank.projections:
        name = f"{projection.name}_kernel"
        getattr(bank_of(floats), name).assign(projection.merged_kernel())

    def loss_of(model):
        return lambda x: keras.ops.sum(keras.ops.square(model(x)))

    (actual,), (expected,) = (gradients(loss_of(each), [x]) for each in (model, floats))
    assert_close(to_numpy(model(x)), to_numpy(floats(x)))
    assert_close(actual, expected)


@on_one_backend
@pytest.mark.parametrize("block_size", [24, 128, None])
def test_kernels_are_those_of_dense_in_int4(block_size):
    """Also with an odd width, and rows that fill no whole number of groups."""
    keras.utils.set_random_seed(0)
    bank = layers.FeedForwardExperts(2, 7)
    bank.build((None, D))
    kernel = to_numpy(bank.up_kernel)
    config = keras.quantizers.Int4QuantizationConfig(block_size=block_size)
    bank.quantize("int4", config=config)
    for of_expert, near in zip(kernel, bank.projection("up").merged_kernel()):
        dense = keras.layers.Dense(7, use_bias=False)
        dense.build((None, D))
        dense.kernel.assign(of_expert)
        dense.quantize("int4", config=config)
        assert_close(near, to_numpy(dense(np.eye(D, dtype="float32"))))


@on_one_backend
def test_a_bank_alone_is_quantized_as_keras_quantizes_a_layer():
    bank = layers.GatedExperts(2, 7)
    with pytest.raises(ValueError, match="isn't yet built"):
        bank.quantize("int8")
    bank.build((None, 2 * 128))
    bank.quantize("int4")
    assert bank.up_scale.shape == (2, 2, 7), "the default block of Keras has 128 rows"
    with pytest.raises(ValueError, match="already quantized"):
        bank.quantize("int8")
    other = layers.GatedExperts(2, 7)
    other.build((None, 128))
    other.quantize(config=keras.quantizers.Int4QuantizationConfig(block_size=-1))
    assert other.up_scale.shape == (2, 1, 7)


@on_one_backend
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_lora_trains_on_integers(model, tmp_path, mode):
    x, y = normal(16, D), normal(16, D)
    model.quantize(mode)
    before = to_numpy(model(x))
    bank_of(model).enable_lora(2)
    assert_close(to_numpy(model(x)), before)
    is_gated = isinstance(bank_of(model), layers.GatedExperts)
    jit_compile = "auto" if is_gated else QUICK_JIT
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    first, last = model.fit(x, y, epochs=5, verbose=0).history["loss"][::4]
    assert last < first
    outputs = to_numpy(model(x))
    loaded = saved_and_loaded(model, tmp_path)
    # Integers are rounded again after the correction is added.
    assert_close(to_numpy(loaded(x)), outputs, tolerance=0.05 if mode == "int8" else 0.5)


POLICIES = {
    "int8": lambda: "int8_from_float32",
    "int4": lambda: "int4/24_from_float32",
    "map": lambda: keras.dtype_policies.DTypePolicyMap(
        "float32", {".*gated_experts.*": keras.dtype_policies.get("int8_from_float32")}
    ),
}


@on_one_backend
@pytest.mark.parametrize("is_of_layer", [True, False], ids=["layer", "bank"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_bank_is_built_quantized_by_a_policy(name, is_of_layer, tmp_path):
    of_layer, of_bank = (POLICIES[name](), None)[:: 1 if is_of_layer else -1]
    bank = layers.GatedExperts(E, H, dtype=of_bank)
    layer = layers.MixtureOfExperts(
        bank,
        routers.TopKRouter(E),
        shared_expert=layers.GatedFeedForward(H),
        gated_shared_expert=True,
        dtype=of_layer,
    )
    inputs = keras.Input((D,))
    model = keras.Model(inputs, layer(inputs))
    assert keras.backend.standardize_dtype(bank.up_kernel.dtype) == "int8"
    assert bank.quantization_mode == ("int4" if name == "int4" else "int8")
    assert keras.backend.standardize_dtype(layer.shared_gate.kernel.dtype) == "float32"
    x = normal(4, D)
    bank.down_kernel.assign(np.full(bank.down_kernel.shape, 3, "int8"))
    loaded = saved_and_loaded(model, tmp_path)
    again = loaded.layers[-1].experts
    assert again.quantization_mode == bank.quantization_mode
    np.testing.assert_array_equal(to_numpy(again.down_kernel), to_numpy(bank.down_kernel))
    assert_close(to_numpy(loaded(x)), to_numpy(model(x)))


@on_one_backend
def test_a_bank_with_a_policy_of_its_own_keeps_it():
    bank = layers.GatedExperts(E, H, dtype="float32")
    layers.MixtureOfExperts(bank, dtype="int8_from_float32").build((None, D))
    assert bank.quantization_mode is None


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("block", [1, 5, D])
def test_kernels_that_are_converted_in_blocks_give_the_same_product(block, monkeypatch):
    layer = layers.MixtureOfExperts(layers.GatedExperts(E, H, use_bias=True))
    layer.build((None, D))
    layer.experts.quantize("int8")
    tokens = normal(7, D)
    expected = to_numpy(layer(tokens))
    monkeypatch.setattr(tiles, "BLOCK_ENTRIES", block * H)
    assert_close(compiled(layer, "graph")(tokens), expected)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_program_for_batches_of_any_size_computes_few_and_many_rows(mode):
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layer = layers.MixtureOfExperts(layers.GatedExperts(3, 16))
    layer.build((None, D))
    layer.experts.quantize(mode)
    layer.experts.enable_lora(2)
    for variable in layer.experts.trainable_variables:
        variable.assign(normal(*variable.shape))

    def outputs_and_gradients(tokens):
        variables = [variable.value for variable in layer.experts.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(tokens)
            outputs = layer(tokens)
            loss = tf.reduce_sum(tf.sin(outputs / 100))  # of some hundred
        return outputs, tape.gradient(loss, [tokens, *variables])

    any_size = [tf.TensorSpec((None, D))]
    program = tf.function(outputs_and_gradients, input_signature=any_size)
    for num_tokens in (0, 3, 100):
        tokens = tf.constant(normal(num_tokens, D))
        pairs = zip(*map(keras.tree.flatten, (program(tokens), outputs_and_gradients(tokens))))
        for actual, expected in pairs:
            assert_close(actual, expected)


@on_one_backend
@pytest.mark.parametrize("path", ["", "gated_experts"])
def test_a_map_of_policies_reaches_a_bank_inside_of_another(path):
    int8 = keras.dtype_policies.get("int8_from_float32")
    policies = keras.dtype_policies.DTypePolicyMap("bfloat16", {f".*{path}.*": int8})
    bank = layers.ZeroComputationExperts(layers.GatedExperts(E - 1, H), num_constant=1)
    layer = layers.MixtureOfExperts(bank, routers.TopKRouter(E), dtype=policies)
    assert layer(normal(4, D)).shape == (4, D)
    assert bank.experts.quantization_mode == "int8"
