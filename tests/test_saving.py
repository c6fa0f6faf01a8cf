"""Saved models: what is saved under one backend is loaded under all three."""

import keras
import numpy as np
import pytest
from backends import BACKEND, ROOT, on_one_backend, run_python
from forced_router import ForcedRouter
from layer_checks import D, E, array, model_of, moe, normal

from keras_moe import layers, losses, routers

WIDE = keras.initializers.RandomNormal(stddev=2.0)
X = normal(9, D)
TOKENS = np.array([[3, 4, 5, 0, 0], [6, 7, 8, 2, 1]])

LOAD_AND_PREDICT = """
import sys
import keras, numpy as np
import keras_moe

model_path, tokens_path, outputs_path = sys.argv[1:]
# On JAX Keras saves `jit_compile=True`, with which PyTorch would compile for a minute.
model = keras.saving.load_model(model_path, compile=False)
np.save(outputs_path, model.predict(np.load(tokens_path), verbose=0))
"""


def model_with_everything():
    """A classifier of masked tokens with each bank, a shared expert and a capacity."""
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, D, mask_zero=True, embeddings_initializer=WIDE)(inputs)
    shared = keras.layers.Dense(D, "tanh")
    gated = moe(layers.GatedExperts(E, 4, use_bias=True), shared_expert=shared)
    x = layers.TransformerEncoderBlock(2, gated, dropout=0.1)(x)
    mixed = layers.LayerExperts(
        [
            keras.layers.Dense(D, "relu"),
            keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(D)]),
            keras.layers.BatchNormalization(),
        ]
    )
    x = moe(mixed, router=routers.TopKRouter(3, 3, kernel_initializer="he_normal"))(x)
    narrow = keras.layers.Dense(3)(x)
    x = moe(layers.LinearExperts(E, D), router=routers.TopKRouter(E, 1), capacity_factor=1.0)(
        x, router_inputs=narrow
    )
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, kernel_initializer=WIDE)(x))


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    model = model_with_everything()
    model.compile("adam", "mse")
    for number, weight in enumerate(model.trainable_weights):
        weight.assign_add(0.1 * normal(*weight.shape, seed=number))
    return model


def test_a_saved_model_predicts_the_same_under_another_backend(trained, tmp_path):
    # In a ring: each backend reads what another one wrote.
    other = {"tensorflow": "jax", "jax": "torch", "torch": "tensorflow"}[BACKEND]
    paths = [str(tmp_path / name) for name in ("model.keras", "tokens.npy", "outputs.npy")]
    trained.save(paths[0])
    np.save(paths[1], TOKENS)
    run_python("-c", LOAD_AND_PREDICT, *paths, KERAS_BACKEND=other)
    expected = trained.predict(TOKENS, verbose=0)
    assert np.abs(expected).max() > 0.1, "zeros would agree on anything"
    np.testing.assert_allclose(np.load(paths[2]), expected, rtol=1e-5, atol=1e-5)


FEED_FORWARD = dict(num_experts=E, hidden_dim=16, activation="relu", output_dim=5)


def dense_layers():
    return [keras.layers.Dense(5, "tanh") for _ in range(E)]


@pytest.mark.parametrize(
    "bank, first_guess",
    [
        (lambda: layers.FeedForwardExperts(**FEED_FORWARD), lambda: FEED_FORWARD),
        (lambda: layers.FeedForwardExperts(E, 16), lambda: dict(experts=E, hidden_dim=16)),
        (lambda: layers.LayerExperts(dense_layers()), lambda: dict(experts=dense_layers())),
    ],
    ids=["keywords", "integer", "list"],
)
def test_a_mixture_that_makes_its_bank_equals_one_that_is_given_it(bank, first_guess, tmp_path):
    def trained(arguments):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = model_of(layers.MixtureOfExperts(**arguments(), dtype="float32"))
        outputs = model(X).shape[-1]
        model.fit(X, normal(9, outputs), verbose=0)
        return model

    expected, model = trained(lambda: {"experts": bank()}), trained(first_guess)
    assert model.layers[0].get_config() == expected.layers[0].get_config()
    assert [each.path for each in model.weights] == [each.path for each in expected.weights]
    expected.save_weights(tmp_path / "bank.weights.h5")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.load_weights(tmp_path / "bank.weights.h5")
    np.testing.assert_array_equal(model.predict(X), expected.predict(X))
    np.testing.assert_array_equal(loaded.predict(X), expected.predict(X))


@on_one_backend
def test_weights_fit_a_layer_with_other_losses_and_leave_their_weights_alone(tmp_path):
    def model(router_losses):
        return keras.Sequential([keras.Input((5, D)), moe(router_losses=router_losses)])

    old = model([losses.LoadBalance(0.01), losses.LoadBalance(scope="global")])
    old.save_weights(tmp_path / "old.weights.h5")
    for router_losses, weights in (((), []), ([losses.LoadBalance(0.5)], [0.5])):
        new = model(router_losses)
        new.load_weights(tmp_path / "old.weights.h5")
        x = normal(2, 5, D)
        np.testing.assert_array_equal(array(new(x)), array(old(x)))
        assert array(new.layers[-1].router_loss_weights).tolist() == weights


@pytest.mark.backends("jax")  # on which Orbax saves
@pytest.mark.filterwarnings("ignore")  # of Orbax
def test_orbax_gives_the_experts_back(tmp_path):
    # Not a sequential model, whose name Keras leaves out of the paths when it loads it.
    inputs = keras.Input((D,))
    model = keras.Model(inputs, keras.layers.Dense(1)(moe()(inputs)))
    model.compile("adam", "mse")
    x = normal(8, D)
    saves = keras.callbacks.OrbaxCheckpoint(tmp_path / "run", save_weights_only=False)
    model.fit(x, x[:, :1], callbacks=[saves], verbose=0)
    loaded = keras.saving.load_model(tmp_path / "run")
    np.testing.assert_array_equal(array(loaded(x)), array(model(x)))


class SavedForcedRouter(ForcedRouter):
    """As it was in the package of version 0.2, for its tests."""

    def __init__(self, num_experts=None, top_k=2, pattern="round_robin", seed=None, **kwargs):
        super().__init__(num_experts, top_k, **kwargs)


SAVED = ROOT / "tests" / "saved"
NAMES = sorted(path.stem for path in SAVED.glob("*.keras"))


@on_one_backend
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:.*has no effect with a")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_saved_by_version_0_2_predicts_what_it_predicted(name):
    """Every bank, router and block, int8, int4 and LoRA, saved on PyTorch."""
    expected = np.load(SAVED / "expected.npz")
    with keras.saving.custom_object_scope({"keras_moe>ForcedRouter": SavedForcedRouter}):
        model = keras.saving.load_model(SAVED / f"{name}.keras", compile=False)
    inputs = [expected["x"], expected["ids"]] if name == "routers" else expected["x"]
    outputs = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(outputs, expected[name], rtol=1e-4, atol=1e-4)
