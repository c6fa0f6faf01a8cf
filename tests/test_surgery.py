"""Models with fewer experts: which go, what stays as it was, and that all goes on working."""

import keras
import numpy as np
import pytest
import reference
from backends import unless_compiled
from layer_checks import array, normal

from keras_moe import layers, losses, routers, surgery

D, H, E = 4, 8, 8


def single(experts=None, router=None):
    """A MoE layer with random weights, and those weights."""
    layer = layers.MixtureOfExperts(
        experts or layers.FeedForwardExperts(E, H, bias_initializer="normal"),
        router or routers.TopKRouter(E, kernel_initializer="normal"),
        name="moe",
    )
    layer.build((None, D))
    return layer, weights_of(layer)


def weights_of(layer):
    names = {weight.name: array(weight) for weight in layer.experts.weights}
    return {"kernel": array(layer.router.kernel), **names}


# One batch of `fit`: another size would be compiled again.
X = normal(32, D)

BANKS = {
    "plain": lambda: layers.FeedForwardExperts(E, H),
    "gated": lambda: layers.GatedExperts(E, H, use_bias=True),
    "layers": lambda: layers.LayerExperts(
        [keras.Sequential([keras.layers.Dense(H, "relu"), keras.layers.Dense(D)]) for _ in range(E)]
    ),
}
ROUTERS = {
    "top_k": lambda: routers.TopKRouter(E),
    "biased": lambda: routers.TopKRouter(E, score="sigmoid", balancer="loss_free"),
    "noisy": lambda: routers.NoisyTopKRouter(E),
    "cosine": lambda: routers.CosineRouter(E, projection_dim=E),
    "groups": lambda: routers.GroupLimitedRouter(E, num_groups=2, top_groups=1),
    "top_p": lambda: routers.TopPRouter(E),
}


def test_what_stays_is_as_it_was():
    layer, weights = single()
    experts = np.array([1, 4, 6])
    surgery.prune_experts(layer, by=np.isin(np.arange(E), experts), keep=3)
    kept = {name: value[experts] for name, value in weights.items() if name != "kernel"}
    kept["kernel"] = weights["kernel"][:, experts]
    expected = reference.moe(X, kept, "gelu", top_k=2)
    np.testing.assert_allclose(array(layer(X)), expected.outputs, atol=1e-5)
    assert [tuple(weight.shape) for weight in (layer.router.kernel, layer.expert_counts)] == [
        (D, 3),
        (3,),
    ]


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_routers_lose_columns_and_nothing_else(router):
    layer, _ = single(router=router())
    experts = np.array([0, 2, 3, 7])
    before = array(layer.router(X).logits)
    surgery.prune_experts(layer, by=np.isin(np.arange(E), experts), keep=4)
    routing = layer.router(X)
    np.testing.assert_allclose(array(routing.logits), before[:, experts], rtol=1e-5, atol=1e-6)
    assert array(routing.indices).max() < 4
    again = type(layer).from_config(layer.get_config())
    again.build((None, D))
    shapes = [[tuple(weight.shape) for weight in each.weights] for each in (layer, again)]
    assert shapes[0] == shapes[1]


OPERATIONS = {
    "prune, plain": ("plain", surgery.prune_experts),
    "prune, layers": ("layers", surgery.prune_experts),
    "merge, gated": ("gated", surgery.merge_experts),
}


