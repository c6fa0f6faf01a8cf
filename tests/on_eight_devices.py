"""Checks of many devices, run by `test_distribution.py` in a process that has eight of them."""

import argparse

import jax
import keras
import numpy as np
import pytest
from layer_checks import SumOfTasks
from test_own_experts import NormalisedExperts

from benchmarks import scaling
from benchmarks.collectives import collectives
from benchmarks.steps import jax_function
from keras_moe import convert, layers, losses, ops, routers
from keras_moe.callbacks import ExpertMonitor
from keras_moe.distribution import expert_parallel

E, B, S, D, H = 8, 16, 6, 8, 16
# A mesh whose axis of experts does not split the batch: what users of `ModelParallel` may have.
MODEL_AXIS = "model_axis"
# A mesh with an axis for heads of attention.
KERAS_HUB = "keras_hub"


def distribution_of(name):
    """A distribution by its name; "2x4" splits the data in two and the experts in four."""
    if name is None:
        return None
    if name == "data_parallel":
        return keras.distribution.DataParallel()
    if name == MODEL_AXIS:
        mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
        layout_map = keras.distribution.LayoutMap(mesh)
        layout_map[".*(up|gate|down)_kernel"] = ("model", None, None)
        layout_map[".*(up|gate|down)_bias"] = ("model", None)
        return keras.distribution.ModelParallel(layout_map=layout_map)
    if name == KERAS_HUB:
        mesh = keras.distribution.DeviceMesh((2, 2, 2), ("data", "expert", "model"))
        return expert_parallel(layout_map=convert.layout_map(mesh))
    return expert_parallel(int(name[-1]))


@pytest.fixture(autouse=True)
def one_device_at_first():
    yield
    keras.distribution.set_distribution(None)


def on(mesh, function):
    """The result of `function()` under a distribution, as arrays."""
    keras.utils.set_random_seed(0)
    keras.distribution.set_distribution(distribution_of(mesh))
    try:
        return keras.tree.map_structure(np.asarray, function())
    finally:
        keras.distribution.set_distribution(None)


