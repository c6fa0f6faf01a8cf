"""Dense models that become mixtures compute the same at first, and train, save and load."""

import functools

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    QUICK_JIT,
    on_one_backend,
    run_python,
    saved_and_loaded,
    unless_compiled,
)
from layer_checks import array, normal

import keras_moe
from keras_moe import inspection, layers
from keras_moe._internal.keras_internals import parameters_of
from keras_moe.routers import TopKRouter

VOCABULARY, D, H = 12, 4, 8
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (4, 6))
TARGETS = np.roll(IDS, -1, axis=1)
X = normal(5, D)


def feed_forward(*between):
    return keras.Sequential([keras.layers.Dense(H), *between, keras.layers.Dense(D)])


def language_model(*blocks):
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, D)(ids)
    for block in blocks:
        x = block(x)
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))


def block_model():
    """Decoder blocks of ours."""
    between = keras.layers.Activation("gelu"), keras.layers.Dropout(0.1)
    forwards = [feed_forward(*between) for _ in range(2)]
    blocks = [layers.TransformerDecoderBlock(2, each) for each in forwards]
    return language_model(*blocks)


def graph_model(blocks=2 if BACKEND == "torch" else 1):
    """Dense layers that follow one another."""

    def residual(x, number):
        hidden = keras.layers.Dense(H, "gelu", name=f"up_{number}")(x)
        branch = keras.layers.Dense(D)(keras.layers.Dropout(0.1)(hidden))
        # An operation is no layer of the model.
        return x + branch if number else keras.layers.Add()([x, branch])

    return language_model(*(functools.partial(residual, number=each) for each in range(blocks)))


@keras.saving.register_keras_serializable("test_upcycling")
class Residual(keras.layers.Layer):
    """As people write them: a feed-forward in an attribute that the config lacks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.feedforward = feed_forward(keras.layers.Activation("tanh"))

    def build(self, inputs_shape):
        self.feedforward.build(inputs_shape)

    def call(self, inputs):
        return inputs + self.feedforward(inputs)


def nested_model():
    """Foreign layers, and a sequential model inside a functional one."""
    norm, dropout = keras.layers.LayerNormalization(), keras.layers.Dropout(0.1)
    wide, narrow = keras.layers.Dense(H, "relu", name="up"), keras.layers.Dense(D, use_bias=False)
    inner = keras.Sequential([norm, wide, narrow, dropout])
    return language_model(Residual(name="first"), Residual(name="second"), inner)


def randomized(model):
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape) * 0.5)
    return model


def dense_kernels(model):
    """Kernels of the feed-forwards, wherever one may be kept."""
    kept = [(weight.path, tuple(weight.shape)) for weight in model.weights]
    if BACKEND == "torch":
        kept += [(path, tuple(weight.shape)) for path, weight in model.named_parameters()]
    kept = [path for path, shape in kept if sorted(shape) == [D, H] and path.endswith("kernel")]
    return [path for path in kept if "router" not in path]


CASES = {
    "blocks, copies": (block_model, {}),
    "graph, parts": (graph_model, {"num_experts": 8, "top_k": 8, "granularity": 4}),
    "nested, one expert a token": (nested_model, {"num_experts": 2, "top_k": 1}),
}


@on_one_backend
def test_routers_start_small():
    """Logits of inputs of variance 1 are about 0.02 sqrt(D): no expert is preferred at first."""
    model = keras_moe.upcycle(block_model(), seed=0)
    routers = [each for each in model._flatten_layers() if isinstance(each, TopKRouter)]
    for router in routers:
        assert 0.01 < np.std(array(router.kernel)) < 0.03
    assert routers


@pytest.mark.parametrize("case", unless_compiled(CASES, ["graph, parts"]))
def test_an_upcycled_model_is_equal_at_first_and_saves_loads_and_trains(case, tmp_path):
    make, arguments = CASES[case]
    model = randomized(make())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=QUICK_JIT)
    expected = model.predict(IDS, verbose=0)
    upcycled = keras_moe.upcycle(model, seed=0, **arguments)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(upcycled.predict(IDS, verbose=0), expected, atol=1e-6 * scale)
    moes = inspection.moe_layers(upcycled)
    assert moes and all(name.endswith("_experts") for name in moes)
    assert not dense_kernels(upcycled)
    rates = {moe.experts.dropout for moe in moes.values()}
    assert rates == ({0.0} if make is nested_model else {0.1})
    upcycled.fit(IDS, TARGETS, verbose=0)
    again = saved_and_loaded(upcycled, tmp_path)
    expected = upcycled.predict(IDS, verbose=0)
    np.testing.assert_allclose(again.predict(IDS, verbose=0), expected, atol=1e-6 * scale)
    assert again.count_params() == upcycled.count_params()


def several(make, number=2):
    """Models of one architecture with other weights."""
    models = [make() for _ in range(number)]
    for seed, model in enumerate(models):
        rng = np.random.default_rng(seed)
        for weight in model.weights:
            weight.assign(rng.normal(size=weight.shape) * 0.5)
    return models


def with_statistics():
    """A model with state that is no gradient's, and another feed-forward after it."""
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, D, name="embedding")(ids)
    hidden = keras.layers.BatchNormalization(name="norm")(hidden)
    for number in range(2):
        hidden = keras.layers.Dense(H, "gelu", name=f"up_{number}")(hidden)
        hidden = keras.layers.Dense(D, name=f"down_{number}")(hidden)
    return keras.Model(ids, hidden)


