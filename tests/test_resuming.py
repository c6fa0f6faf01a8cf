"""A training that is resumed from a file equals one that was never interrupted, bit for bit."""

import copy

import h5py
import keras
import numpy as np
import pytest
from backends import QUICK_JIT, on_each_backend, on_one_backend, saved_and_loaded
from layer_checks import CASES, D, E, array, configured, held_by_models, moe, normal

from keras_moe import callbacks, layers, losses, routers

pytestmark = on_one_backend

X, Y = normal(4, 3, D), normal(4, 3, D, seed=1)
SAVED_AFTER, EPOCHS = 2, 3
# Only callbacks read them, which keep readings of their own.
PASSING = ("value_totals",)


def compiled(*parts):
    """A model of residual branches, compiled."""
    x = inputs = keras.Input((3, D))
    for part in parts:
        x = keras.layers.add(
            [x, keras.ops.cast(part(keras.layers.LayerNormalization()(x)), "float32")]
        )
    model = keras.Model(inputs, x)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=QUICK_JIT)
    return model


def fit(model, first=0, **kwargs):
    kwargs.setdefault("epochs", EPOCHS)
    model.fit(X, Y, batch_size=4, shuffle=False, verbose=0, initial_epoch=first, **kwargs)
    return state(model)


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [(each.path, array(each)) for each in variables if each.name not in PASSING]


def assert_same(state, expected):
    for (path, value), (_, wanted) in zip(state, expected, strict=True):
        np.testing.assert_array_equal(value, wanted, err_msg=path)


def assert_resumes(model, folder, make_callback=None):
    """Train, and from what was saved on the way train on: as a file, and as weights alone."""

    def save(epoch, logs):
        if epoch + 1 == SAVED_AFTER:
            model.save(folder / "model.keras")
            model.save_weights(folder / "model.weights.h5")

    own = [] if make_callback is None else [make_callback()]
    expected = fit(model, callbacks=[*own, keras.callbacks.LambdaCallback(on_epoch_end=save)])
    loaded = keras.saving.load_model(folder / "model.keras")
    own = own and [make_callback()]
    assert_same(fit(loaded, SAVED_AFTER, callbacks=own), expected)
    model.load_weights(folder / "model.weights.h5")
    assert_same(fit(model, SAVED_AFTER, callbacks=own), expected)


def part(cls):
    instance = configured(cls)
    return CASES[cls].layer(instance)


@pytest.mark.filterwarnings("ignore:.*has no effect with a")
@pytest.mark.parametrize("module", ["layers", "losses", "routers"])
def test_every_class_resumes(module, tmp_path):
    keras.utils.set_random_seed(0)
    classes = [cls for cls in held_by_models() if cls.__module__.startswith(f"keras_moe.{module}")]
    assert len(classes) > 5
    assert_resumes(compiled(*map(part, classes)), tmp_path)


@on_each_backend
def test_every_kind_of_state_resumes(tmp_path):
    """Draws with and without a seed, biases, strengths, sums over batches, and a schedule."""
    keras.utils.set_random_seed(0)
    balancer = routers.LossFreeBias(accumulation_steps=2)
    seeded = routers.TopKRouter(balancer=balancer, logit_noise=0.1, seed=3)
    of_batches = losses.LoadBalance(scope="global", accumulation_steps=2)
    limit = layers.Capacity(1.0, priority="random")
    dropping = layers.FeedForwardExperts(E, 4, dropout=0.25)
    router_losses = ["load_balance", of_batches]
    parts = [moe(dropping, router=seeded, router_losses=router_losses, capacity_factor=limit)]
    if keras.backend.backend() == "torch":  # The others compile each for long.
        parts += [moe(router="noisy_top_k"), moe(router="relu")]
    assert_resumes(compiled(*parts), tmp_path, CALLBACKS["schedule"])


def test_routers_without_a_seed_resume(tmp_path):
    keras.utils.set_random_seed(0)
    noisy = ("noisy_top_k", "v_moe", "switch", "group_limited")
    assert_resumes(compiled(*(moe(router=name) for name in noisy)), tmp_path)


def test_a_bias_that_is_frozen_stays_frozen(tmp_path):
    router = routers.TopKRouter(E, balancer="loss_free")
    router.updates_selection_bias = False
    assert_resumes(compiled(moe(router=router)), tmp_path)
    assert not routers.TopKRouter.from_config(router.get_config()).updates_selection_bias


def weight_in(epoch):
    return 0.01 * (epoch + 1)


