"""What the layers do with shapes, masks, losses, dtypes and any layer as expert."""

import re

import keras
import numpy as np
import pytest
from layer_checks import D, E, array, gradients, moe, normal, one_hot, one_hot_router

import keras_moe
from keras_moe import layers, losses, routers

BACKEND = keras.backend.backend()
compiled = pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "jit"])


def skip_unless_it_compiles(jit_compile):
    if jit_compile and BACKEND == "torch":
        pytest.skip("PyTorch runs eagerly")
    if not jit_compile and BACKEND == "jax":
        pytest.skip("JAX computes the same blocks, compiled or not")


def fit_once(layer, x, jit_compile):
    """One training step with a learning rate of 0; the loss it reports."""
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    history = model.fit(x, np.zeros_like(x), batch_size=len(x), verbose=0)
    return history.history["loss"][0]


# Shapes


@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 3, 1), (1, 2, 1, 3)], ids=len)
def test_all_axes_but_the_last_are_tokens(leading):
    layer = moe()
    x = normal(*leading, D)
    outputs, routing = layer(x, return_routing=True)
    assert tuple(outputs.shape) == x.shape
    assert tuple(routing.indices.shape) == (6, 2)
    flat = layer(x.reshape(6, D))
    np.testing.assert_allclose(array(outputs).reshape(6, D), array(flat), rtol=1e-6)


@pytest.mark.parametrize(
    "shape, capacity_factor", [((None, D), None), ((None, None, D), 1.0), ((D,), 1.0)], ids=str
)
def test_batch_and_sequence_sizes_may_be_unknown(shape, capacity_factor):
    layer = moe(capacity_factor=capacity_factor)
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, *shape)
    for batch, length in [(2, 4), (3, 7)]:
        x = normal(batch, *[n or length for n in shape])
        predicted = model.predict(x, batch_size=batch, verbose=0)
    np.testing.assert_allclose(predicted, array(layer(x)), rtol=1e-5, atol=1e-6)


def test_the_router_may_see_something_else_than_the_experts():
    layer = moe()
    inputs, seen = keras.Input((3, D)), keras.Input((3, D))
    model = keras.Model([inputs, seen], layer(inputs, router_inputs=seen))
    x, other = normal(2, 3, D), normal(2, 3, D)[::-1].copy()
    by_other = layer.router(other.reshape(6, D))
    expected = layer.experts(x.reshape(6, D), layer.router.plan(by_other))
    outputs = model.predict([x, other], verbose=0)
    np.testing.assert_allclose(outputs.reshape(6, D), array(expected), rtol=1e-5, atol=1e-6)
    assert not np.allclose(outputs, array(layer(x)), atol=1e-3)


def test_no_tokens_give_no_outputs():
    assert tuple(moe()(np.zeros((0, 3, D), "float32")).shape) == (0, 3, D)


def test_one_expert_is_the_dense_layer():
    bank = layers.FeedForwardExperts(1, 16, bias_initializer="ones")
    layer = moe(bank, router=routers.TopKRouter(1, 1))
    x = normal(3, 5, D)
    outputs = array(layer(x))
    up, up_bias, down, down_bias = (
        weight[0] for weight in (bank.up_kernel, bank.up_bias, bank.down_kernel, bank.down_bias)
    )
    dense = keras.ops.matmul(keras.activations.gelu(keras.ops.matmul(x, up) + up_bias), down)
    np.testing.assert_allclose(outputs, array(dense + down_bias), rtol=1e-5, atol=1e-6)


def test_experts_may_change_the_number_of_features():
    layer = moe(layers.LayerExperts([keras.layers.Dense(3), keras.layers.Dense(3)]))
    assert tuple(layer(normal(2, 4, D)).shape) == (2, 4, 3)
    assert layer(keras.Input((4, D))).shape == (None, 4, 3)


# Masks


@pytest.mark.parametrize("as_dtype", ["bool", "int32"])
def test_an_explicit_mask_zeroes_padding_and_leaves_it_out_of_the_counts(as_dtype):
    layer = moe(shared_expert=keras.layers.Dense(D, bias_initializer="ones"))
    mask = np.array([[1, 1, 1], [1, 0, 0]], as_dtype)
    outputs, routing = layer(normal(2, 3, D), mask=mask, training=True, return_routing=True)
    real = mask.astype(bool)
    assert (array(outputs)[~real] == 0).all() and (array(outputs)[real] != 0).all()
    assert array(routing.counts).sum() == array(layer.expert_counts).sum() == 4 * 2
    np.testing.assert_array_equal(array(routing.mask), real.ravel())


