"""The layer inside `model.fit` and its relatives, as users write them."""

import functools

import keras
import numpy as np
import pytest
from backends import BACKEND, EVERY_JIT, QUICK_JIT, on_one_backend, unless_compiled
from layer_checks import D, E, SumOfTasks, array, moe, normal, one_hot, one_hot_router

from keras_moe import layers, losses, routers

# Few block sizes take less time to compile.
pytestmark = pytest.mark.usefixtures("small_tiles")
X, Y = normal(32, 3, D), normal(32, 3, D, seed=1)


def functional():
    inputs = keras.Input((None, D))
    return keras.Model(inputs, moe(name="moe")(inputs))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.moe = moe(name="moe")

    def call(self, inputs, training=None):
        return self.moe(inputs, training=training)


def compiled_model(model, optimizer=None, **kwargs):
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    model.compile(optimizer, "mse", jit_compile=kwargs.pop("jit_compile", EVERY_JIT[0]), **kwargs)
    return model


def test_a_model_trains_evaluates_and_predicts():
    keras.utils.set_random_seed(0)
    model = compiled_model(Subclassed(), keras.optimizers.Adam(0.01))
    x, y = X[:20], Y[:20]  # the last batch has four samples
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    predicted = model.predict(x, batch_size=8, verbose=0)
    assert predicted.shape == x.shape
    expected = np.mean((predicted - y) ** 2)
    evaluated = model.evaluate(x, y, batch_size=8, verbose=0)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-5)
    np.testing.assert_allclose(model.predict_on_batch(x[:8]), predicted[:8], rtol=1e-4, atol=1e-5)
    losses = [float(model.train_on_batch(x[:8], y[:8])) for _ in range(4)]
    assert losses[0] > losses[-1]


@on_one_backend
def test_router_losses_are_part_of_the_training_loss_and_not_of_the_validation_loss():
    model = compiled_model(functional(), keras.optimizers.SGD(0.0))
    x, y = X[:4], Y[:4]
    mean_square = np.mean((array(model(x)) - y) ** 2)
    layer = model.get_layer("moe")
    layer(x, training=True)
    added = sum(array(loss) for loss in layer.losses)
    assert added > 1e-2  # LoadBalance is at least its weight
    history = model.fit(x, y, validation_data=(x, y), verbose=0).history
    np.testing.assert_allclose(history["loss"], mean_square + added, rtol=1e-5)
    np.testing.assert_allclose(history["val_loss"], mean_square, rtol=1e-5)


@pytest.mark.backends("tensorflow")
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_the_end_of_data_of_unknown_length_is_no_step():
    import tensorflow as tf

    router = routers.TopKRouter(E, balancer=routers.LossFreeBias(accumulation_steps=3))
    global_loss = losses.LoadBalance(scope="global", accumulation_steps=2)
    layer = moe(router=router, router_losses=[global_loss, "load_balance"])
    model = compiled_model(keras.Sequential([layer]), jit_compile=False)
    batches = tf.data.Dataset.from_tensor_slices((X[:6], Y[:6])).batch(2).filter(lambda x, y: True)
    model.fit(batches, shuffle=False, verbose=0)
    assert layer.read_counts().numbers.tolist() == [3, 3, 3, 3]
    assert array(layer.loss_states[0][1]) == 3
    assert array(layer.router._measurements) == 0
    assert 1 <= layer.read_counts().means.losses[1] < E


@pytest.mark.parametrize(
    "policy", unless_compiled(["mixed_float16", "mixed_bfloat16"], ["mixed_float16"])
)
def test_many_steps_in_low_precision_stay_finite_and_learn(policy):
    keras.config.set_dtype_policy(policy)
    layer = moe(shared_expert=keras.layers.Dense(D))
    model = keras.Sequential([keras.Input((3, D)), layer, keras.layers.Dense(D)])
    compiled_model(model, keras.optimizers.Adam(0.01))
    x, y = np.tile(X, (10, 1, 1)), np.tile(Y, (10, 1, 1))
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(history).all() and history[1] < history[0]
    assert all(np.isfinite(array(weight)).all() for weight in model.weights)
    counts = array(layer.expert_counts)
    assert counts.sum() == 2 * x.shape[0] * x.shape[1] * 2, "of two epochs"


class CountTraces(keras.layers.Layer):
    """Counts how often Python runs its call."""

    traces = 0

    def call(self, inputs):
        self.traces += 1
        return inputs

    def compute_output_shape(self, inputs_shape):
        return inputs_shape