@on_one_backend
def test_experts_come_from_several_models_and_other_weights_are_averaged():
    models = several(with_statistics, 3)
    weights = [{weight.path: array(weight) for weight in model.weights} for model in models]

    def mean(path):
        return np.mean([own[path] for own in weights], axis=0)

    upcycled = keras_moe.upcycle(models, select="up_0", seed=0)
    bank = inspection.moe_layers(upcycled)["up_0_experts"].experts
    for name in ("up", "down"):
        for part in ("kernel", "bias"):
            stacked = [own[f"{name}_0/{part}"] for own in weights]
            np.testing.assert_array_equal(array(getattr(bank, f"{name}_{part}")), stacked)
    for path in ("embedding/embeddings", "norm/gamma", "up_1/kernel", "down_1/bias"):
        layer, name = path.split("/")
        found = array(getattr(upcycled.get_layer(layer), name))
        np.testing.assert_allclose(found, mean(path), rtol=1e-6)
    statistics = array(upcycled.get_layer("norm").moving_mean)
    np.testing.assert_array_equal(statistics, weights[0]["norm/moving_mean"])
    for model, own in zip(models[1:], weights[1:]):
        for weight in model.weights:
            np.testing.assert_array_equal(array(weight), own[weight.path])


@on_one_backend
def test_copies_are_of_the_models_in_turn():
    models = several(with_statistics, 3)
    kernels = [np.split(array(model.get_layer("up_0").kernel), 2, axis=1) for model in models]
    upcycled = keras_moe.upcycle(models, 12, granularity=2, select="up_0", seed=0)
    bank = inspection.moe_layers(upcycled)["up_0_experts"].experts
    np.testing.assert_array_equal(array(bank.up_kernel), sum(kernels, []) * 2)


@on_one_backend
def test_models_with_lora_are_not_mixed():
    models = several(with_statistics, 2)
    for model in models:
        model.get_layer("up_1").enable_lora(2)
    with pytest.raises(ValueError, match="must be mixed without LoRA"):
        keras_moe.upcycle(models, select="up_0")


@on_one_backend
@pytest.mark.parametrize("make", [block_model, graph_model, nested_model])
def test_equal_models_become_one_that_computes_the_same(make):
    model, other = randomized(make()), randomized(make())
    expected = array(model(IDS))
    upcycled = keras_moe.upcycle([model, other], granularity=2, top_k=2, seed=0)
    experts = {each.experts.num_experts for each in inspection.moe_layers(upcycled).values()}
    assert experts == {4}
    np.testing.assert_allclose(array(upcycled(IDS)), expected, atol=1e-6 * np.abs(expected).max())