def test_the_mask_of_an_embedding_is_used_and_passed_on():
    embedding, layer = keras.layers.Embedding(9, D, mask_zero=True), moe()
    inputs = keras.Input((None,), dtype="int32")
    outputs, routing = layer(embedding(inputs), return_routing=True)
    pooled = keras.layers.GlobalAveragePooling1D()(layer(embedding(inputs)))
    model = keras.Model(inputs, [outputs, routing.counts, pooled])
    tokens = np.array([[3, 4, 0, 0], [5, 6, 7, 8]])
    outputs, counts, pooled = (array(value) for value in model(tokens))
    assert counts.sum() == 6 * 2
    assert (outputs[0, 2:] == 0).all()
    np.testing.assert_allclose(pooled[0], outputs[0, :2].mean(0), rtol=1e-5, atol=1e-6)


def test_a_batch_that_is_all_padding_gives_zeros_and_no_losses():
    layer = moe()
    layer.build((2, 3, D))
    x, mask = np.full((2, 3, D), np.nan, "float32"), np.zeros((2, 3), bool)
    assert (array(layer(x, mask=mask, training=True)) == 0).all()
    assert [array(loss) for loss in layer.losses] == [0.0, 0.0]
    values = gradients(layer, x, mask=mask, training=True)
    assert all((value == 0).all() for value in values.values())


@pytest.mark.parametrize("bank", [layers.FeedForwardExperts, layers.GatedExperts])
def test_gradients_with_padding_are_those_without_it(bank):
    layer = moe(bank(E, 16), shared_expert=keras.layers.Dense(D))
    layer.build((2, 3, D))
    x = normal(1, 3, D)
    padded = np.concatenate([x, np.full((1, 2, D), np.nan, "float32")], axis=1)
    mask = np.array([[True] * 3 + [False] * 2])
    layer_gradients = gradients(moe_total(layer, 3), padded, mask=mask, training=True)
    for path, expected in gradients(moe_total(layer, 3), x, training=True).items():
        actual = layer_gradients[path]
        if path == "inputs":
            assert (actual[:, 3:] == 0).all()
            actual = actual[:, :3]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=path)


class moe_total(keras.layers.Layer):
    """The first tokens of a layer's outputs, so that objectives with and without padding agree."""

    def __init__(self, layer, length):
        super().__init__()
        self.layer, self.length = layer, length
        self.built = True

    def call(self, inputs, mask=None, training=None):
        return self.layer(inputs, mask=mask, training=training)[:, : self.length]


# Shared expert


def test_a_shared_expert_is_added_to_the_routed_ones():
    shared = keras.layers.Dense(D, "tanh")
    layer = moe(shared_expert=shared)
    x = normal(2, 3, D)
    total = array(layer(x))
    routed = moe(layer.experts, router=layer.router)
    np.testing.assert_allclose(total, array(routed(x)) + array(shared(x)), rtol=1e-5, atol=1e-6)


def test_a_shared_expert_is_told_of_the_padding():
    x, mask = normal(2, 3, D), np.array([[True] * 3, [True, False, False]])
    layer = moe(shared_expert=keras.layers.BatchNormalization(), router_losses=())
    short = moe(layer.experts, router=layer.router, shared_expert=layer.shared_expert)
    padded = array(layer(x, mask=mask, training=True))
    alone = array(short(x[mask][None], training=True))[0]
    np.testing.assert_allclose(padded[mask], alone, rtol=1e-4, atol=1e-5)


class Customary(keras.layers.Layer):
    """As most users write a layer: sublayers in `__init__`, and nothing but `call`."""

    def __init__(self, units):
        super().__init__()
        self.hidden = keras.layers.Dense(16, "relu")
        self.out = keras.layers.Dense(units)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


@pytest.mark.parametrize("is_functional", [True, False], ids=["functional", "unbuilt"])
def test_layers_that_only_have_a_call_are_built_and_trained(is_functional):
    hosts = [
        moe(layers.LayerExperts([Customary(D) for _ in range(E)])),
        moe(shared_expert=Customary(D)),
        layers.TransformerEncoderBlock(2, Customary(D)),
    ]
    model = keras.Sequential([keras.Input((3, D))] * is_functional + hosts)
    model.compile("adam", "mse")
    model.fit(normal(4, 3, D), normal(4, 3, D), verbose=0)
    for host in hosts:
        assert host.compute_output_shape((4, 3, D)) == (4, 3, D)
        assert any("hidden" in weight.path or "dense" in weight.path for weight in host.weights)