@pytest.mark.backends("tensorflow", "jax")  # PyTorch runs Python at every step
@pytest.mark.parametrize("jit_compile", EVERY_JIT)
def test_loads_that_change_from_step_to_step_compile_once(jit_compile):
    counter = CountTraces()
    bank = layers.FeedForwardExperts(E, 4)
    inputs = keras.Input((E,))
    outputs = moe(bank, router=one_hot_router())(counter(inputs))
    model = compiled_model(keras.Model(inputs, outputs), jit_compile=jit_compile)
    loads = [(0, 0, 0, 0), (0, 1, 2, 3), (3, 3, 1, 3), (2, 2, 2, 0), (1, 1, 1, 1), (0, 3, 0, 3)]
    batches = [one_hot(*load) for load in loads]
    before = counter.traces
    model.train_on_batch(batches[0], batches[0])
    first = counter.traces
    assert first > before
    for batch in batches[1:]:
        model.train_on_batch(batch, batch)
    assert counter.traces == first
    counts = array(model.layers[-1].expert_counts)
    np.testing.assert_array_equal(counts, np.bincount(np.ravel(loads), minlength=E))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("bank", [layers.FeedForwardExperts, layers.GatedExperts])
def test_xla_compiles_batches_of_sizes_not_known_while_it_traces(bank):
    model = keras.Sequential([keras.Input((D,)), moe(bank(E, 8)), keras.layers.Dense(2)])
    x = normal(100, D)
    model.compile("sgd", "mse", jit_compile=False)
    expected = model.predict(x, batch_size=40, verbose=0)
    model.compile("sgd", "mse", jit_compile=True)
    np.testing.assert_allclose(model.predict(x, batch_size=40, verbose=0), expected, atol=1e-5)
    assert np.isfinite(model.fit(x, x[:, :2], batch_size=40, verbose=0).history["loss"]).all()


@pytest.mark.backends("tensorflow", "torch")  # JAX has float64 where a flag turns it on
def test_router_losses_are_added_to_losses_of_float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        model = keras.Sequential([keras.Input((3, D)), moe(), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        losses = model.fit(X, Y[..., :1], verbose=0).history["loss"]
    finally:
        keras.config.set_floatx("float32")
    assert np.isfinite(losses).all()


def test_frozen_layers_as_experts_are_no_state():
    bank = layers.LayerExperts([keras.layers.Dense(D) for _ in range(E)])
    model = keras.Sequential([keras.Input((3, D)), moe(bank, name="moe")])
    outputs = array(model(X))
    bank.trainable = False
    assigned = []
    for variable in bank.variables:
        variable.assign = assigned.append
    np.testing.assert_allclose(array(model(X)), outputs, atol=1e-6)
    assert not assigned


@keras.saving.register_keras_serializable("tests")
class MeanLoad(routers.TopKRouter):
    """A user's router with a state: the mean load of all steps so far."""

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.mean = self.add_weight(
            name="mean", shape=(self.num_experts,), initializer="zeros", trainable=False
        )

    def update(self, routing):
        load = keras.ops.cast(routing.counts, "float32")
        self.mean.assign(0.5 * keras.ops.convert_to_tensor(self.mean) + 0.5 * load)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_the_state_of_each_router_moves_under_each_policy(policy):
    """In mixtures; and in a block, for many tasks, and where gradients compute a layer again."""
    keras.config.set_dtype_policy(policy)
    biased = functools.partial(routers.TopKRouter, balancer="loss_free")
    quantile = routers.GroupLimitedRouter(num_groups=2, balancer="quantile")
    accumulating = routers.TopKRouter(balancer=routers.LossFreeBias(accumulation_steps=2))
    made = [biased(), quantile, routers.ReLURouter(top_k=1), accumulating, MeanLoad()]
    parts = [moe(router=router) for router in made]
    if BACKEND == "torch":
        bank = layers.FeedForwardExperts(E, 16)
        parts.append(SumOfTasks(layers.MultiGateMixtureOfExperts(bank, 2, biased())))
        parts.append(layers.TransformerEncoderBlock(2, moe(router=biased())))
        with keras.RematScope("full"):
            parts.append(moe(router=biased()))
    model = compiled_model(keras.Sequential([keras.Input((3, D)), *parts]), jit_compile=QUICK_JIT)
    ends = "selection_bias", "strength", "mean"
    states = [each for each in model.non_trainable_variables if each.path.endswith(ends)]
    # An unfinished step of the optimizer is measured; the bias waits for its end.
    states = [each for each in states if each is not accumulating.selection_bias]
    states += [each for each in accumulating.weights if each.name == "measured"]
    before = list(map(array, states))
    model.train_on_batch(X, Y)  # A second step may take back what the first one changed.
    assert len(states) == (9 if BACKEND == "torch" else 5)
    assert not [each.path for each, old in zip(states, before) if (array(each) == old).all()]
