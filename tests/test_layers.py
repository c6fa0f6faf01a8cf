"""What the layers do with shapes, masks, losses, dtypes and any layer as expert."""

import re

import keras
import numpy as np
import pytest
from backends import BACKEND, EVERY_JIT, QUICK_JIT, on_one_backend, unless_compiled
from backends import compiled as compile_in
from layer_checks import D, E, array, gradients, model_of, moe, normal, one_hot, one_hot_router

import keras_moe
from keras_moe import layers, routers

# XLA of TensorFlow, which computes as JAX does, compiles the first test only.
compiled = pytest.mark.parametrize("jit_compile", EVERY_JIT[:1])


def fit_once(layer, x, jit_compile):
    """One training step with a learning rate of 0; the loss it reports."""
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    history = model.fit(x, np.zeros_like(x), batch_size=len(x), verbose=0)
    return history.history["loss"][0]


class OnlyACall(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(D)

    def call(self, inputs):
        return self.dense(inputs)


EMPTY = {
    "layers": lambda: moe(layers.LayerExperts([keras.layers.Dense(D) for _ in range(3)])),
    "convolutions": lambda: moe(
        layers.LayerExperts([keras.layers.Conv1D(D, 3, padding="same") for _ in range(3)]),
        token_axes=1,
    ),
    "float16": lambda: moe(layers.FeedForwardExperts(E, 4), dtype="mixed_float16"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_has_an_empty_output(name, mode):
    shape = (0, 5, D) if name == "convolutions" else (0, D)
    layer = EMPTY[name]()
    layer.build((None, *shape[1:]))
    call = compile_in(lambda x: layer(x, training=mode == "eager"), mode)
    assert call(np.zeros(shape, "float32")).shape == shape
    x = np.zeros(shape, "float32")
    assert gradients(layer, x, mode, training=True)["inputs"].shape == shape


@on_one_backend
@pytest.mark.parametrize("shared", [lambda: keras.layers.Dense(D), OnlyACall])
@pytest.mark.parametrize("shape", [(0, D), (2, 0, D)])
def test_a_shared_expert_is_built_by_an_empty_batch(shared, shape):
    layer = moe(shared_expert=shared())
    assert layer(np.zeros(shape, "float32")).shape == shape
    assert layer(normal(3, 2, D)).shape == (3, 2, D)


@on_one_backend
def test_a_shared_expert_is_told_of_the_padding():
    x, mask = normal(2, 3, D), np.array([[True] * 3, [True, False, False]])
    layer = moe(shared_expert=keras.layers.BatchNormalization(), router_losses=())
    short = moe(layer.experts, router=layer.router, shared_expert=layer.shared_expert)
    padded = array(layer(x, mask=mask, training=True))
    alone = array(short(x[mask][None], training=True))[0]
    np.testing.assert_allclose(padded[mask], alone, rtol=1e-4, atol=1e-5)
    assert not padded[~mask].any()


class Customary(keras.layers.Layer):
    """As most users write a layer: sublayers in `__init__`, and nothing but `call`."""

    def __init__(self, units):
        super().__init__()
        self.hidden = keras.layers.Dense(16, "relu")
        self.out = keras.layers.Dense(units)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


@pytest.mark.backends("jax", "torch")
@pytest.mark.parametrize("is_functional", unless_compiled([True, False], [False]))
def test_layers_that_only_have_a_call_are_built_and_trained(is_functional):
    hosts = [
        moe(layers.LayerExperts([Customary(D) for _ in range(E)])),
        moe(shared_expert=Customary(D)),
        layers.TransformerEncoderBlock(2, Customary(D)),
    ]
    model = keras.Sequential([keras.Input((3, D))] * is_functional + hosts)
    model.compile("adam", "mse", jit_compile=QUICK_JIT)
    model.fit(normal(4, 3, D), normal(4, 3, D), verbose=0)
    for host in hosts:
        assert host.compute_output_shape((4, 3, D)) == (4, 3, D)
        assert any("hidden" in weight.path or "dense" in weight.path for weight in host.weights)


def heterogeneous_experts():
    inputs = keras.Input((D,))
    return layers.LayerExperts(
        [
            keras.layers.Dense(D, "tanh"),
            keras.Sequential([keras.layers.Dense(5, "relu"), keras.layers.Dense(D)]),
            keras.Model(inputs, inputs + keras.layers.Dense(D)(inputs)),
            keras.layers.Rescaling(2.0),
        ]
    )


@pytest.mark.parametrize("jit_compile", EVERY_JIT)
def test_experts_may_be_any_layers_and_learn(jit_compile):
    bank = heterogeneous_experts()
    layer = moe(bank, router=one_hot_router(), router_losses=())
    x = normal(7, E) + 5 * one_hot(0, 1, 2, 3, 3, 2, 0)
    x = np.concatenate([x, normal(7, D - E, seed=1)], axis=1)
    inputs = keras.Input((D,))
    outputs, routing = layer(inputs, return_routing=True)
    model = keras.Model(inputs, [outputs, routing.indices, routing.weights])
    model.compile(jit_compile=jit_compile)
    outputs, indices, weights = model.predict(x, verbose=0)
    for token, expert, weight, output in zip(x, indices[:, 0], weights[:, 0], outputs):
        expected = weight * array(bank.layers[expert](token[None]))[0]
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    model = keras.Sequential([inputs, layer])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile)
    before = [array(weight) for weight in bank.trainable_weights]
    loss = model.fit(x, normal(7, D, seed=2), epochs=3, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    for weight, value in zip(bank.trainable_weights, before):
        assert (array(weight) != value).any(), weight.path


@on_one_backend
@compiled
def test_mixtures_inside_of_experts_count_and_balance_their_own_tokens(jit_compile):
    inner = layers.MixtureOfExperts(layers.FeedForwardExperts(2, 4), "switch", ["load_balance"])
    bank = layers.LayerExperts([keras.Sequential([inner]), keras.layers.Dense(D)])
    layer = moe(bank, router=routers.TopKRouter(top_k=1), router_losses=())
    fit_once(layer, normal(20, D), jit_compile)
    assert array(inner.expert_counts).sum() == array(layer.expert_counts)[0] > 0


class WithMetric(keras.layers.Dense):
    def __init__(self):
        super().__init__(D)
        self.metric = keras.metrics.Sum(name="seen")

    def call(self, inputs):
        self.metric.update_state(keras.ops.ones(()))
        return super().call(inputs)


@pytest.mark.backends("tensorflow", "torch")  # on JAX Keras itself fails with such a layer
@pytest.mark.parametrize(
    "host",
    [
        lambda: moe(shared_expert=WithMetric()),
        lambda: layers.TransformerEncoderBlock(2, WithMetric()),
        lambda: moe(layers.LayerExperts([WithMetric()]), router=routers.TopKRouter(top_k=1)),
    ],
)
def test_metrics_of_a_layer_inside_are_updated(host):
    model = model_of(host(), shape=(3, D), jit_compile=False)
    history = model.fit(normal(4, 3, D), normal(4, 3, D), batch_size=2, verbose=0).history
    assert history["seen"] == [2.0]


@on_one_backend
def test_a_layer_inside_may_write_its_own_kernel():
    normalized = keras.layers.SpectralNormalization(keras.layers.Dense(D), power_iterations=20)
    layer = moe(shared_expert=normalized)
    layer(normal(4, D), training=True)
    assert abs(np.linalg.norm(array(normalized.layer.kernel), 2) - 1) < 0.05
    experts = layers.LayerExperts([keras.layers.SpectralNormalization(keras.layers.Dense(D))])
    with pytest.raises(ValueError, match="must not write its trainable weights in a call"):
        moe(experts, router=routers.TopKRouter(top_k=1))(normal(4, D), training=True)


@on_one_backend
@compiled
def test_experts_that_were_alike_may_become_different(jit_compile):
    dense = [keras.layers.Dense(D) for _ in range(2)]
    layer = moe(layers.LayerExperts(dense), router=routers.TopKRouter(top_k=1))
    model = keras.Sequential([keras.Input((D,)), layer])
    dense[0].enable_lora(2)
    dense[1].activation = keras.activations.relu
    model.compile(jit_compile=jit_compile)
    x = normal(8, D)
    with keras_moe.ops.platform("gpu"):
        outputs = model.predict(x, verbose=0)
    routing = layer(x, return_routing=True)[1]
    chosen, weights = array(routing.indices)[:, 0], array(routing.weights)
    expected = np.stack([array(dense[e](token[None]))[0] for e, token in zip(chosen, x)])
    np.testing.assert_allclose(outputs, weights * expected, rtol=1e-5, atol=1e-5)


@compiled
def test_dropout_inside_an_expert_drops_in_training_only(jit_compile):
    bank = layers.LayerExperts([keras.layers.Dropout(0.5, seed=e) for e in range(E)])
    layer = moe(bank, router_losses=())
    x = np.ones((64, D), "float32")
    np.testing.assert_allclose(array(layer(x)), x, rtol=1e-6)
    seeds = [array(variable) for variable in bank.non_trainable_variables]
    loss = fit_once(layer, x, jit_compile)
    assert loss > 1.2, "the mean square of dropped ones is above 1"
    moved = [(array(v) != s).any() for v, s in zip(bank.non_trainable_variables, seeds)]
    assert any(moved), "a seed that stands still repeats its noise"


@on_one_backend
@pytest.mark.parametrize("bank", [layers.FeedForwardExperts, layers.GatedExperts])
def test_dropout_of_a_bank_scales_what_stays(bank):
    ones = {"activation": None, "kernel_initializer": "ones", "use_bias": False}
    x, layer = np.ones((8, D), "float32"), moe(bank(E, 512, dropout=0.25, **ones))
    whole = array(layer(x))
    kept = array(layer(x, training=True)) / whole * 0.75
    assert len(set(kept[:, 0])) > 1 and np.abs(kept - 0.75).max() < 0.12  # six deviations
    without = moe(bank(E, 512, **ones))
    np.testing.assert_allclose(array(without(x, training=True)), whole, rtol=1e-6)


def _drops():
    return keras.Sequential([keras.layers.Dense(D), keras.layers.Dropout(0.5)])


DROPS = {
    "bank": lambda: moe(layers.FeedForwardExperts(E, 64, dropout=0.5)),
    "layers": lambda: moe(layers.LayerExperts([_drops() for _ in range(E)])),
    "different layers": lambda: moe(layers.LayerExperts([_drops(), keras.layers.Dense(D)])),
    "shared": lambda: moe(shared_expert=_drops()),
    "zero": lambda: moe(
        layers.ZeroComputationExperts(layers.FeedForwardExperts(E, 64, dropout=0.5), 1)
    ),
    "tasks": lambda: layers.MultiGateMixtureOfExperts(
        layers.FeedForwardExperts(E, 64, dropout=0.5), 2, routers.DenseRouter()
    ),
    "tasks of layers": lambda: layers.MultiGateMixtureOfExperts(
        layers.LayerExperts([_drops(), keras.layers.Dense(D)]), 2, routers.DenseRouter()
    ),
}


@pytest.mark.backends("jax", "torch")
@pytest.mark.parametrize("name", DROPS)
def test_a_stateless_call_trains_the_layers_inside(name):
    # Keras calls `call` there, outside of the context that tells layers of training.
    layer, x = DROPS[name](), normal(16, D)
    layer.build(x.shape)
    variables = layer.trainable_variables, layer.non_trainable_variables
    values = [[variable.value for variable in each] for each in variables]

    def outputs(**kwargs):
        returned = layer.stateless_call(*values, x, return_losses=True, **kwargs)[0]
        return array(returned[0] if isinstance(returned, list) else returned)

    np.testing.assert_array_equal(outputs(training=False), outputs())
    assert (outputs(training=True) != outputs()).any()


@compiled
def test_batch_normalization_inside_an_expert_updates_the_state_of_used_experts_only(jit_compile):
    # One name for all: states are told apart by object, not by path.
    norms = [keras.layers.BatchNormalization(momentum=0.5, name="norm") for _ in range(E)]
    layer = moe(layers.LayerExperts(norms), router=one_hot_router(), router_losses=())
    x = np.repeat(one_hot(0, 2, 2, 2), 64, axis=0)  # whole blocks, so that no zeros are seen
    loss = fit_once(layer, x, jit_compile)
    assert np.isfinite(loss)
    means = np.stack([array(norm.moving_mean) for norm in norms])
    # Compiled, expert 2 is called once a block, three times.
    shares = [0.5, 0.0, 0.875 if jit_compile else 0.5, 0.0]
    np.testing.assert_allclose(means, np.diag(shares), rtol=1e-6)
    for expert in (1, 3):
        np.testing.assert_array_equal(array(norms[expert].moving_variance), np.ones(E))


@compiled
def test_experts_without_a_derivative_at_zero_are_trained(jit_compile):
    def unit(x):
        return x / keras.ops.norm(x, axis=-1, keepdims=True)

    experts = [
        keras.Sequential([keras.layers.Dense(D, "tanh"), keras.layers.Lambda(unit)])
        for _ in range(E)
    ]
    layer = moe(layers.LayerExperts(experts), router=one_hot_router())  # two of them are idle
    model = model_of(layer, shape=(E,), jit_compile=jit_compile)
    model.fit(one_hot(0, 2, 2), normal(3, D), verbose=0)
    assert all(np.isfinite(array(weight)).all() for weight in layer.weights)


@compiled
def test_losses_of_weights_and_activations_inside_an_expert_count_once(jit_compile):
    options = {"kernel_initializer": "identity", "use_bias": False, "kernel_regularizer": "l2"}
    experts = [
        keras.layers.Dense(E, **options, activity_regularizer=keras.regularizers.L1(1.0))
        for _ in range(E)
    ]
    layer = moe(layers.LayerExperts(experts), router=one_hot_router(), router_losses=())
    x = np.repeat(one_hot(0, 2, 2, 2), 64, axis=0)
    loss = fit_once(layer, x, jit_compile) - np.mean(array(layer(x)) ** 2)
    # Keras divides by the rows of a call: mean 1 for each used expert, or for each of its blocks.
    np.testing.assert_allclose(loss, (4.0 if jit_compile else 2.0) + 0.01 * E * E, rtol=1e-5)


@on_one_backend
@pytest.mark.parametrize("initializer", ["glorot_uniform", "orthogonal"])
def test_each_kernel_starts_like_that_of_a_dense_layer_and_unlike_others(initializer):
    bank = layers.GatedExperts(3, 128, kernel_initializer=initializer)
    bank.build((None, 64))
    kernels = (bank.gate_kernel, bank.up_kernel, bank.down_kernel)
    assert len({each.tobytes() for kernel in kernels for each in array(kernel)}) == 9
    for kernel in kernels:
        dense = keras.layers.Dense(kernel.shape[2], kernel_initializer=initializer)
        dense.build((None, kernel.shape[1]))
        deviations = array(kernel).std(axis=(1, 2))
        np.testing.assert_allclose(deviations, array(dense.kernel).std(), rtol=0.05)


@on_one_backend
def test_initial_weights_follow_the_seed():
    def kernels(seed):
        keras.utils.set_random_seed(3)
        initializer = keras.initializers.GlorotUniform(seed) if seed else "glorot_uniform"
        bank = layers.GatedExperts(E, 16, kernel_initializer=initializer)
        bank.build((None, D))
        return np.concatenate([array(weight).ravel() for weight in bank.weights])

    np.testing.assert_array_equal(kernels(1), kernels(1))
    np.testing.assert_array_equal(kernels(None), kernels(None))
    assert (kernels(1) != kernels(2)).any()


@on_one_backend
def test_weights_have_the_names_and_shapes_that_converters_rely_on():
    layer = moe(layers.GatedExperts(E, 16, use_bias=True), name="moe")
    layer.build((None, D))
    of_experts = {"gate_kernel": (E, D, 16), "gate_bias": (E, 16), "up_kernel": (E, D, 16)}
    of_experts |= {"up_bias": (E, 16), "down_kernel": (E, 16, D), "down_bias": (E, D)}
    expected = {f"{layer.experts.name}/{name}": shape for name, shape in of_experts.items()}
    expected |= {f"{layer.router.name}/kernel": (D, E), "router_loss_weights": (2,)}
    counters = {"expert_counts": (E,), "dropped_count": (), "value_totals": (2, 2, 4)}
    expected |= counters | {f"evaluation_{name}": shape for name, shape in counters.items()}
    actual = {re.sub("^moe/", "", weight.path): tuple(weight.shape) for weight in layer.weights}
    assert actual == expected


@on_one_backend
def test_combine_weights_sum_to_one_in_low_precision():
    router = routers.TopKRouter(E, 3, kernel_initializer="he_normal")
    bank = layers.FeedForwardExperts(E, 4, kernel_initializer="zeros", bias_initializer="ones")
    layer = moe(bank, router=router, dtype="mixed_bfloat16")
    outputs = array(layer(normal(64, D)))  # every expert returns ones
    np.testing.assert_array_equal(outputs, np.ones_like(outputs))


def test_the_routing_is_an_output_of_functional_models():
    inputs = keras.Input((3, D))
    layer = moe()
    outputs, routing = layer(inputs, return_routing=True)
    model = keras.Model(inputs, (outputs, routing))
    x = normal(2, 3, D)
    predicted, of_tokens = model.predict(x, batch_size=1, verbose=0)
    assert of_tokens.counts == of_tokens.dropped == of_tokens.load == ()  # not of one batch
    got = {name: each for name, each in of_tokens._asdict().items() if hasattr(each, "shape")}
    got["outputs"] = predicted
    expected_outputs, expected = layer(x, return_routing=True)
    np.testing.assert_allclose(array(got.pop("outputs")), array(expected_outputs), 1e-5, 1e-6)
    for name, value in got.items():
        np.testing.assert_allclose(array(value), array(getattr(expected, name)), 1e-5, 1e-6)
        spec = getattr(routing, name)
        assert spec.dtype == keras.backend.standardize_dtype(value.dtype), name
        assert len(spec.shape) == len(value.shape), name
        fixed = zip(spec.shape, value.shape)
        assert all(size in (None, actual) for size, actual in fixed), name


@on_one_backend
@pytest.mark.parametrize("feedforward", [lambda: keras.layers.Dense(D), moe], ids=["dense", "moe"])
def test_an_encoder_block_takes_any_feed_forward_layer(feedforward):
    block = layers.TransformerEncoderBlock(2, feedforward(), dropout=0.5)
    x = normal(2, 5, D)
    outputs = array(block(x))
    np.testing.assert_array_equal(outputs, array(block(x)))
    assert (array(block(x, training=True)) != outputs).any()
    assert (outputs != x).all(), "both branches are added"
    mask = np.arange(5) < np.array([[5], [3]])
    np.testing.assert_allclose(array(block(x, mask=mask))[0], outputs[0], rtol=1e-5, atol=1e-5)
    if hasattr(block.feedforward, "expert_counts"):
        before = block.feedforward.read_counts()
        block(x, mask=mask, training=True)
        counted = block.feedforward.read_counts().since(before)
        assert counted.assignments.sum() == mask.sum() * 2


@pytest.mark.backends("tensorflow", "jax")
def test_inputs_that_are_not_dense_are_refused():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        refused = [tf.sparse.from_dense(normal(3, D)), tf.RaggedTensor.from_tensor(normal(2, 3, D))]
    else:
        from jax.experimental import sparse

        refused = [sparse.BCOO.fromdense(normal(3, D))]
    for inputs in refused:
        with pytest.raises(TypeError, match="`inputs` must be dense"):
            moe()(inputs)