@pytest.mark.parametrize("operation", unless_compiled(OPERATIONS, ["prune, layers"]))
def test_models_with_fewer_experts_train_save_and_load(operation, tmp_path):
    bank, operate = OPERATIONS[operation]
    router_losses = [losses.GlobalLoadBalance(), losses.RouterZ()]
    layer = layers.MixtureOfExperts(BANKS[bank](), ROUTERS["biased"](), router_losses)
    model = keras.Sequential([keras.Input((D,)), layer])
    model.compile("adam", "mse")
    model.fit(X, X, verbose=0)
    before = model.count_params()
    report = operate(model, keep=0.6, data=[(X, X)])
    assert len(report.experts[layer.name]) == 5
    assert np.isfinite([report.loss_before, report.loss_after]).all()
    assert model.count_params() < before
    model.fit(X, X, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(again.predict(X, verbose=0), expected, atol=1e-6)
    assert again.count_params() == model.count_params()


def test_layers_may_end_with_different_numbers_of_experts():
    names = ("first", "second", "third")
    each = {name: layers.MixtureOfExperts(BANKS["gated"](), name=name) for name in names}
    model = keras.Sequential([keras.Input((D,)), *each.values()])
    surgery.prune_experts(model, np.arange(E), keep={"first": 3, "third": 0.5})
    assert [layer.experts.num_experts for layer in each.values()] == [3, E, 4]
    assert tuple(model.predict(X, verbose=0).shape) == X.shape


def test_layers_that_are_left_alone_are_neither_measured_nor_checked():
    # Contributions are those of experts that tokens choose, and here experts choose.
    bank = layers.FeedForwardExperts(E, H)
    others = [layers.MixtureOfExperts(bank, routers.ExpertChoiceRouter(E)) for _ in range(2)]
    model = keras.Sequential([keras.Input((D,)), single()[0], *others])
    surgery.prune_experts(model, "saliency", keep={"moe": 3}, data=[X])
    assert [layer.experts.num_experts for layer in model.layers] == [3, E, E]


def test_experts_that_are_layers_merge():
    first, *others = BANKS["layers"]().layers
    bank = layers.LayerExperts([first, *others])
    layer = layers.MixtureOfExperts(bank)
    layer.build((None, D))
    for other in others:
        other.set_weights(first.get_weights())
    before = array(layer(X))
    surgery.merge_experts(layer, keep=2, data=[X])
    np.testing.assert_allclose(array(layer(X)), before, atol=1e-6)


def test_the_losses_are_those_of_an_evaluation():
    layer, _ = single()
    model = keras.Sequential([keras.Input((D,)), layer])
    model.compile("adam", "mse")
    before = model.evaluate(X, X, batch_size=16, verbose=0)
    data = [(X[:16], X[:16]), (X[16:], X[16:])]
    report = surgery.prune_experts(model, keep=3, data=data)
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    after = model.evaluate(X, X, batch_size=16, verbose=0)
    assert report.loss_after == pytest.approx(after, rel=1e-5)


def test_scores_are_counts_and_contributions():
    layer, weights = single()
    run = reference.moe(X, weights, "gelu", top_k=2)
    norms = np.zeros(E)
    for expert, queue in enumerate(run.served):
        of_expert = {name: value[expert] for name, value in weights.items() if name != "kernel"}
        for t, choice in queue:
            output = reference.expert(X[t].astype("float64"), of_expert, "gelu")
            norms[expert] += run.routing.weights[t, choice] * np.linalg.norm(output)
    counts = run.routing.counts
    measures = {
        "usage": counts,
        "saliency": norms / np.maximum(counts, 1),
        "contribution": norms,
    }
    for by, scores in measures.items():
        layer, _ = single()
        for name, value in weights.items():
            holder = layer.router if name == "kernel" else layer.experts
            getattr(holder, name).assign(value)
        report = surgery.prune_experts(layer, by, keep=3, data=[X[:16], X[16:]])
        kept = np.sort(np.argsort(-scores, kind="stable")[:3])
        assert report.experts["moe"] == [[expert] for expert in kept]


def test_equal_experts_merge_without_loss_though_their_hidden_features_are_shuffled():
    layer, weights = single(router=routers.TopKRouter(E, 1, kernel_initializer="normal"))
    order = np.random.default_rng(0).permutation(H)
    bank, copies = layer.experts, np.arange(E) // 2 * 2  # each odd expert equals the one before
    for name, value in weights.items():
        if name == "kernel":
            # Ties go to the first of each pair, which therefore stays.
            layer.router.kernel.assign(value[:, copies])
            continue
        value = value[copies]
        if name == "down_kernel":
            value[1::2] = value[1::2][:, order]
        elif name != "down_bias":
            value[1::2] = value[1::2][..., order]
        getattr(bank, name).assign(value)
    before = weights_of(layer)
    report = surgery.merge_experts(layer, keep=4, data=[normal(200, D)])
    assert report.loss_before is report.loss_after is None
    for index, made_of in enumerate(report.experts["moe"]):
        for name in ("up_kernel", "down_kernel", "up_bias", "down_bias"):
            merged = np.sort(array(getattr(layer.experts, name))[index], axis=None)
            np.testing.assert_allclose(merged, np.sort(before[name][made_of[0]], None), atol=1e-6)
    assert report.experts["moe"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_changes_in_compiled_prediction(top_k):
    layer, _ = single()
    model = keras.Sequential([keras.Input((D,)), layer])
    before = model.predict(X, verbose=0)
    surgery.set_top_k(model, {"moe": top_k})
    after = model.predict(X, verbose=0)
    assert np.abs(after - before).max() > 1e-4
    routing = layer.router(X)
    assert routing.indices.shape[1] == top_k
    np.testing.assert_allclose(array(routing.weights).sum(axis=1), 1.0, rtol=1e-5)
    again = type(model).from_config(model.get_config())
    again.set_weights(model.get_weights())
    np.testing.assert_allclose(again.predict(X, verbose=0), after, atol=1e-6)


def expert_choice():
    return single(router=routers.ExpertChoiceRouter(E))[0]


def zero_computation():
    bank = layers.ZeroComputationExperts(layers.FeedForwardExperts(E - 1, H), num_zero=1)
    return single(bank)[0]


def shared_bank():
    bank = layers.FeedForwardExperts(E, H)
    inputs = keras.Input((D,))
    first, second = (layers.MixtureOfExperts(bank) for _ in range(2))
    return keras.Model(inputs, second(first(inputs)))


def with_lora():
    layer = plain()
    layer.experts.enable_lora(2)
    return layer


def plain():
    return single()[0]


def hashed():
    router = routers.HashRouter(vocabulary_size=9)
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(E, H), router, name="moe")
    layer.build((None, D))
    return layer


ERRORS = {
    "too few": (lambda: surgery.prune_experts(plain(), np.ones(E), keep=1)),
    "share": (lambda: surgery.prune_experts(plain(), np.ones(E), keep=1.5)),
    "no data": (lambda: surgery.prune_experts(plain(), "saliency")),
    "merge without data": (lambda: surgery.merge_experts(plain())),
    "an array as data": (lambda: surgery.prune_experts(plain(), data=X)),
    "measure": (lambda: surgery.prune_experts(plain(), "salience", data=[X])),
    "scores": (lambda: surgery.prune_experts(plain(), np.ones(E - 1))),
    "name": (lambda: surgery.prune_experts(plain(), np.ones(E), keep={"other": 4})),
    "router": (lambda: surgery.prune_experts(expert_choice(), np.ones(E))),
    "bank": (lambda: surgery.prune_experts(zero_computation(), np.ones(E))),
    "groups": (lambda: surgery.prune_experts(single(router=ROUTERS["groups"]())[0], np.ones(E), 5)),
    "shared": (lambda: surgery.prune_experts(shared_bank(), np.ones(E))),
    "merge with LoRA": (lambda: surgery.merge_experts(with_lora(), data=[X])),
    "top_k": (lambda: surgery.set_top_k(plain(), E + 1)),
    "no top_k": (lambda: surgery.set_top_k(expert_choice(), 1)),
    "a table": (lambda: surgery.set_top_k(hashed(), 3)),
}


@pytest.mark.parametrize("operate", ERRORS.values(), ids=ERRORS)
def test_errors_state_the_rule_and_the_fix(operate):
    with pytest.raises(ValueError, match=r"(?s)must |are measured.*Received: .*\. \w"):
        operate()