SIZES = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": D, "intermediate_dim": H}
BACKBONES = {
    "Bert": {"num_heads": 2, "max_sequence_length": 8},
    "GPT2": {"num_heads": 2, "max_sequence_length": 8},
    "Llama": {"num_query_heads": 2, "num_key_value_heads": 2},
}


@on_one_backend
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_keras_hub(name, rank, tmp_path):
    import keras_hub

    cls = getattr(keras_hub.models, f"{name}Backbone")
    model = randomized(cls(**SIZES, **BACKBONES[name]))
    inputs = {"token_ids": IDS, "padding_mask": IDS > 2, "segment_ids": 0 * IDS}
    inputs = {each.name: inputs[each.name] for each in model.inputs}
    expected = list(map(array, keras.tree.flatten(model(inputs))))
    upcycled = keras_moe.upcycle(model, num_experts=4, seed=0, rank=rank)
    assert upcycled is model and isinstance(model, cls)
    assert not dense_kernels(model)
    again = saved_and_loaded(model, tmp_path)
    with pytest.raises(ValueError, match="loads no preset of a backbone"):
        model.save_to_preset(str(tmp_path / "preset"))
    for each in (model, again):
        for actual, wanted in zip(keras.tree.flatten(each(inputs)), expected, strict=True):
            np.testing.assert_allclose(array(actual), wanted, atol=1e-6 * np.abs(wanted).max())
    assert len(inspection.moe_layers(again)) == 2


LOADED = """
import sys, keras, numpy, keras_moe
folder = sys.argv[1]
converted = keras.saving.load_model(f"{folder}/converted.keras")
assert keras_moe.inspection.moe_layers(converted)
import keras_hub
model = keras_hub.models.CausalLM.from_preset(folder)
inputs = {name: numpy.load(f"{folder}/{name}.npy") for name in ("token_ids", "padding_mask")}
numpy.save(f"{folder}/outputs.npy", model.predict_on_batch(inputs))
"""


@on_one_backend
def test_models_of_keras_hub_load_in_another_process(tmp_path):
    import keras_hub

    sizes = {**SIZES, **BACKBONES["Llama"]}
    converted = keras_hub.models.MixtralBackbone(**sizes, num_experts=4)
    keras_moe.convert.use_sparse_experts(converted).save(tmp_path / "converted.keras")
    backbone = randomized(keras_hub.models.LlamaBackbone(**sizes))
    model = keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)
    keras_moe.upcycle(model, num_experts=4, seed=0)
    with pytest.raises(ValueError, match="loads no preset of a backbone"):
        model.backbone.save_to_preset(str(tmp_path))
    model.save_to_preset(str(tmp_path))
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    for name, value in inputs.items():
        np.save(tmp_path / f"{name}.npy", value)
    run_python("-c", LOADED, tmp_path)
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, model.predict_on_batch(inputs), rtol=1e-5)


@on_one_backend
@pytest.mark.parametrize("make", [block_model, graph_model])
def test_low_rank_experts_train_alone_and_merge(make, tmp_path):
    model = randomized(make())
    expected = array(model(IDS))
    upcycled = keras_moe.upcycle(model, num_experts=4, seed=0, rank=2)
    np.testing.assert_allclose(array(upcycled(IDS)), expected, atol=1e-6 * np.abs(expected).max())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    upcycled.compile("adam", loss, jit_compile=QUICK_JIT)
    keras_moe.freeze_all_but(upcycled)
    mixtures = inspection.moe_layers(upcycled).values()
    paths = {weight.path for weight in upcycled.trainable_weights}
    assert len(paths) == 5 * len(mixtures)  # four factors and a router's kernel
    parameters = parameters_of(upcycled)
    before = list(map(array, parameters))
    upcycled.fit(IDS, TARGETS, epochs=2, verbose=0)
    changed = {w.path for w, value in zip(parameters, before) if (array(w) != value).any()}
    assert changed == paths
    expected = array(upcycled(IDS))
    upcycled.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    keras_moe.freeze_all_but(again)
    assert {weight.path for weight in again.trainable_weights} == paths
    keras_moe.merge_lora(again)
    assert all(layer.experts.num_experts == 4 for layer in inspection.moe_layers(again).values())
    for each in (again, saved_and_loaded(again, tmp_path)):
        np.testing.assert_allclose(array(each(IDS)), expected, atol=1e-5 * np.abs(expected).max())
        assert {type(m.experts) for m in inspection.moe_layers(each).values()} == {
            layers.FeedForwardExperts
        }


