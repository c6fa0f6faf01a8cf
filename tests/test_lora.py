"""LoRA: frozen kernels, corrections of low rank, and what is saved of them."""

import keras
import numpy as np
import pytest
from backends import assert_close, on_one_backend, saved_and_loaded, to_numpy
from layer_checks import D, normal

import keras_moe
from keras_moe import layers, routers

E, H, RANK = 4, 6, 2
MODELS = {
    "gated, cosine": (
        lambda: layers.GatedExperts(E, H),
        lambda: routers.CosineRouter(E, projection_dim=5),
    ),
    "linear, dense": (lambda: layers.LinearExperts(E, D), lambda: routers.DenseRouter(E)),
    "biased, top-k": (
        lambda: layers.FeedForwardExperts(E, H),
        lambda: routers.TopKRouter(E, balancer="loss_free", use_bias=True, logit_noise=0.1),
    ),
}


def model_of(case):
    keras.utils.set_random_seed(0)
    make_bank, make_router = MODELS[case]
    layer = layers.MixtureOfExperts(make_bank(), make_router(), name="moe")
    return keras.Sequential([keras.Input((D,)), layer])


def parts(model):
    layer = model.get_layer("moe")
    return layer.experts, layer.router


def named(weights, ending):
    return [weight for weight in weights if weight.name.endswith(ending)]


@on_one_backend
@pytest.mark.parametrize("case", MODELS)
def test_only_factors_train_and_a_file_has_the_corrected_kernels(case, tmp_path):
    model, x = model_of(case), normal(8, D)
    before = to_numpy(model(x))
    corrected = named(model.trainable_weights, "kernel")
    rest = {weight.path for weight in model.trainable_weights} - {w.path for w in corrected}
    for part in parts(model):
        part.enable_lora(RANK, lora_alpha=6)
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
    for part in parts(model):
        part.lora_alpha = 12
    outputs = to_numpy(model(x))
    loaded = saved_and_loaded(model, tmp_path)
    assert_close(to_numpy(loaded(x)), outputs)
    assert all(part.lora_rank == RANK for part in parts(loaded))
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
    model = model_of("gated, cosine")
    for part in parts(model):
        part.enable_lora(RANK)
    trained_paths = [weight.path for weight in model.trainable_variables]
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert [weight.path for weight in model.trainable_variables] == trained_paths


@on_one_backend
def test_the_state_of_a_frozen_router_stays_as_it_is():
    router = routers.TopKRouter(E, balancer="loss_free")
    router(normal(6, D))
    router.trainable = False
    router.enable_lora(2)
    router(normal(6, D), training=True)
    assert not to_numpy(router.selection_bias).any()


def test_of_frozen_layers_the_factors_alone_train():
    model = model_of("gated, cosine")
    model.get_layer("moe").trainable = False
    parts(model)[0].enable_lora(RANK)
    assert all("_lora_" in weight.name for weight in model.trainable_weights)
    assert len(model.trainable_weights) == 6
    keras_moe.merge_lora(model)
    assert not parts(model)[0].trainable