# Any layer as expert


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


@compiled
def test_experts_may_be_any_layers(jit_compile):
    skip_unless_it_compiles(jit_compile)
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


@compiled
def test_any_layers_learn_inside_fit(jit_compile):
    skip_unless_it_compiles(jit_compile)
    layer = moe(heterogeneous_experts(), router=routers.TopKRouter(E, 3, seed=1))
    model = keras.Sequential([keras.Input((D,)), layer])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile)
    before = [array(weight) for weight in layer.experts.trainable_weights]
    history = model.fit(normal(64, D), normal(64, D, seed=1), epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    for weight, value in zip(layer.experts.trainable_weights, before):
        assert (array(weight) != value).any(), weight.path


@compiled
def test_mixtures_inside_of_experts_count_and_balance_their_own_tokens(jit_compile):
    skip_unless_it_compiles(jit_compile)
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
    model = keras.Sequential([keras.Input((3, D)), host()])
    model.compile("sgd", "mse", jit_compile=False)
    history = model.fit(normal(4, 3, D), normal(4, 3, D), batch_size=2, verbose=0).history
    assert history["seen"] == [2.0]


def test_a_layer_inside_may_write_its_own_kernel():
    normalized = keras.layers.SpectralNormalization(keras.layers.Dense(D), power_iterations=20)
    layer = moe(shared_expert=normalized)
    layer(normal(4, D), training=True)
    assert abs(np.linalg.norm(array(normalized.layer.kernel), 2) - 1) < 0.05
    experts = layers.LayerExperts([keras.layers.SpectralNormalization(keras.layers.Dense(D))])
    with pytest.raises(ValueError, match="must not write its trainable weights in a call"):
        moe(experts, router=routers.TopKRouter(top_k=1))(normal(4, D), training=True)


@compiled
def test_experts_that_were_alike_may_become_different(jit_compile):
    skip_unless_it_compiles(jit_compile)
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


@pytest.mark.parametrize("is_set", ["when made", "later"])
def test_a_frozen_layer_moves_no_bias(is_set):
    frozen = {"trainable": False} if is_set == "when made" else {}
    router = routers.TopKRouter(E, balancer="loss_free")
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 4), router, **frozen)
    if is_set == "later":
        layer.trainable = False
    layer(normal(8, D), training=True)
    assert not array(router.selection_bias).any()
    block = layers.TransformerEncoderBlock(2, keras.layers.Dense(D), **frozen)
    assert block.feedforward.trainable == (not frozen)


@compiled
def test_dropout_inside_an_expert_drops_in_training_only(jit_compile):
    skip_unless_it_compiles(jit_compile)
    bank = layers.LayerExperts([keras.layers.Dropout(0.5, seed=e) for e in range(E)])
    layer = moe(bank, router_losses=())
    x = np.ones((64, D), "float32")
    np.testing.assert_allclose(array(layer(x)), x, rtol=1e-6)
    seeds = [array(variable) for variable in bank.non_trainable_variables]
    loss = fit_once(layer, x, jit_compile)
    assert loss > 1.2, "the mean square of dropped ones is above 1"
    moved = [(array(v) != s).any() for v, s in zip(bank.non_trainable_variables, seeds)]
    assert any(moved), "a seed that stands still repeats its noise"


@compiled
def test_batch_normalization_inside_an_expert_updates_the_state_of_used_experts_only(jit_compile):
    skip_unless_it_compiles(jit_compile)
    # One name for all: states are told apart by object, not by path.
    norms = [keras.layers.BatchNormalization(momentum=0.5, name="norm") for _ in range(E)]
    layer = moe(layers.LayerExperts(norms), router=one_hot_router(), router_losses=())
    x = np.repeat(one_hot(0, 2, 2, 2), 64, axis=0)  # whole blocks, so that no zeros are seen
    loss = fit_once(layer, x, jit_compile)
    assert np.isfinite(loss)
    means = np.stack([array(norm.moving_mean) for norm in norms])
    if jit_compile or BACKEND == "jax":
        # Expert 2 is called once a block, three times.
        shares = [0.5, 0.0, 0.875, 0.0]
    else:
        shares = [0.5, 0.0, 0.5, 0.0]
    np.testing.assert_allclose(means, np.diag(shares), rtol=1e-6)
    for expert in (1, 3):
        np.testing.assert_array_equal(array(norms[expert].moving_variance), np.ones(E))


