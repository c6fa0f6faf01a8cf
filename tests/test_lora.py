"""LoRA: frozen kernels, corrections of low rank, and what is saved of them."""

import keras
import numpy as np
import pytest
from backends import assert_close, to_numpy
from layer_checks import D, array, normal

from keras_moe import layers, routers
from keras_moe.ops.grouped import padded, run

E, H, RANK = 4, 6, 2
BANKS = {
    "gated": lambda: layers.GatedExperts(E, H),
    "biased": lambda: layers.FeedForwardExperts(E, H),
}
ROUTERS = {
    "top_k": lambda: routers.TopKRouter(E, balancer="loss_free", use_bias=True, logit_noise=0.1),
    "cosine": lambda: routers.CosineRouter(E, projection_dim=5),
}


def model_of(bank, router="top_k"):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((D,))
    return keras.Model(inputs, layers.MixtureOfExperts(bank, router)(inputs))


def of_bank(model):
    return model.layers[-1].experts


def of_router(model):
    return model.layers[-1].router


def size(weights):
    return sum(np.prod(weight.shape) for weight in weights)


PARTS = {
    "gated": (lambda: model_of(BANKS["gated"]()), of_bank, 3 * E * RANK * (D + H)),
    "biased": (lambda: model_of(BANKS["biased"]()), of_bank, 2 * E * RANK * (D + H)),
    "top_k": (lambda: model_of(BANKS["gated"](), ROUTERS["top_k"]()), of_router, RANK * (D + E)),
    "cosine": (lambda: model_of(BANKS["gated"](), ROUTERS["cosine"]()), of_router, RANK * (D + 5)),
}


@pytest.mark.parametrize("make, part, factors", PARTS.values(), ids=PARTS)
def test_only_factors_train_and_a_file_has_the_corrected_kernels(make, part, factors, tmp_path):
    model, x = make(), array(normal(8, D))
    before, adapted = to_numpy(model(x)), part(model)
    rest = [each for each in adapted.trainable_variables if not each.name.endswith("kernel")]
    adapted.enable_lora(RANK, lora_alpha=6)
    assert_close(to_numpy(model(x)), before)
    assert size(adapted.trainable_variables) == factors + size(rest)
    kernels = {w.path: to_numpy(w.value) for w in adapted.weights if w.name.endswith("kernel")}
    model.compile("adam", "mse")
    model.fit(x, normal(8, D), epochs=2, verbose=0)
    for weight in adapted.weights:
        if weight.path in kernels:
            np.testing.assert_array_equal(to_numpy(weight.value), kernels[weight.path])
        assert not weight.name.endswith("lora_b") or np.any(to_numpy(weight.value))
    outputs = to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(to_numpy(loaded(x)), outputs)
    assert part(loaded).lora_rank == RANK
    ups = [each for each in part(loaded).weights if each.name.endswith("lora_b")]
    assert ups and not any(np.any(to_numpy(each.value)) for each in ups)
    # The weights fit a model without LoRA.
    model.save_weights(tmp_path / "merged.weights.h5")
    plain = make()
    plain.load_weights(tmp_path / "merged.weights.h5")
    assert_close(to_numpy(plain(x)), outputs)


def test_kernels_stay_frozen_when_a_model_is_thawed():
    model = model_of(BANKS["gated"]())
    of_bank(model).enable_lora(RANK)
    of_router(model).enable_lora(RANK)
    trained_paths = [weight.path for weight in model.trainable_variables]
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert [weight.path for weight in model.trainable_variables] == trained_paths


@pytest.mark.parametrize("name", BANKS)
def test_gradients_are_those_of_corrected_kernels(name):
    """One step of descent on the factors equals one computed from full kernels."""
    model, x, y = model_of(BANKS[name]()), normal(8, D), normal(8, D)
    bank = of_bank(model)
    bank.enable_lora(RANK, b_initializer="ones")
    a, b = (to_numpy(weight) for weight in bank._factors_of("down"))
    full = model_of(type(bank).from_config({**bank.get_config(), "lora_rank": None}))
    full.set_weights(
        [
            bank.merged_kernel(weight.name[:-7])
            if weight.name.endswith("_kernel")
            else to_numpy(weight)
            for weight in full.weights
            for weight in [next(w for w in model.weights if w.path.split("/")[-1] == weight.name)]
        ]
    )
    start = to_numpy(of_bank(full).down_kernel)
    for each in (model, full):
        each.compile(keras.optimizers.SGD(1.0), "mse")
        each.fit(x, y, batch_size=8, verbose=0)
    descent = start - to_numpy(of_bank(full).down_kernel)
    assert_close(a - to_numpy(bank.down_lora_a), descent @ np.swapaxes(b, 1, 2))
    assert_close(b - to_numpy(bank.down_lora_b), np.swapaxes(a, 1, 2) @ descent)


@pytest.mark.backends("jax")  # which counts what it compiles
def test_a_step_computes_less_than_without(monkeypatch):
    import jax

    # Without a loop, whose trips are not counted.
    monkeypatch.setattr(run, "choose", lambda setting: padded)

    def flops(lora):
        layer = layers.MixtureOfExperts(layers.GatedExperts(E, 64))
        layer.build((None, 32))
        if lora:
            layer.experts.enable_lora(RANK)
        frozen = [variable.value for variable in layer.non_trainable_variables]

        def loss(trained, x):
            return keras.ops.sum(layer.stateless_call(trained, frozen, x)[0] ** 2)

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        trained = [variable.value for variable in layer.trainable_variables]
        return step.lower(trained, normal(128, 32)).compile().cost_analysis()["flops"]

    assert flops(lora=True) < flops(lora=False)


def test_a_router_without_products_says_so():
    router = routers.SoftRouter(E)
    router.build((None, D))
    with pytest.raises(NotImplementedError, match="SoftRouter"):
        router.enable_lora(RANK)
    assert not router.lora_enabled
