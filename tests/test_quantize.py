"""Integers as kernels: how near, how small, what is saved."""

import keras
import numpy as np
import pytest
from conftest import FAST_MODE, assert_close, compiled, to_numpy
from layer_checks import normal

from keras_moe import layers, routers

# Keras asks each layer, and warns of those that cannot, such as its `InputLayer`.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")

D, H, E = 64, 128, 16
BANKS = {
    "gated": lambda **kwargs: layers.GatedExperts(E, H, **kwargs),
    "biased": lambda **kwargs: layers.FeedForwardExperts(E, H, **kwargs),
}


def model_of(bank):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((D,))
    return keras.Model(inputs, layers.MixtureOfExperts(bank)(inputs))


@pytest.fixture(params=BANKS)
def model(request):
    return model_of(BANKS[request.param]())


def bank_of(model):
    return model.layers[-1].experts


def test_outputs_stay_near_and_the_file_is_small(model, tmp_path):
    x = normal(64, D)
    exact = to_numpy(model(x))
    model.save(tmp_path / "float.keras")
    model.quantize("int8")
    assert bank_of(model).quantization_mode == "int8"
    near = to_numpy(model(x))
    # Keras holds its quantized `Dense` to a mean squared error of 1e-3.
    assert np.mean((near - exact) ** 2) < 1e-3 * np.mean(exact**2)
    model.save(tmp_path / "int8.keras")
    small, large = ((tmp_path / f"{kind}.keras").stat().st_size for kind in ("int8", "float"))
    assert small < 0.3 * large
    loaded = keras.saving.load_model(tmp_path / "int8.keras")
    assert_close(to_numpy(loaded(x)), near)


def test_integers_are_the_nearest_of_each_expert(model):
    bank = bank_of(model)
    kernel = to_numpy(bank.down_kernel)
    bank.quantize("int8")
    values, scale = to_numpy((bank.down_kernel, bank.down_scale))
    assert values.dtype == "int8" and scale.shape == (E, 1, D)
    assert np.all(np.abs(values * scale - kernel) <= 0.5001 * scale)


def test_lora_trains_on_integers(model, tmp_path):
    x, y = normal(16, D), normal(16, D)
    model.quantize("int8")
    before = to_numpy(model(x))
    bank_of(model).enable_lora(2)
    assert_close(to_numpy(model(x)), before)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    first, last = model.fit(x, y, epochs=5, verbose=0).history["loss"][::4]
    assert last < first
    outputs = to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    # Integers are rounded again after the correction is added.
    assert_close(to_numpy(loaded(x)), outputs, tolerance=0.05)


def test_a_bank_is_built_quantized_by_its_policy():
    bank = layers.GatedExperts(E, H, dtype="int8_from_float32")
    layer = layers.MixtureOfExperts(bank, routers.TopKRouter(E))
    outputs = compiled(layer, FAST_MODE)(normal(4, D))
    assert keras.backend.standardize_dtype(bank.up_kernel.dtype) == "int8"
    assert not np.any(outputs)  # until weights are loaded


def test_other_modes_say_what_there_is():
    bank = layers.GatedExperts(E, H)
    bank.build((None, D))
    with pytest.raises(NotImplementedError, match="int8"):
        bank.quantize("float8")


def test_shared_experts_are_quantized_saved_and_loaded(tmp_path):
    bank, shared = layers.GatedExperts(E, H), layers.GatedFeedForward(H)
    inputs = keras.Input((D,))
    layer = layers.MixtureOfExperts(bank, shared_expert=shared, gated_shared_expert=True)
    model = keras.Model(inputs, layer(inputs))
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = normal(8, D)
    assert_close(to_numpy(loaded(x)), to_numpy(model(x)))