def pair(up=None, down=None, **both):
    """A model of one feed-forward, with arguments of its layers."""
    up = keras.layers.Dense(H, **{"activation": "silu", "name": "up", **both, **(up or {})})
    down = keras.layers.Dense(D, name="down", **both, **(down or {}))
    return randomized(keras.Sequential([keras.Input((D,)), up, down]))


L1, L2 = keras.regularizers.L1(0.1), keras.regularizers.L2(0.1)
PAIRS = [
    ({"kernel_regularizer": L2, "bias_regularizer": L1}, 1),
    ({"kernel_regularizer": keras.regularizers.L1L2(0.1, 0.2), "use_bias": False}, 2),
]


@on_one_backend
@pytest.mark.parametrize("arguments, granularity", PAIRS, ids=["biases", "in parts"])
def test_a_sequential_model_stays_one_and_its_loss_the_same(arguments, granularity, tmp_path):
    model = pair(**arguments)
    model.compile("sgd", "mse", jit_compile=QUICK_JIT)
    expected = model.evaluate(X, X, verbose=0)
    upcycled = keras_moe.upcycle(model, 8, granularity=granularity)
    assert [layer.name for layer in upcycled.layers] == ["up_experts"]
    for each in (upcycled, saved_and_loaded(upcycled, tmp_path)):
        assert isinstance(each, keras.Sequential)
        np.testing.assert_allclose(each.evaluate(X, X, verbose=0), expected, rtol=1e-5)


def squared(targets, outputs):
    return keras.ops.mean(keras.ops.square(keras.ops.subtract(targets, outputs)), axis=-1)


@pytest.mark.backends("tensorflow", "torch")
def test_a_model_stays_compiled_also_with_functions_that_cannot_be_saved():
    class Constant(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

        def get_config(self):
            return {}

    inputs = keras.Input((D,))
    hidden = keras.layers.Dense(H, "relu")(inputs)
    outputs = [keras.layers.Dense(D)(hidden), keras.layers.Dense(1, name="side")(inputs)]
    model, targets = keras.Model(inputs, outputs), [X, X[:, :1]]
    model.compile(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(Constant())),
        loss=[squared, lambda targets, outputs: squared(targets, outputs)],
        loss_weights=[1.0, 3.0],
        weighted_metrics=[[keras.metrics.MeanMetricWrapper(squared, name="own")], []],
        run_eagerly=True,
    )
    model.evaluate(X, targets, verbose=0)
    model.optimizer.build(model.trainable_variables)
    upcycled = keras_moe.upcycle(model, num_experts=2)
    assert upcycled.run_eagerly and upcycled.optimizer is not model.optimizer
    assert type(upcycled.optimizer.inner_optimizer._learning_rate) is Constant
    logs = upcycled.test_on_batch(2 * X, targets, return_dict=True)
    first, side = (array(squared(*each)).mean() for each in zip(targets, upcycled(2 * X)))
    assert logs["loss"] == pytest.approx(first + 3 * side, rel=1e-5)
    own = next(logs[name] for name in logs if name.endswith("own"))
    assert own == pytest.approx(first, rel=1e-5), "nothing is left of the old model"


@on_one_backend
def test_layers_are_chosen_by_name_and_number():
    def names_after(**arguments):
        model = keras_moe.upcycle(graph_model(4), np.int64(2), **arguments)
        return [name.removesuffix("_experts") for name in inspection.moe_layers(model)]

    assert names_after(every=2) == ["up_1", "up_3"]
    assert names_after(select=["up_0", "up_3"]) == ["up_0", "up_3"]
    assert names_after(select="_[12]$") == ["up_1", "up_2"]
    assert names_after(select=lambda name: name > "up_1", every=2) == ["up_3"]


