"""LoRA: frozen kernels, corrections of low rank, and what is saved of them."""

import keras
import numpy as np
import pytest
from backends import assert_close, to_numpy
from layer_checks import D, array, normal

from keras_moe import layers, routers
from keras_moe.ops.grouped import padded, run

BACKEND = keras.backend.backend()

E, H, RANK = 4, 6, 2
BANKS = {
    "gated": lambda: layers.GatedExperts(E, H),
    "biased": lambda: layers.FeedForwardExperts(E, H),
}


def model_of(bank):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((D,))
    return keras.Model(inputs, layers.MixtureOfExperts(bank)(inputs))


def trained(model, epochs=2):
    model.compile("adam", "mse")
    model.fit(normal(8, D), normal(8, D), epochs=epochs, verbose=0)
    return model


@pytest.fixture(params=BANKS)
def model(request):
    return model_of(BANKS[request.param]())


def bank_of(model):
    return model.layers[-1].experts


def test_kernels_stay_frozen_when_a_model_is_thawed(model):
    bank = bank_of(model)
    bank.enable_lora(RANK)
    model.layers[-1].router.enable_lora(RANK)
    trained_paths = [weight.path for weight in model.trainable_variables]
    model.trainable = False
    assert not model.trainable_variables
    model.trainable = True
    assert [weight.path for weight in model.trainable_variables] == trained_paths


def test_nothing_changes_before_training_and_only_factors_after(model):
    bank, x = bank_of(model), array(normal(8, D))
    before = to_numpy(model(x))
    bank.enable_lora(RANK)
    assert_close(to_numpy(model(x)), before)
    kernels = {name: to_numpy(getattr(bank, f"{name}_kernel")) for name in bank._projections()}
    biases = E * (H + D) if bank.use_bias else 0
    factors = sum(E * RANK * (D + H) for _ in kernels)
    assert sum(np.prod(weight.shape) for weight in bank.trainable_variables) == factors + biases
    trained(model)
    for name, kernel in kernels.items():
        np.testing.assert_array_equal(to_numpy(getattr(bank, f"{name}_kernel")), kernel)
    assert np.any(to_numpy(bank.down_lora_b))


def test_outputs_are_those_of_corrected_kernels(model, tmp_path):
    bank, x = bank_of(model), array(normal(8, D))
    bank.enable_lora(RANK, lora_alpha=6)
    outputs = to_numpy(trained(model)(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(to_numpy(loaded(x)), outputs)
    assert bank_of(loaded).lora_rank == RANK and not np.any(to_numpy(bank_of(loaded).down_lora_b))
    # The weights fit a model without LoRA.
    model.save_weights(tmp_path / "merged.weights.h5")
    plain = model_of(type(bank).from_config({**bank.get_config(), "lora_rank": None}))
    plain.load_weights(tmp_path / "merged.weights.h5")
    assert_close(to_numpy(plain(x)), outputs)


def test_gradients_are_those_of_corrected_kernels(model):
    """One step of descent on the factors equals one computed from full kernels."""
    bank, x, y = bank_of(model), normal(8, D), normal(8, D)
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
    start = to_numpy(bank_of(full).down_kernel)
    for each in (model, full):
        each.compile(keras.optimizers.SGD(1.0), "mse")
        each.fit(x, y, batch_size=8, verbose=0)
    descent = start - to_numpy(bank_of(full).down_kernel)
    assert_close(a - to_numpy(bank.down_lora_a), descent @ np.swapaxes(b, 1, 2))
    assert_close(b - to_numpy(bank.down_lora_b), np.swapaxes(a, 1, 2) @ descent)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX counts what it compiles")
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


def test_errors_say_what_to_do():
    bank = layers.GatedExperts(E, H)
    with pytest.raises(ValueError, match="not yet built"):
        bank.enable_lora(RANK)
    bank.build((None, D))
    with pytest.raises(ValueError, match="positive integer"):
        bank.enable_lora(0)
    bank.enable_lora(RANK)
    with pytest.raises(ValueError, match="once"):
        bank.enable_lora(RANK)


ROUTERS = {
    "top_k": lambda: routers.TopKRouter(E, balancer="loss_free", use_bias=True, logit_noise=0.1),
    "cosine": lambda: routers.CosineRouter(E, projection_dim=5),
}


def routed_model(router):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((D,))
    layer = layers.MixtureOfExperts(layers.GatedExperts(E, H), router)
    return keras.Model(inputs, layer(inputs))


@pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)
def test_routers(make, tmp_path):
    """Only factors train, outputs are those of the corrected kernel, and a file has that kernel."""
    model, x = routed_model(make()), array(normal(8, D))
    before = to_numpy(model(x))
    router = model.layers[-1].router
    rest = sum(np.prod(each.shape) for each in router.trainable_variables if each.name != "kernel")
    router.enable_lora(RANK, lora_alpha=6)
    assert_close(to_numpy(model(x)), before)
    width = router.kernel.shape[1]
    assert (
        sum(np.prod(each.shape) for each in router.trainable_variables) == RANK * (D + width) + rest
    )
    kernel = to_numpy(router.kernel)
    outputs = to_numpy(trained(model)(x))
    np.testing.assert_array_equal(to_numpy(router.kernel), kernel)
    assert np.any(to_numpy(router.kernel_lora_b))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(to_numpy(loaded(x)), outputs)
    again = loaded.layers[-1].router
    assert again.lora_rank == RANK and not np.any(to_numpy(again.kernel_lora_b))
    model.save_weights(tmp_path / "merged.weights.h5")
    plain = routed_model(make())
    plain.load_weights(tmp_path / "merged.weights.h5")
    assert_close(to_numpy(plain(x)), outputs)


def test_a_router_without_products_says_so():
    router = routers.SoftRouter(E)
    router.build((None, D))
    with pytest.raises(NotImplementedError, match="SoftRouter"):
        router.enable_lora(RANK)
    assert not router.lora_enabled