class ChangesWeight(keras.callbacks.Callback):
    """Changes the weight of a loss for good, once."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.layers[-2].set_router_loss_weight(0, 0.3)


CALLBACKS = {
    "schedule": lambda: callbacks.RouterLossSchedule(weight_in),
    "monitor": callbacks.ExpertMonitor,
    "health": lambda: callbacks.ExpertHealth(every=1),
    "weight set by hand": ChangesWeight,
}


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_training_with_a_callback_resumes(callback, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, D))
    model = keras.Model(inputs, keras.layers.Dense(D)(moe()(inputs)))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    assert_resumes(model, tmp_path, CALLBACKS[callback])


def test_every_callback_is_resumed_here():
    known = {type(make()) for make in CALLBACKS.values()}
    assert {getattr(callbacks, name) for name in callbacks.__all__} <= known


def raised(weight=0.3):
    model = keras.Sequential([keras.Input((D,)), moe(router_losses=[losses.LoadBalance(0.01)])])
    model.layers[-1].set_router_loss_weight(0, weight)
    return model


def test_a_weight_that_was_changed_is_loaded_where_the_constructors_are_the_same(tmp_path):
    loaded = saved_and_loaded(raised(), tmp_path)
    np.testing.assert_allclose(array(loaded.layers[-1].router_loss_weights), [0.3], rtol=1e-6)
    assert loaded.layers[-1].router_losses[0].weight == 0.01
    other = keras.Sequential([keras.Input((D,)), moe(router_losses=[losses.LoadBalance(0.5)])])
    raised().save_weights(tmp_path / "x.weights.h5")
    other.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_allclose(array(other.layers[-1].router_loss_weights), [0.5])


def test_files_without_these_entries_load(tmp_path):
    def model():
        router = routers.TopKRouter(E, logit_noise=0.1)
        losses_ = [losses.LoadBalance(scope="global"), "router_z"]
        return compiled(moe(router=router, router_losses=losses_, capacity_factor=1.0))

    old, new, path = model(), model(), tmp_path / "old.weights.h5"
    old.save_weights(path)
    with h5py.File(path, "r+") as file:
        entries = []
        file.visit(entries.append)
        added = [e for e in entries if e.rpartition("/")[2].startswith(("draws_", "router_loss_"))]
        assert len(added) == 2 + 2 + 2  # seeds, weights, and the two states of a loss
        for entry in added:
            del file[entry]
    new.load_weights(path)
    np.testing.assert_array_equal(array(new(X)), array(old(X)))


def sharing(kind):
    experts, router = layers.FeedForwardExperts(E, 4), routers.TopKRouter(E, logit_noise=0.1)
    dense, block = keras.layers.Dense(D), moe()
    if kind == "feedforward":
        return [layers.TransformerEncoderBlock(2, block) for _ in range(2)]
    if kind == "layers":
        return [moe(layers.LayerExperts([dense, keras.layers.Dense(D)])) for _ in range(2)]
    if kind == "bank of zeros":
        return [moe(layers.ZeroComputationExperts(experts, num_zero=1)) for _ in range(2)]
    shared = {
        "experts": {"experts": experts},
        "router": {"router": router},
        "both": {"experts": experts, "router": router},
        "shared_expert": {"shared_expert": dense},
    }
    return [moe(**shared[kind]) for _ in range(2)]


SHARED = ("experts", "router", "both", "shared_expert", "feedforward", "layers", "bank of zeros")


@pytest.mark.parametrize("kind", SHARED)
def test_layers_that_share_a_part_are_loaded_sharing_it(kind, tmp_path):
    keras.utils.set_random_seed(0)
    model = compiled(*sharing(kind))
    fit(model, epochs=1)
    loaded = saved_and_loaded(model, tmp_path)
    assert len(loaded.weights) == len(model.weights)
    assert_same(state(loaded), state(model))
    copied = copy.deepcopy(model)
    assert_same(state(copied), state(model))


@pytest.mark.parametrize("cls", [cls for cls in held_by_models() if issubclass(cls, keras.Layer)])
def test_a_layer_that_is_not_built_is_copied_and_saved(cls, tmp_path):
    layer = configured(cls)
    copied = copy.deepcopy(layer)
    assert type(copied) is cls and not copied.built
    with pytest.warns(UserWarning, match="not .*built"):
        model = saved_and_loaded(keras.Sequential([layer]), tmp_path)
    assert type(model.layers[0]) is cls


def test_a_weight_set_before_building_is_copied():
    layer = moe(router_losses=["load_balance"])
    layer.set_router_loss_weight(0, 0.25)
    copied = copy.deepcopy(layer)
    copied.build((None, D))
    assert array(copied.router_loss_weights).tolist() == [0.25]


def test_weights_for_a_layer_that_is_not_built_are_refused(tmp_path):
    raised().save_weights(tmp_path / "x.weights.h5")
    layer = moe(router_losses=[losses.LoadBalance(0.01)])
    with pytest.raises(ValueError, match="built"):
        keras.Sequential([layer]).load_weights(tmp_path / "x.weights.h5")