def model_and_data():
    balanced = routers.TopKRouter(E, score="sigmoid", balancer=routers.LossFreeBias(0.01))
    model = keras.Sequential(
        [
            keras.Input((S,), dtype="int32"),
            keras.layers.Embedding(50, D, mask_zero=True),
            layers.MixtureOfExperts(
                layers.FeedForwardExperts(E, H),
                router=balanced,
                shared_expert=keras.layers.Dense(D),
                name="shared",
            ),
            layers.MixtureOfExperts(
                layers.GatedExperts(E, H),
                router_losses=["load_balance", "router_z", losses.LoadBalance(scope="global")],
                name="gated",
            ),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.5, 0.9), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    random = np.random.default_rng(0)
    ids = random.integers(1, 50, (10 * B, S)) * (np.arange(S) < random.integers(1, S, (10 * B, 1)))
    labels = ids[:, 0] % 3
    return model, ids, labels


def trained():
    """Logs of the monitor, selection bias and weights of a model after 20 steps."""
    model, ids, labels = model_and_data()
    options = {"batch_size": B, "epochs": 2, "shuffle": False, "verbose": 0}
    fitted = model.fit(ids, labels, callbacks=[ExpertMonitor(per_layer=True)], **options)
    weights = [variable.numpy() for variable in model.variables]
    return fitted.history, model.get_layer("shared").router.selection_bias.numpy(), weights


def test_fit_gives_what_one_device_gives():
    result = on("2x4", trained)
    assert_same(result, on(None, trained))
    assert np.abs(result[1]).max() > 0.005


def pass_of(layer, inputs=(B, S, D), training=True):
    """Output, losses, gradients and counters of one pass of a layer."""

    def function():
        model = keras.Sequential([keras.Input(inputs[1:]), layer()])
        x = np.random.default_rng(1).normal(size=inputs).astype("float32")
        x[..., 0] = 1.0

        def loss(trainable, x, fixed):
            y, fixed, extra = model.stateless_call(
                trainable, fixed, x, training=training, return_losses=True
            )
            return (y**2).sum() + sum(extra), (y, fixed)

        trainable, fixed = (
            [variable.value for variable in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        )
        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return compute(trainable, placed(x), fixed)

    return function


def placed(x):
    """The batch where the distribution has it, if it divides the batch."""
    distribution = keras.distribution.distribution()
    if distribution is None or len(x) % 8:
        return x
    return jax.device_put(x, distribution.get_data_layout(x.shape).backend_layout)


def assert_same(actual, expected, tolerance=1e-5):
    leaves = map(keras.tree.flatten_with_path, (actual, expected))
    for (path, one), (_, other) in zip(*leaves, strict=True):
        scale = max(1.0, np.max(np.abs(other), initial=0.0))
        np.testing.assert_allclose(
            np.asarray(one, "float64"), other, rtol=0, atol=tolerance * scale, err_msg=str(path)
        )


def skewed():
    """A layer with biases whose tokens all go to two experts, which are on one device."""

    def kernel(shape, dtype=None):
        values = np.random.default_rng(2).normal(size=shape) * 0.1
        values[0] = [0, 0, 8, 9, 0, 0, 0, 0]
        return keras.ops.convert_to_tensor(values, dtype)

    return layers.MixtureOfExperts(
        layers.FeedForwardExperts(E, H, bias_initializer="normal"),
        router=routers.TopKRouter(E, kernel_initializer=kernel),
    )


def with_split_corrections(bank):
    mixture = layers.MixtureOfExperts(bank)
    mixture.build((None, S, D))
    bank.enable_lora(2, b_initializer="normal")
    split = 1 if keras.distribution.distribution() is None else 4
    for weight in bank.weights:
        if "seed" not in weight.path:
            assert weight.value.addressable_shards[0].data.shape[0] == E // split, weight.path
    return mixture


def bank_of(bank=None, **kwargs):
    return lambda: layers.MixtureOfExperts((bank or layers.FeedForwardExperts)(E, H), **kwargs)


LAYERS = {
    "two experts get all tokens": skewed,
    "quantile": lambda: bank_of(router=routers.TopKRouter(E, balancer="quantile"))(),
    "balanced assignment": bank_of(router="balanced_assignment"),
    "expert choice": bank_of(router="expert_choice"),
    "soft": bank_of(router="soft"),
    "per sequence": bank_of(capacity_factor=layers.Capacity(0.5, per_sequence=True)),
    "zero computation": lambda: layers.MixtureOfExperts(
        layers.ZeroComputationExperts(layers.FeedForwardExperts(E, H), 1, 1, 1)
    ),
    "a user's experts": lambda: with_split_corrections(NormalisedExperts(E, activation="tanh")),
    "low rank": lambda: layers.MixtureOfExperts(
        layers.LowRankExperts(layers.GatedExperts(1, H), E, 2, b_initializer="he_normal")
    ),
    "many tasks": lambda: SumOfTasks(
        layers.MultiGateMixtureOfExperts(layers.GatedExperts(E, H), 2, ["top_k", "top_k"])
    ),
    "layers": lambda: layers.MixtureOfExperts(
        layers.LayerExperts([keras.layers.Dense(D) for _ in range(E)])
    ),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_kind_of_layer_gives_what_it_gives_on_one_device(layer):
    assert_same(on("2x4", pass_of(layer)), on(None, pass_of(layer)))


# Experts on two devices are gathered to, on four they are sent to.
@pytest.mark.parametrize("layer", [bank_of(), skewed], ids=["even", "skewed"])
@pytest.mark.parametrize("mesh", ["4x2", MODEL_AXIS])
def test_experts_may_be_on_few_devices_or_over_an_axis_that_does_not_split_the_batch(mesh, layer):
    assert_same(on(mesh, pass_of(layer)), on(None, pass_of(layer)))


def test_a_capacity_holds_for_the_tokens_of_each_device():
    # Two sequences per device: on one device, sequences twice as long.
    def layer(**kwargs):
        return bank_of(capacity_factor=layers.Capacity(0.6, priority="probability", **kwargs))

    def in_long_sequences():
        (loss, (y, fixed)), (weights, x) = pass_of(layer(per_sequence=True), (B // 2, 2 * S, D))()
        return (loss, (y.reshape(B, S, D), fixed)), (weights, x.reshape(B, S, D))

    expected = on(None, in_long_sequences)
    dropped = [state for state in expected[0][1][1] if np.shape(state) == ()]
    assert max(dropped) > 5
    assert_same(on("2x4", pass_of(layer())), expected)


def test_a_batch_that_does_not_divide_is_padded():
    called = pass_of(bank_of(capacity_factor=layers.Capacity(8.0)), (3, S, D))
    assert_same(on("2x4", called), on(None, called))


def test_integers_and_corrections_of_low_rank_are_split_as_kernels_are():
    def called():
        layer = bank_of(layers.GatedExperts)()
        layer.build((None, D))
        layer.experts.quantize("int4", config=keras.quantizers.Int4QuantizationConfig(block_size=2))
        layer.experts.enable_lora(2, b_initializer="glorot_uniform")
        distribution = keras.distribution.distribution()
        num_shards = 1 if distribution is None else distribution.device_mesh.shape[1]
        for weight in (layer.experts.up_kernel, layer.experts.up_scale):
            assert weight.value.addressable_shards[0].data.shape[0] == E // num_shards
        return pass_of(lambda: layer, (B, D))()

    assert_same(on("2x4", called), on(None, called))


def test_a_layer_may_be_called_outside_of_a_model():
    x = np.ones((3, D), "float32")
    assert_same(*(on(mesh, lambda: bank_of(layers.GatedExperts)()(x)) for mesh in ("2x4", None)))


@pytest.mark.parametrize(("mesh", "shards"), [("4x2", 2), ("2x4", 4)])
def test_tokens_cross_and_kernels_stay(mesh, shards):
    tokens, width = 8 * 32, 16
    keras.distribution.set_distribution(distribution_of(mesh))
    layer = layers.MixtureOfExperts(layers.GatedExperts(E, 40))
    layer.build((None, width))
    x = np.ones((tokens, width), "float32")
    function, (trainable, x, fixed, weight) = jax_function(layer, x, True, True)
    found = collectives(
        function.lower(trainable, placed(x), fixed, placed(weight)).compile().as_text()
    )
    of_kernels = [c for c in found if any(shape[-1] == 40 for shape in c.shapes if shape)]
    # Gradients of kernels are summed over the data axis, and nothing else of them is sent.
    assert {c.kind for c in of_kernels} <= {"all-reduce"}
    of_tokens = [c for c in found if c.kind in ("all-gather", "reduce-scatter")]
    group = tokens * shards // 8
    values = sum(c.bytes for c in of_tokens) / 4
    top_k = 2
    # Forward and backward: two gathers and two scatters of (T, D), and of (T, K) one gather of
    # experts, and of weights a gather and a scatter.
    assert values <= 4 * group * width + 3 * group * top_k
    # With more than 1.25 K shards it is less to send each token to K devices: rows and outputs and
    # the gradients of both, and the expert of each row.
    first_pass = [c for c in found if "while/body" not in c.operation]
    sent = sum(c.bytes for c in first_pass if c.kind == "all-to-all") / 4
    assert sent <= 1.1 * 2.5 * top_k * tokens // 8 * (2 * width + 1)
    assert (sent > 0, values > 0) == ((False, True) if shards == 2 else (True, False))
    assert {c.kind for c in found} <= {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}


def values_of(model):
    """All that a checkpoint keeps: of what the layer counts, the assignments."""
    counts = [model.layers[-1].expert_counts]
    kept = (*model.trainable_variables, *model.optimizer.variables, *counts)
    return [variable.numpy() for variable in kept]


@pytest.mark.parametrize(("source", "meshes"), [("1x8", ["data_parallel", "4x2"]), (None, ["2x4"])])
def test_a_checkpoint_loads_on_every_mesh_bit_for_bit(source, meshes, tmp_path):
    keras.distribution.set_distribution(distribution_of(source))
    model = keras.Sequential([keras.Input((S, D)), bank_of(layers.GatedExperts)()])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype("float32")
    model.fit(x, x, batch_size=B, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    expected = values_of(model)
    for mesh in meshes:
        keras.distribution.set_distribution(distribution_of(mesh))
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for actual, value in zip(values_of(loaded), expected, strict=True):
            np.testing.assert_array_equal(actual, value)
        other = keras.models.clone_model(loaded)
        other.load_weights(tmp_path / "model.weights.h5")
        for one, two in zip(loaded.trainable_variables, other.trainable_variables, strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())
        kernel = loaded.layers[-1].experts.up_kernel.value
        shard = kernel.addressable_shards[0].data.shape[0]
        assert shard == E // (int(mesh[-1]) if mesh and mesh[0].isdigit() else 1)


def test_the_products_of_a_device_do_not_grow_with_the_devices(monkeypatch):
    monkeypatch.undo()  # with the tiles that users get
    options = argparse.Namespace(
        features=16, hidden=32, experts=[E], top_k=2, gated=False, activation="gelu"
    )
    one = scaling.examine("data", 1, 1024, options)
    eight = scaling.examine("expert", 8, 1024, options)
    assert eight["gflops"] <= 1.2 / 8 * one["gflops"]
    assert eight["kernels_mb"] == 0


def test_a_layer_that_was_built_under_another_distribution_is_refused():
    keras.distribution.set_distribution(expert_parallel(2))
    layer = bank_of()()
    layer.build((None, D))
    keras.distribution.set_distribution(expert_parallel(4))
    with pytest.raises(ValueError, match="set before a layer is built"):
        layer(np.ones((B, D), "float32"))


def layout_map(names):
    return keras.distribution.LayoutMap(keras.distribution.DeviceMesh((2, 4), names))


def test_numbers_that_are_not_given_follow_from_the_devices():
    half = keras.distribution.list_devices()[:4]
    for arguments, shape in (
        ({}, (1, 8)),
        ({"experts": np.int64(4)}, (2, 4)),
        ({"data": 4}, (4, 2)),
        ({"experts": 3, "data": 2}, (2, 3)),
        ({"experts": 2, "devices": half}, (2, 2)),
        ({"experts": 4, "data": 2, "layout_map": layout_map(("data", "expert"))}, (2, 4)),
    ):
        assert tuple(expert_parallel(**arguments).device_mesh.shape) == shape


def test_another_layout_is_combined_with_that_of_the_banks():
    mine = layout_map(("data", "expert"))
    mine[".*dense.*kernel"] = (None, "expert")
    keras.distribution.set_distribution(expert_parallel(layout_map=mine))
    assert list(mine) == [".*dense.*kernel"], "it can be used again"
    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(D), bank_of()()])
    assert model.layers[0].kernel.value.addressable_shards[0].data.shape == (D, D // 4)
    assert model.layers[1].experts.up_kernel.value.addressable_shards[0].data.shape == (2, D, H)
    model.compile("sgd", "mse")
    x = np.ones((B, D), "float32")
    model.fit(x, x, batch_size=B, verbose=0)


def test_a_model_of_keras_hub_learns_on_a_mesh_with_an_axis_for_its_heads():
    import test_convert_keras_hub as test_convert

    def trained():
        model = convert.use_sparse_experts(test_convert.causal_lm("mixtral"))
        inputs = test_convert.prompts([3, 4, 5, 6] * 2)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(inputs, inputs["token_ids"], batch_size=8, epochs=2, shuffle=False, verbose=0)
        weights = {weight.path: weight.value for weight in model.trainable_weights}
        if keras.distribution.distribution() is not None:
            sizes = {"attention/query/kernel": (8, 1, 4), "experts/gate_kernel": (2, 8, 6)}
            for path, value in weights.items():
                for end, size in sizes.items():
                    assert not path.endswith(end) or value.addressable_shards[0].data.shape == size
        return list(weights.values())

    for actual, expected in zip(on(KERAS_HUB, trained), on(None, trained)):
        assert_same(actual, expected)


@pytest.mark.parametrize("mesh", ["data_parallel", "2x4", MODEL_AXIS])
def test_dropout_draws_for_each_token_on_each_device(mesh):
    def outputs():
        layer = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 64, dropout=0.5))
        return layer(np.ones((8 * B, D), "float32"), training=True)

    assert len(np.unique(on(mesh, outputs), axis=0)) == 8 * B


def test_a_grouped_product_is_computed_whole():
    def product():
        return ops.grouped_matmul(np.ones((4, 2), "float32"), np.ones((2, 2, 3), "float32"), [3, 1])

    np.testing.assert_array_equal(on("2x4", product), np.full((4, 3), 2))