@on_one_backend
def test_a_share_of_the_hidden_features_is_drawn_again_by_the_seed_of_keras():
    kernels = []
    for _ in range(2):
        model = pair()
        dense = array(model.layers[0].kernel)
        keras.utils.set_random_seed(1)
        (mixture,) = keras_moe.upcycle(model, 4, reinitialized=0.25).layers
        kernels.append([array(weight) for weight in mixture.weights])
    for first, second in zip(*kernels):
        np.testing.assert_array_equal(first, second)
    same = (array(mixture.experts.up_kernel) == dense).all(axis=1)  # (E, H)
    assert (same.sum(axis=1) == 0.75 * H).all()
    assert len(np.unique(same, axis=0)) > 1, "other features in each expert"


FROZEN = {
    "functional": lambda: graph_model(1),
    "made frozen": lambda: keras.Sequential([keras.Input((D,)), *pair().layers], trainable=False),
}


@on_one_backend
@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_of_frozen_layers_only_the_new_routers_train(make, tmp_path):
    model = make()
    if model.trainable:
        model.trainable = False
    upcycled = keras_moe.upcycle(model)
    for each in (upcycled, saved_and_loaded(upcycled, tmp_path)):
        (layer,) = inspection.moe_layers(each).values()
        assert [weight.path for weight in each.trainable_variables] == [layer.router.kernel.path]


@on_one_backend
def test_layers_that_look_like_a_feed_forward_and_stay_dense_are_named():
    class TwoDense(keras.layers.Layer):
        def build(self, inputs_shape):
            self.up, self.down = keras.layers.Dense(8, name="own"), keras.layers.Dense(4)
            self.up.build(inputs_shape)
            self.down.build((None, 8))

        def call(self, inputs):
            return self.down(keras.ops.relu(self.up(inputs)))

    inputs = x = keras.Input((3, 4))
    dropout, whole = keras.layers.Dropout, keras.layers.SpatialDropout1D(0.1)
    chains = [[], [keras.layers.ReLU()], [keras.layers.ReLU()] * 2, [dropout(0.1)], [whole]]
    chains += [[dropout(0.1), dropout(0.2)], [dropout(0.1, noise_shape=(1, 1, 8))]]
    for number, between in enumerate(chains):
        x = keras.layers.Dense(8, "relu", name=f"up_{number}")(x)
        for layer in between:
            x = layer(x)
        x = keras.layers.Dense(4)(x)
    shared = keras.layers.Dense(8, "relu", name="shared")
    x = keras.layers.Dense(4)(shared(keras.layers.Dense(4)(shared(x))))
    x = keras.layers.Dense(8, "relu", name="active")(TwoDense(name="block")(x))
    x = keras.layers.Dense(4, "relu", name="narrow")(x)
    with pytest.warns(UserWarning, match="stay dense") as record:
        model = keras_moe.upcycle(keras.Model(inputs, x))
    told = str(record[0].message)
    for name, reason in {
        "up_1": "which `re_lu",
        "up_2": "as its outputs do not go to one layer only, or",
        "shared": "as its outputs do not go to one layer only, or",
        "own": "which the code of `block` calls",
        "active": "as `narrow` after it has an activation",
        **{f"up_{number}": "which `" for number in (4, 5, 6)},  # unlike the dropout of experts
    }.items():
        assert f"`{name}`, {reason}" in told
    assert list(inspection.moe_layers(model)) == ["up_0_experts", "up_3_experts"]


REFUSED = {
    "one is regularized": (lambda: pair(down={"kernel_regularizer": L2}), {}),
    "another regularizer": (lambda: pair(kernel_regularizer=lambda x: 0.0), {}),
    "a bias in parts": (lambda: pair(bias_regularizer=L2), {"granularity": 2}),
    "activity": (lambda: pair(up={"activity_regularizer": L2}), {}),
    "one is frozen": (lambda: pair(up={"trainable": False}), {}),
}


@on_one_backend
def test_changes_of_outputs_or_loss_are_refused_before_anything_changes():
    for make, arguments in REFUSED.values():
        model = make()
        with pytest.raises(ValueError, match=r"(?s)must .*Received: "):
            keras_moe.upcycle(model, **arguments)
        with pytest.raises(ValueError, match="must have a `MixtureOfExperts`"):
            inspection.moe_layers(model)
