"""LoRA: frozen kernels, corrections of low rank, and what is saved of them."""

import keras
import numpy as np
import pytest
from backends import assert_close, on_one_backend, saved_and_loaded, to_numpy
from keras import ops
from layer_checks import D, normal

import keras_moe
from keras_moe import layers
from keras_moe.ops import platform

E, H, RANK = 4, 6, 2
BANKS = {
    "gated": lambda: layers.GatedExperts(E, H),
    "linear": lambda: layers.LinearExperts(E, D),
    "biased": lambda: layers.FeedForwardExperts(E, H),
}


def model_of(case):
    keras.utils.set_random_seed(0)
    layer = layers.MixtureOfExperts(BANKS[case](), name="moe")
    return keras.Sequential([keras.Input((D,)), layer])


def bank_of(model):
    return model.get_layer("moe").experts


def named(weights, ending):
    return [weight for weight in weights if weight.name.endswith(ending)]


@on_one_backend
@pytest.mark.parametrize("case", BANKS)
def test_only_factors_train_and_a_file_has_the_corrected_kernels(case, tmp_path):
    model, x = model_of(case), normal(8, D)
    before = to_numpy(model(x))
    corrected = named(bank_of(model).trainable_weights, "kernel")
    rest = {weight.path for weight in model.trainable_weights} - {w.path for w in corrected}
    bank_of(model).enable_lora(RANK, lora_alpha=6)
    assert_close(to_numpy(model(x)), before)
    factors = [weight for weight in model.trainable_weights if weight.path not in rest]
    size = sum(np.prod(each.shape[:-2]) * RANK * sum(each.shape[-2:]) for each in corrected)
    assert sum(np.prod(each.shape) for each in factors) == size
    kernels = [to_numpy(each.value) for each in corrected]
    model.compile("adam", "mse")
    model.fit(x, normal(8, D), epochs=2, verbose=0)
    for weight, kernel in zip(corrected, kernels):
        np.testing.assert_array_equal(to_numpy(weight.value), kernel)
    assert all(np.any(to_numpy(each.value)) for each in named(factors, "lora_b"))
    bank_of(model).lora_alpha = 12
    outputs = to_numpy(model(x))
    loaded = saved_and_loaded(model, tmp_path)
    assert_close(to_numpy(loaded(x)), outputs)
    assert bank_of(loaded).lora_rank == RANK
    ups = named(loaded.trainable_weights, "lora_b")
    assert len(ups) == len(corrected) and not any(np.any(to_numpy(each.value)) for each in ups)
    # The weights fit a model without LoRA.
    model.save_weights(tmp_path / "merged.weights.h5")
    plain = model_of(case)
    plain.load_weights(tmp_path / "merged.weights.h5")
    assert_close(to_numpy(plain(x)), outputs)
    keras_moe.merge_lora(model)
    assert not named(model.weights, ("lora_a", "lora_b"))
    assert {weight.path for weight in model.trainable_weights} == rest
    assert_close(to_numpy(model(x)), outputs)


@on_one_backend
def test_kernels_stay_frozen_when_a_model_is_thawed():
    model = model_of("gated")
    bank_of(model).enable_lora(RANK)
    trained_paths = [weight.path for weight in model.trainable_variables]
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert [weight.path for weight in model.trainable_variables] == trained_paths


def test_of_frozen_layers_the_factors_alone_train():
    model = model_of("gated")
    model.get_layer("moe").trainable = False
    bank_of(model).enable_lora(RANK)
    assert all("_lora_" in weight.name for weight in model.trainable_weights)
    assert len(model.trainable_weights) == 6
    keras_moe.merge_lora(model)
    assert not bank_of(model).trainable


@pytest.mark.backends("torch")
def test_factors_have_gradients_where_one_kernel_multiplies_all_groups():
    import torch

    bank = layers.GatedExperts(4, 8)
    layer, x = layers.MixtureOfExperts(bank), ops.convert_to_tensor(normal(16, 8))
    layer(x)
    bank.enable_lora(4, b_initializer="normal")
    values = [variable.value for variable in bank.trainable_variables]
    expected, actual = [], []
    for name, gradients in (("cpu", expected), ("gpu", actual)):
        with platform(name):
            gradients += torch.autograd.grad(ops.sum(layer(x) ** 2), values)
    for one, other in zip(expected, actual, strict=True):
        assert one.abs().max() > 0
        assert_close(other, one)