@compiled
def test_the_loss_of_a_weight_inside_an_expert_counts_once(jit_compile):
    skip_unless_it_compiles(jit_compile)
    dense = [keras.layers.Dense(D, kernel_regularizer=keras.regularizers.L2(0.5)) for _ in range(E)]
    layer = moe(layers.LayerExperts(dense), router_losses=())
    x = np.zeros((8, D), "float32")  # so that only the regularisers have a loss
    loss = fit_once(layer, x, jit_compile)
    expected = sum(0.5 * (array(expert.kernel) ** 2).sum() for expert in dense)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    layer(x, training=True)
    np.testing.assert_allclose(sum(array(loss) for loss in layer.losses), expected, rtol=1e-5)


@compiled
def test_the_loss_of_an_activation_inside_an_expert_counts_once(jit_compile):
    skip_unless_it_compiles(jit_compile)
    experts = [keras.layers.ActivityRegularization(l1=1.0) for _ in range(E)]
    layer = moe(layers.LayerExperts(experts), router=one_hot_router(), router_losses=())
    x = np.repeat(one_hot(0, 2, 2, 2), 64, axis=0)
    # Keras divides by the rows of a call: mean 1 for each used expert, or for each of its blocks.
    expected = 4.0 if jit_compile or BACKEND == "jax" else 2.0
    np.testing.assert_allclose(
        fit_once(layer, x, jit_compile) - _mse(layer, x), expected, rtol=1e-5
    )


def _mse(layer, x):
    return float(np.mean(array(layer(x)) ** 2))


# Gradients


@pytest.mark.parametrize(
    "bank",
    [
        lambda: layers.FeedForwardExperts(E, 16),
        lambda: layers.GatedExperts(E, 16, use_bias=True, output_dim=3),
        lambda: layers.LinearExperts(E, 3),
        lambda: layers.LayerExperts([keras.layers.Dense(D) for _ in range(E)]),
    ],
    ids=["feed_forward", "gated", "linear", "layer"],
)
def test_every_gradient_exists_and_is_zero_for_unused_experts(bank):
    layer = moe(bank(), router=one_hot_router())
    layer.build((None, E))
    values = gradients(layer, one_hot(0, 2, 2), training=True)
    assert not [path for path, value in values.items() if value is None]
    for expert, used in enumerate([True, False, True, False]):
        of_expert = [
            _of_expert(layer.experts, path, value, expert) for path, value in values.items()
        ]
        of_expert = [value for value in of_expert if value is not None]
        assert of_expert
        assert any((value != 0).any() for value in of_expert) == used
    assert (values["inputs"] != 0).any()
    assert (values[layer.router.kernel.path] != 0).any()


def _of_expert(bank, path, value, expert):
    if isinstance(bank, layers.LayerExperts):
        return value if path in [v.path for v in bank.layers[expert].variables] else None
    return value[expert] if path in [v.path for v in bank.variables] else None


# Initial weights


@pytest.mark.parametrize(
    "initializer", ["glorot_uniform", "he_normal", "lecun_normal", "orthogonal"]
)
def test_each_kernel_starts_like_that_of_a_dense_layer(initializer):
    bank = layers.GatedExperts(3, 128, kernel_initializer=initializer)
    bank.build((None, 64))
    for kernel in (bank.gate_kernel, bank.up_kernel, bank.down_kernel):
        dense = keras.layers.Dense(kernel.shape[2], kernel_initializer=initializer)
        dense.build((None, kernel.shape[1]))
        deviations = array(kernel).std(axis=(1, 2))
        np.testing.assert_allclose(deviations, array(dense.kernel).std(), rtol=0.05)


@pytest.mark.parametrize("initializer", ["glorot_uniform", "orthogonal"])
def test_no_two_kernels_start_alike(initializer):
    bank = layers.GatedExperts(3, D, kernel_initializer=initializer)
    bank.build((None, D))
    kernels = np.concatenate(
        [array(k) for k in (bank.gate_kernel, bank.up_kernel, bank.down_kernel)]
    )
    assert len({kernel.tobytes() for kernel in kernels}) == 9


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


# Names


