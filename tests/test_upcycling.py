"""Dense models that become mixtures compute the same at first, and train, save and load."""

import keras
import numpy as np
import pytest
from backends import unless_compiled
from layer_checks import array, normal

import keras_moe
from keras_moe import inspection, layers

VOCABULARY, D, H = 12, 4, 8
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (4, 6))
TARGETS = np.roll(IDS, -1, axis=1)
X = normal(5, D)


def block_model():
    """Decoder blocks of ours."""

    def dense():
        hidden = [keras.layers.Dense(H, "gelu"), keras.layers.Dropout(0.1)]
        return keras.Sequential([*hidden, keras.layers.Dense(D)])

    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, D)(ids)
    for number in range(2):
        block = layers.TransformerDecoderBlock(2, dense(), name=f"block_{number}")
        x = block(x)
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))


def graph_model(blocks=2):
    """Dense layers that follow one another."""
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, D)(ids)
    for number in range(blocks):
        hidden = keras.layers.Dense(H, "gelu", name=f"up_{number}")(x)
        hidden = keras.layers.Dropout(0.1)(hidden)
        branch = keras.layers.Dense(D)(hidden)
        # An operation is no layer of the model.
        x = x + branch if number else keras.layers.Add()([x, branch])
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))


@keras.saving.register_keras_serializable("test_upcycling")
class Residual(keras.layers.Layer):
    """As people write them: a feed-forward in an attribute, and a config that does not tell."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.feedforward = keras.Sequential(
            [keras.layers.Dense(H), keras.layers.Activation("tanh"), keras.layers.Dense(D)]
        )

    def build(self, inputs_shape):
        self.feedforward.build(inputs_shape)

    def call(self, inputs):
        return inputs + self.feedforward(inputs)


def nested_model():
    """Foreign layers, and a sequential model inside a functional one."""
    inner = keras.Sequential(
        [
            keras.layers.LayerNormalization(),
            keras.layers.Dense(H, "relu", name="up"),
            keras.layers.Dense(D, use_bias=False),
            keras.layers.Dropout(0.1),
        ]
    )
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, D)(ids)
    x = Residual(name="first")(x)
    x = inner(Residual(name="second")(x))
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))


def randomized(model):
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape) * 0.5)
    return model


def dense_kernels(model):
    """Kernels of the feed-forwards, wherever one may be kept."""
    kept = [(weight.path, tuple(weight.shape)) for weight in model.weights]
    if keras.backend.backend() == "torch":
        kept += [(path, tuple(weight.shape)) for path, weight in model.named_parameters()]
    shapes = {(D, H), (H, D)}
    kept = [path for path, shape in kept if path.endswith("kernel") and shape in shapes]
    return [path for path in kept if "router" not in path]


CASES = {
    "blocks, copies": (block_model, {}),
    "graph, parts": (graph_model, {"num_experts": 8, "top_k": 8, "granularity": 4}),
    "nested, one expert a token": (nested_model, {"num_experts": 2, "top_k": 1}),
}


@pytest.mark.parametrize("case", unless_compiled(CASES, ["graph, parts"]))
def test_an_upcycled_model_is_equal_at_first_and_saves_loads_and_trains(case, tmp_path):
    make, arguments = CASES[case]
    model = randomized(make())
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    expected = model.predict(IDS, verbose=0)
    upcycled = keras_moe.upcycle(model, seed=0, **arguments)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(upcycled.predict(IDS, verbose=0), expected, atol=1e-6 * scale)
    moes = inspection.moe_layers(upcycled)
    assert all(name.endswith("_experts") for name in moes)
    assert moes and not dense_kernels(upcycled)
    upcycled.fit(IDS, TARGETS, verbose=0)
    upcycled.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    expected = upcycled.predict(IDS, verbose=0)
    np.testing.assert_allclose(again.predict(IDS, verbose=0), expected, atol=1e-6 * scale)
    assert again.count_params() == upcycled.count_params()


@pytest.mark.parametrize("granularity", [1, 2])
def test_a_sequential_model_stays_one(granularity):
    names = [keras.layers.Dense(H, "silu", use_bias=False, name="up"), keras.layers.Dense(D)]
    model = randomized(keras.Sequential([keras.Input((D,)), *names, keras.layers.Dense(2)]))
    expected = model.predict(X, verbose=0)
    model = keras_moe.upcycle(model, 4, granularity=granularity)
    assert isinstance(model, keras.Sequential)
    assert [layer.name for layer in model.layers][0] == "up_experts"
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, rtol=1e-5, atol=1e-6)


def squared(targets, outputs):
    return keras.ops.mean(keras.ops.square(keras.ops.subtract(targets, outputs)), axis=-1)


def test_a_model_stays_compiled_with_what_has_no_name_for_saving():
    class Constant(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

        def get_config(self):
            return {}

    inputs = keras.Input((D,))
    hidden = keras.layers.Dense(H, "relu")(inputs)
    outputs = [keras.layers.Dense(D)(hidden), keras.layers.Dense(1, name="side")(inputs)]
    model = keras.Model(inputs, outputs)
    optimizer = keras.optimizers.SGD(Constant())
    model.compile(
        keras.optimizers.LossScaleOptimizer(optimizer),
        loss=[squared, lambda targets, outputs: squared(targets, outputs)],
        loss_weights=[1.0, 3.0],
        weighted_metrics=[[keras.metrics.MeanMetricWrapper(squared, name="own")], []],
        run_eagerly=True,
    )
    targets = [X, X[:, :1]]
    model.evaluate(X, targets, verbose=0)
    model.optimizer.build(model.trainable_variables)
    upcycled = keras_moe.upcycle(model, num_experts=2)
    anew = upcycled.optimizer.inner_optimizer
    assert anew is not optimizer and type(anew._learning_rate) is Constant
    assert upcycled.run_eagerly
    logs = upcycled.test_on_batch(2 * X, targets, return_dict=True)
    first, side = (squared(*pair) for pair in zip(targets, upcycled(2 * X)))
    assert logs["loss"] == pytest.approx(array(first).mean() + 3 * array(side).mean(), rel=1e-5)
    own = next(logs[name] for name in logs if name.endswith("own"))
    assert own == pytest.approx(array(first).mean(), rel=1e-5), "nothing is left of the old model"


def names_after(**arguments):
    return list(inspection.moe_layers(keras_moe.upcycle(graph_model(blocks=4), 2, **arguments)))


def test_layers_are_chosen_by_name_and_number():
    assert names_after(every=2) == ["up_1_experts", "up_3_experts"]
    assert names_after(select=["up_0", "up_3"]) == ["up_0_experts", "up_3_experts"]
    assert names_after(select="_[12]$") == ["up_1_experts", "up_2_experts"]
    assert names_after(select=lambda name: name > "up_1", every=2) == ["up_3_experts"]


def test_a_share_of_the_hidden_features_is_drawn_anew_in_each_expert():
    model = randomized(block_model())
    dense = model.get_layer("block_0").feedforward.layers[0]
    kernel = array(dense.kernel)
    bank = (
        keras_moe.upcycle(model, 4, reinitialized=0.25, seed=1)
        .get_layer("block_0")
        .feedforward.experts
    )
    same = (array(bank.up_kernel) == kernel).all(axis=1)  # (E, H)
    assert (same.sum(axis=1) == 0.75 * H).all()
    assert len(np.unique(same, axis=0)) > 1, "other features in each expert"
    down_same = (array(bank.down_kernel) == array(bank.down_kernel)[:1]).all(axis=2)
    assert (down_same == (same & same[:1])).all() or down_same[0].all()


L1, L2 = keras.regularizers.L1(0.1), keras.regularizers.L2(0.1)


def pair(up=None, down=None, **both):
    """A model of one feed-forward, with arguments of its layers."""
    up = keras.layers.Dense(H, **{"activation": "relu", "name": "up", **both, **(up or {})})
    down = keras.layers.Dense(D, name="down", **both, **(down or {}))
    return randomized(keras.Sequential([keras.Input((D,)), up, down]))


REGULARIZED = [
    ({"kernel_regularizer": L2, "bias_regularizer": L1}, 1),
    ({"kernel_regularizer": keras.regularizers.L1L2(0.1, 0.2)}, 2),
]


@pytest.mark.parametrize("arguments, granularity", REGULARIZED)
def test_regularizers_add_what_they_added_to_the_dense_layers(arguments, granularity, tmp_path):
    model = pair(**arguments)
    model.compile("sgd", "mse")
    expected = model.evaluate(X, X, verbose=0)
    upcycled = keras_moe.upcycle(model, 8, granularity=granularity)
    upcycled.save(tmp_path / "model.keras")
    for each in (upcycled, keras.saving.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(each.evaluate(X, X, verbose=0), expected, rtol=1e-5)


def test_experts_of_frozen_layers_are_frozen(tmp_path):
    upcycled = keras_moe.upcycle(pair(trainable=False))
    upcycled.save(tmp_path / "model.keras")
    for each in (upcycled, keras.saving.load_model(tmp_path / "model.keras")):
        (trained,) = each.trainable_variables
        assert "router" in trained.path


ERRORS = {
    "nothing found": (lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)]), {}),
    "no such name": (block_model, {"select": ["block_9"]}),
    "no match": (block_model, {"select": "encoder"}),
    "parts that are left over": (block_model, {"granularity": 2, "top_k": 3}),
    "width": (block_model, {"granularity": 3, "top_k": 3, "num_experts": 9}),
    "every": (block_model, {"every": 3}),
    "share": (block_model, {"reinitialized": 1.0}),
    "top_k": (block_model, {"top_k": 9}),
    "one is regularized": (lambda: pair(down={"kernel_regularizer": L2}), {}),
    "a regularizer of another class": (lambda: pair(kernel_regularizer=lambda x: 0.0), {}),
    "a bias in parts": (lambda: pair(bias_regularizer=L2), {"granularity": 2}),
    "a softmax in parts": (lambda: pair(up={"activation": "softmax"}), {"granularity": 2}),
    "constraint": (lambda: pair(up={"kernel_constraint": "max_norm"}), {}),
    "activity": (lambda: pair(up={"activity_regularizer": L2}), {}),
    "one is frozen": (lambda: pair(up={"trainable": False}), {}),
}


@pytest.mark.parametrize("make, arguments", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_looked_for_and_change_nothing(make, arguments):
    model = make()
    with pytest.raises(ValueError, match=r"(?s)must .*Received: .*\. \w"):
        keras_moe.upcycle(model, **arguments)
    assert not inspection.has_moe_layers(model)


def hub_backbone(name):
    hub = pytest.importorskip("keras_hub").models
    sizes = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": D, "intermediate_dim": H}
    if name == "Llama":
        return hub.LlamaBackbone(num_query_heads=2, num_key_value_heads=2, **sizes)
    return getattr(hub, f"{name}Backbone")(num_heads=2, max_sequence_length=8, **sizes)


@pytest.mark.parametrize("name", ["Bert", "GPT2", "Llama"])
def test_backbones_of_keras_hub(name, tmp_path):
    model = randomized(hub_backbone(name))
    inputs = {"token_ids": IDS, "padding_mask": IDS > 2, "segment_ids": 0 * IDS}
    inputs = {each.name: inputs[each.name] for each in model.inputs}
    as_list = lambda outputs: [array(leaf) for leaf in keras.tree.flatten(outputs)]  # noqa: E731
    expected = as_list(model(inputs))
    upcycled = keras_moe.upcycle(model, num_experts=4, seed=0)
    assert upcycled is model and isinstance(model, type(hub_backbone(name)))
    for actual, each in zip(as_list(model(inputs)), expected, strict=True):
        np.testing.assert_allclose(actual, each, atol=1e-6 * np.abs(each).max())
    assert not dense_kernels(model)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for actual, each in zip(as_list(again(inputs)), as_list(model(inputs)), strict=True):
        np.testing.assert_allclose(actual, each, atol=1e-6 * np.abs(each).max())
    assert len(inspection.moe_layers(again)) == 2


def test_a_mixture_is_not_searched_for_dense_layers():
    expert = [keras.layers.Dense(H, "relu"), keras.layers.Dense(D)]
    bank = layers.LayerExperts([keras.Sequential(expert)])
    mixture = layers.MixtureOfExperts(bank, keras_moe.routers.TopKRouter(1, 1))
    with pytest.raises(ValueError, match="dense feed-forward"):
        keras_moe.upcycle(keras.Sequential([keras.Input((D,)), mixture]))


def test_layers_that_look_like_a_feed_forward_and_stay_dense_are_named():
    between = [["relu"], [keras.layers.ReLU()], ["relu", "tanh"], ["relu", "tanh", "gelu"]]
    inputs = x = keras.Input((4,))
    for number, activations in enumerate(between):
        x = keras.layers.Dense(8, name=f"up_{number}")(x)
        for activation in activations:
            is_name = isinstance(activation, str)
            x = (keras.layers.Activation(activation) if is_name else activation)(x)
        x = keras.layers.Dense(4)(x)
    with pytest.warns(UserWarning, match=r"stay dense: \['up_1', 'up_2', 'up_3'\]"):
        model = keras_moe.upcycle(keras.Model(inputs, x))
    assert list(inspection.moe_layers(model)) == ["up_0_experts"]


def test_keras_sets_the_seed_of_routers_that_are_given_none():
    kernels = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        model = keras_moe.upcycle(graph_model(1), num_experts=4, reinitialized=0.25)
        (layer,) = inspection.moe_layers(model).values()
        kernels.append([array(layer.router.kernel), array(layer.experts.up_kernel)])
    for first, second in zip(*kernels):
        np.testing.assert_array_equal(first, second)


def sequential(**kwargs):
    return keras.Sequential(
        [keras.Input((D,)), keras.layers.Dense(H, "relu"), keras.layers.Dense(D)], **kwargs
    )


@pytest.mark.parametrize(
    "make",
    [lambda: sequential(trainable=False), sequential, lambda: graph_model(1)],
    ids=["made frozen", "sequential", "functional"],
)
def test_of_a_frozen_model_only_the_new_routers_train(make):
    model = make()
    model.trainable = False
    upcycled = keras_moe.upcycle(model, num_experts=4)
    (layer,) = inspection.moe_layers(upcycled).values()
    assert [weight.path for weight in upcycled.trainable_variables] == [layer.router.kernel.path]