@pytest.mark.parametrize(
    "bank, names",
    [
        (lambda: layers.FeedForwardExperts(E, 16), "up_kernel up_bias down_kernel down_bias"),
        (lambda: layers.FeedForwardExperts(E, 16, use_bias=False), "up_kernel down_kernel"),
        (lambda: layers.GatedExperts(E, 16), "gate_kernel up_kernel down_kernel"),
        (
            lambda: layers.GatedExperts(E, 16, use_bias=True),
            "gate_kernel gate_bias up_kernel up_bias down_kernel down_bias",
        ),
    ],
    ids=["feed_forward", "feed_forward_no_bias", "gated", "gated_bias"],
)
def test_weights_have_the_names_and_shapes_that_converters_rely_on(bank, names):
    layer = moe(bank(), name="moe")
    layer.build((None, D))
    shapes = {
        "up_kernel": (E, D, 16),
        "gate_kernel": (E, D, 16),
        "down_kernel": (E, 16, D),
        "up_bias": (E, 16),
        "gate_bias": (E, 16),
        "down_bias": (E, D),
    }
    expected = {f"{layer.experts.name}/{name}": shapes[name] for name in names.split()}
    expected |= {
        f"{layer.router.name}/kernel": (D, E),
        "expert_counts": (E,),
        "dropped_count": (),
        "router_loss_weights": (2,),
        "router_loss_totals": (2,),
        "router_entropy_total": (),
        "call_count": (),
    }
    actual = {re.sub("^moe/", "", weight.path): tuple(weight.shape) for weight in layer.weights}
    assert actual == expected


# Precision


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16", "float16"])
def test_experts_are_selected_in_float32_whatever_the_policy(policy):
    dtype = keras.dtype_policies.get(policy).compute_dtype
    x = array(keras.ops.cast(normal(8192, 32), dtype)).astype("float32")

    def identities(policy):
        experts = [keras.layers.Identity(dtype=policy) for _ in range(E)]
        return moe(layers.LayerExperts(experts, dtype=policy), dtype=policy)

    low, full = identities(policy), identities("float32")
    for layer in (low, full):
        layer.build(x.shape)
    low.router.kernel.assign(full.router.kernel)
    selected = array(low(x, return_routing=True)[1].indices)
    np.testing.assert_array_equal(selected, array(full(x, return_routing=True)[1].indices))
    kernel = keras.ops.cast(full.router.kernel, dtype)
    rounded = array(keras.ops.matmul(keras.ops.cast(x, dtype), kernel))
    other = np.argsort(-rounded.astype("float32"), axis=1, kind="stable")[:, :2]
    assert (other != selected).any(), "the test would not notice rounded scores"


@pytest.mark.parametrize(
    "bank",
    [
        lambda: layers.FeedForwardExperts(
            E, 4, kernel_initializer="zeros", bias_initializer="ones", dtype="mixed_bfloat16"
        ),
        lambda: layers.LayerExperts(
            [keras.layers.Rescaling(0.0, offset=1.0) for _ in range(E)], dtype="mixed_bfloat16"
        ),
    ],
    ids=["feed_forward", "layer"],
)
def test_combine_weights_sum_to_one_in_low_precision(bank):
    router = routers.TopKRouter(E, 3, kernel_initializer="he_normal")
    layer = moe(bank(), router=router, dtype="mixed_bfloat16")
    outputs = array(layer(normal(64, D)))  # every expert returns ones
    np.testing.assert_array_equal(outputs, np.ones_like(outputs))


def test_a_bank_without_a_dtype_takes_that_of_the_layer():
    inner = layers.GatedExperts(E - 1, 16)
    layer = moe(layers.ZeroComputationExperts(inner, num_constant=1), dtype="mixed_bfloat16")
    layer.build((None, D))
    for bank in (layer.experts, inner):
        assert bank.dtype_policy.name == "mixed_bfloat16"
    assert keras.backend.standardize_dtype(inner.up_kernel.dtype) == "float32"


def test_a_low_precision_parent_leaves_a_float32_bank_as_it_is():
    layer = moe(layers.FeedForwardExperts(E, 16, dtype="float32"), dtype="mixed_bfloat16")
    outputs = layer(normal(2, 3, D))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert layer.experts.compute_dtype == "float32"


# Routing


def _tensors(routing):
    """The fields that every routing has."""
    return {name: value for name, value in routing._asdict().items() if name != "details"}


def test_the_routing_is_an_output_of_functional_models():
    inputs = keras.Input((3, D))
    layer = moe(capacity_factor=1.0)
    outputs, routing = layer(inputs, return_routing=True)
    model = keras.Model(inputs, {"outputs": outputs, **_tensors(routing)})
    x = normal(2, 3, D)
    got = model(x)
    expected_outputs, expected = layer(x, return_routing=True)
    np.testing.assert_allclose(array(got.pop("outputs")), array(expected_outputs), rtol=1e-6)
    for name, value in got.items():
        np.testing.assert_allclose(array(value), array(getattr(expected, name)), rtol=1e-6)
        spec = getattr(routing, name)
        assert spec.dtype == keras.backend.standardize_dtype(value.dtype), name
        assert len(spec.shape) == len(value.shape), name
        fixed = zip(spec.shape, value.shape)
        assert all(size in (None, actual) for size, actual in fixed), name


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_capacity_drops_what_finds_no_room_and_says_how_much(top_k):
    layer = moe(router=one_hot_router(top_k), capacity_factor=1.0 / top_k)
    x = one_hot(0, 0, 0, 0, 0, 0, 1, 2)  # room for two each
    outputs, routing = layer(x, training=True, return_routing=True)
    first = array(outputs).any(axis=1)
    np.testing.assert_array_equal(first, [True, True, *[False] * 4, True, True])
    dropped = {1: 4, 2: 4 + 7}[top_k]
    np.testing.assert_allclose(array(routing.dropped), dropped / (8 * top_k), rtol=1e-6)
    np.testing.assert_allclose(array(layer.dropped_count), dropped, rtol=1e-6)


# Losses and counts


def test_router_losses_are_added_in_training_only():
    layer = moe(router_losses=[losses.LoadBalance(0.5), losses.RouterZ(0.25)])
    x = normal(2, 3, D)
    routing = layer(x, training=True, return_routing=True)[1]
    added = [array(loss) for loss in layer.losses]
    expected = [array(losses.LoadBalance(0.5)(routing)), array(losses.RouterZ(0.25)(routing))]
    np.testing.assert_allclose(added, expected, rtol=1e-6)
    for training in (False, None):
        layer(x, training=training)
        assert layer.losses == []


def test_only_training_counts_and_a_reset_starts_over():
    layer = moe(router=one_hot_router())
    x = one_hot(0, 2, 2)
    layer(x, training=True)
    layer(x, training=True)
    layer(x)
    np.testing.assert_array_equal(array(layer.expert_counts), [2, 0, 4, 0])
    assert not layer.expert_counts.trainable
    layer.reset_counts()
    np.testing.assert_array_equal(array(layer.expert_counts), np.zeros(E))


# Transformer encoder block


@pytest.mark.parametrize(
    "feedforward",
    [
        lambda: keras.layers.Dense(D),
        lambda: keras.Sequential([keras.layers.Dense(16, "gelu"), keras.layers.Dense(D)]),
        moe,
    ],
    ids=["dense", "sequential", "moe"],
)
def test_an_encoder_block_takes_any_feed_forward_layer(feedforward):
    block = layers.TransformerEncoderBlock(2, feedforward(), dropout=0.5)
    x = normal(2, 5, D)
    outputs = array(block(x))
    np.testing.assert_array_equal(outputs, array(block(x)))
    assert (array(block(x, training=True)) != outputs).any()
    assert (outputs != x).all(), "both branches are added"
    mask = np.arange(5) < np.array([[5], [3]])
    np.testing.assert_allclose(array(block(x, mask=mask))[0], outputs[0], rtol=1e-5, atol=1e-5)


def test_an_encoder_block_hands_its_mask_to_attention_and_feed_forward():
    block = layers.TransformerEncoderBlock(2, moe(name="moe"))
    x = normal(1, 5, D)
    mask = np.array([[True, True, True, False, False]])
    outputs = array(block(x, mask=mask, training=True))
    assert array(block.feedforward.expert_counts).sum() == 3 * 2
    np.testing.assert_allclose(outputs[:, :3], array(block(x[:, :3])), rtol=1e-5, atol=1e-5)
    assert np.abs(array(block(x))[:, :3] - outputs[:, :3]).max() > 1e-3, "unmasked it differs"


def test_an_encoder_block_adds_the_router_losses_of_its_feed_forward():
    block = layers.TransformerEncoderBlock(2, moe())
    block(normal(2, 5, D), training=True)
    assert len(block.losses) == 2
