"""Models with fewer experts: which go, what stays as it was, and that everything still works."""

import functools

import keras
import numpy as np
import pytest
import reference
from backends import QUICK_JIT, on_one_backend, saved_and_loaded, to_numpy, unless_compiled
from layer_checks import array, normal

from keras_moe import layers, losses, ops, routers, surgery
from keras_moe._internal.keras_internals import unlocked
from keras_moe.surgery.cutting import merge
from keras_moe.surgery.measuring import importance

D, H, E = 4, 8, 8
X = normal(32, D)  # One batch of `fit`: another size would be compiled again.

BANKS = {
    "plain": lambda: layers.FeedForwardExperts(E, H, bias_initializer="normal"),
    "gated": lambda: layers.GatedExperts(E, H, use_bias=True),
    "linear": lambda: layers.LinearExperts(E, D, bias_initializer="normal"),
    "layers": lambda: layers.LayerExperts(
        [keras.Sequential([keras.layers.Dense(H, "relu"), keras.layers.Dense(D)]) for _ in range(E)]
    ),
}
ROUTERS = {
    "top_k": lambda: routers.TopKRouter(E, kernel_initializer="normal"),
    "biased": lambda: routers.TopKRouter(E, score="sigmoid", balancer="loss_free"),
    "noisy": lambda: routers.NoisyTopKRouter(E),
    "cosine": lambda: routers.CosineRouter(E, projection_dim=E),
    "groups": lambda: routers.GroupLimitedRouter(E, num_groups=2, top_groups=1),
    "top_p": lambda: routers.TopPRouter(E),
    "relu": lambda: routers.ReLURouter(E),
}


def single(experts=None, router=None, router_losses=None):
    """A built MoE layer, and the weights of its experts and its router."""
    experts, router = experts or BANKS["plain"](), router or ROUTERS["top_k"]()
    layer = layers.MixtureOfExperts(experts, router, router_losses, name="moe")
    layer.build((None, D))
    weights = {weight.name: array(weight) for weight in layer.experts.weights}
    return layer, {"kernel": array(layer.router.kernel), **weights}


def model_of(layer):
    model = keras.Sequential([keras.Input((D,)), layer])
    model.compile("adam", "mse", jit_compile=QUICK_JIT)
    return model


def prune(layer, experts):
    return surgery.prune_experts(layer, by=np.isin(np.arange(E), experts), keep=len(experts))


def names_and_shapes(layer):
    return [(weight.path, tuple(weight.shape)) for weight in layer.weights]


@on_one_backend
def test_experts_that_stay_compute_as_before():
    layer, weights = single()
    experts = np.array([1, 4, 6])
    layer.expert_counts.assign(np.arange(E))
    prune(layer, experts)
    np.testing.assert_array_equal(array(layer.expert_counts), [0, 0, 0])
    kept = {name: value[experts] for name, value in weights.items() if name != "kernel"}
    kept["kernel"] = weights["kernel"][:, experts]
    expected = reference.moe(X, kept, "gelu", top_k=2)
    np.testing.assert_allclose(array(layer(X)), expected.outputs, atol=1e-5)


@on_one_backend
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_routers_lose_columns_and_nothing_else(router):
    layer, _ = single(router=router())
    experts = np.array([0, 2, 3, 7])
    before = array(layer.router(X).logits)
    prune(layer, experts)
    routing = layer.router(X)
    np.testing.assert_allclose(array(routing.logits), before[:, experts], rtol=1e-5, atol=1e-6)
    assert array(routing.indices).max() < 4
    again = type(layer).from_config(layer.get_config())
    again.build((None, D))
    assert sorted(names_and_shapes(layer)) == sorted(names_and_shapes(again))


OPERATIONS = {
    "prune, plain": ("plain", surgery.prune_experts),
    "prune, layers": ("layers", surgery.prune_experts),
    "prune, linear": ("linear", surgery.prune_experts),
    "merge, gated": ("gated", surgery.merge_experts),
}


@on_one_backend
@pytest.mark.parametrize("operation", OPERATIONS)
def test_models_with_fewer_experts_train_save_and_load(operation, tmp_path):
    bank, operate = OPERATIONS[operation]
    router_losses = [losses.LoadBalance(scope="global"), losses.RouterZ()]
    layer, _ = single(BANKS[bank](), ROUTERS["biased"](), router_losses)
    model = model_of(layer)
    model.fit(X, X, verbose=0)
    before, size = model.evaluate(X, X, verbose=0), model.count_params()
    report = operate(model, keep=0.6, data=[(X[:24], X[:24]), (X[24:], X[24:])])
    assert len(report.experts["moe"]) == 5 and model.count_params() < size
    after = model.evaluate(X, X, verbose=0)
    assert [report.loss_before, report.loss_after] == pytest.approx([before, after], rel=1e-5)
    model.fit(X, X, verbose=0)
    again = saved_and_loaded(model, tmp_path)
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(again.predict(X, verbose=0), expected, atol=1e-6)
    assert again.count_params() == model.count_params()


@on_one_backend
def test_surgery_does_not_round_float64():
    keras.config.set_dtype_policy("float64")
    layer, before = single()
    prune(layer, [1, 3])
    np.testing.assert_array_equal(array(layer.experts.up_kernel), before["up_kernel"][[1, 3]])


@on_one_backend
def test_layers_may_end_with_different_numbers_of_experts():
    keep = {"0": 3, "2": 0.5, "3": 2.0, "4": np.float32(0.5), "5": np.array(7), "6": 1.0}
    numbers = [3, E, 4, 2, 4, 7, E]
    each = [layers.MixtureOfExperts(BANKS["gated"](), name=str(index)) for index in range(7)]
    # Contributions are those of experts that tokens choose: this layer is left out.
    other = layers.MixtureOfExperts(BANKS["plain"](), routers.ExpertChoiceRouter(E))
    model = keras.Sequential([keras.Input((D,)), *each, other])
    surgery.prune_experts(model, "saliency", keep=keep, data=[X])
    assert [layer.experts.num_experts for layer in model.layers] == [*numbers, E]
    assert tuple(model.predict(X, verbose=0).shape) == X.shape


@on_one_backend
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
    means = norms / np.maximum(counts, 1)
    for by, scores in {"usage": counts, "saliency": means, "contribution": norms}.items():
        found = importance(by, layer, {"moe": layer}, [X[:16], X[16:]])["moe"]
        np.testing.assert_allclose(found, scores, rtol=1e-5)
    report = surgery.prune_experts(layer, "saliency", keep=3, data=[X])
    assert sorted(report.experts["moe"]) == [[e] for e in sorted(np.argsort(-means)[:3])]


@on_one_backend
@pytest.mark.parametrize("router", [routers.TopPRouter(E), routers.DenseRouter(E)])
def test_saliency_is_a_mean_over_real_tokens_whose_weights_differ(router):
    layer, _ = single(router=router)
    x, mask = X[None], np.arange(len(X))[None] % 4 > 0
    call = functools.partial(layer, mask=mask)
    saliency = importance("saliency", call, {"moe": layer}, [x])["moe"]
    _, routing = to_numpy(layer(x, mask=mask, return_routing=True))
    for expert in range(E):
        only = np.full((len(X), 1), expert, "int32")
        plan = ops.GroupedPlan.of(only, np.ones_like(only, "float32"), E)
        norms = np.linalg.norm(array(layer.experts(keras.ops.convert_to_tensor(X), plan)), axis=1)
        tokens, places = np.nonzero((routing.indices == expert) & routing.mask[:, None])
        added = routing.weights[tokens, places] * norms[tokens]
        np.testing.assert_allclose(saliency[expert], added.sum() / max(len(tokens), 1), rtol=1e-4)


@on_one_backend
def test_saliency_of_experts_of_whole_samples():
    images = normal(5, 4, 3, 2)
    bank = layers.LayerExperts([keras.layers.Conv2D(6, 2, padding="same") for _ in range(4)])
    layer = layers.MixtureOfExperts(bank, token_axes=1)
    saliency = importance("saliency", layer, {"moe": layer}, [images])["moe"]
    _, routing = to_numpy(layer(images, return_routing=True))
    for number, expert in enumerate(bank.layers):
        samples, places = np.nonzero(routing.indices == number)
        norms = np.linalg.norm(array(expert(images)).reshape(5, -1)[samples], axis=1)
        added = norms * routing.weights[samples, places]
        np.testing.assert_allclose(saliency[number], added.sum() / max(len(samples), 1), rtol=1e-4)


@on_one_backend
def test_equal_experts_merge_without_loss_though_their_hidden_features_are_shuffled():
    layer, weights = single(router=routers.TopKRouter(E, 1, kernel_initializer="normal"))
    order = np.random.default_rng(0).permutation(H)
    copies = np.arange(E) // 2 * 2  # Each odd expert equals the one before.
    # Ties go to the first of each pair, which therefore stays.
    layer.router.kernel.assign(weights.pop("kernel")[:, copies])
    for name, value in weights.items():
        value = weights[name] = value[copies]
        if name != "down_bias":
            axis = 1 if name == "down_kernel" else -1
            value[1::2] = np.take(value[1::2], order, axis)
        getattr(layer.experts, name).assign(value)
    merge(layer.experts, [[expert, expert + 1] for expert in range(0, E, 2)], np.ones(E))
    report = surgery.merge_experts(layer, keep=4, data=[normal(200, D)])
    assert report.experts == {"moe": [[0, 1], [2, 3], [4, 5], [6, 7]]}
    assert report.loss_before is report.loss_after is None
    for name, value in weights.items():
        merged = array(getattr(layer.experts, name))
        np.testing.assert_allclose(merged, value[::2], atol=1e-6)


@on_one_backend
def test_merged_experts_are_averaged_by_usage():
    layer, weights = single()
    for name in ("up_kernel", "up_bias", "down_kernel"):  # Else features would be matched.
        weights[name] = np.broadcast_to(weights[name][:1], weights[name].shape)
        getattr(layer.experts, name).assign(weights[name])
    counts = reference.moe(X, weights, "gelu", top_k=2).routing.counts
    groups = surgery.merge_experts(layer, keep=3, data=[X]).experts["moe"]
    bias = weights["down_bias"]
    expected = [np.average(bias[group], axis=0, weights=counts[group] + 1e-6) for group in groups]
    np.testing.assert_allclose(array(layer.experts.down_bias), expected, atol=1e-6)
    assert sorted(sum(groups, [])) == list(range(E))


@on_one_backend
def test_linear_experts_are_averaged_by_usage():
    layer, weights = single(BANKS["linear"]())
    counts = array(layer(X, return_routing=True)[1].counts)
    groups = surgery.merge_experts(layer, keep=3, data=[X]).experts["moe"]
    for name in ("up_kernel", "up_bias"):
        of_groups = [(weights[name][group], counts[group] + 1e-6) for group in groups]
        expected = [np.average(stack, axis=0, weights=shares) for stack, shares in of_groups]
        np.testing.assert_allclose(array(getattr(layer.experts, name)), expected, atol=1e-6)


@on_one_backend
def test_experts_that_are_layers_merge():
    layer = layers.MixtureOfExperts(BANKS["layers"]())
    layer.build((None, D))
    for other in layer.experts.layers[1:]:
        other.set_weights(layer.experts.layers[0].get_weights())
    before = array(layer(X))
    surgery.merge_experts(layer, keep=2, data=[X])
    np.testing.assert_allclose(array(layer(X)), before, atol=1e-6)


@on_one_backend
@pytest.mark.parametrize("bank", BANKS)
def test_what_is_frozen_stays_frozen(bank):
    layer, _ = single(BANKS[bank]())
    layer.trainable = False
    layer.experts.weights[0].trainable = layer.router.weights[0].trainable = True
    keep = layer.experts.layers[0].weights if bank == "layers" else layer.experts.weights
    before = [weight.trainable for weight in keep]
    surgery.prune_experts(layer, by=-np.arange(E), keep=4)
    after = [weight.trainable for weight in layer.experts.weights]
    assert after[: len(before)] == before and any(before) and not all(before)
    assert [weight.trainable for weight in layer.router.weights] == [True]
    assert not layer.experts.trainable


@pytest.mark.parametrize("top_k", unless_compiled([1, 3], [3]))
def test_top_k_changes_in_compiled_prediction(top_k):
    model = model_of(single()[0])
    before = model.predict(X, verbose=0)
    surgery.set_top_k(model, {"moe": np.int32(top_k)})
    after = model.predict(X, verbose=0)
    assert np.abs(after - before).max() > 1e-4
    routing = model.layers[0].router(X)
    assert routing.indices.shape[1] == top_k
    np.testing.assert_allclose(array(routing.weights).sum(axis=1), 1.0, rtol=1e-5)
    again = type(model).from_config(model.get_config())
    again.set_weights(model.get_weights())
    np.testing.assert_allclose(again.predict(X, verbose=0), after, atol=1e-6)


@pytest.mark.parametrize("bank", unless_compiled(["plain", "gated", "linear"], ["plain"]))
def test_copied_experts_train_on_and_the_optimizer_starts_again(bank, tmp_path):
    layer, _ = single(BANKS[bank](), ROUTERS["biased"]())
    model = model_of(layer)
    model.fit(X, X, epochs=2, verbose=0)
    before = layer.experts.get_weights()
    report = surgery.add_experts(model, factor=3, noise=0.0, data=[(X, X)])
    assert report.experts["moe"] == [[expert] for expert in range(E) for _ in range(3)]
    assert np.isfinite([report.loss_before, report.loss_after]).all()
    assert not array(layer.expert_counts).any()
    for weight, value in zip(layer.experts.weights, before, strict=True):
        np.testing.assert_array_equal(array(weight), np.repeat(value, 3, axis=0))
    assert array(model.optimizer.iterations) == 0
    model.fit(X, X, verbose=0)
    again = saved_and_loaded(model, tmp_path)
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(again.predict(X, verbose=0), expected, atol=1e-6)
    assert again.count_params() == model.count_params()


@on_one_backend
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [None, True])
@pytest.mark.parametrize("balancer", [None, "loss_free"])
def test_with_one_expert_a_token_copies_leave_the_outputs(score, renormalize, balancer):
    arguments = {"score": score, "renormalize": renormalize, "kernel_initializer": "normal"}
    layer, _ = single(router=routers.TopKRouter(E, 1, balancer=balancer, **arguments))
    if balancer:
        layer.router.selection_bias.assign(np.linspace(-0.2, 0.2, E))
    expected = array(layer(X))
    surgery.add_experts(layer, factor=3, noise=0.0)
    np.testing.assert_allclose(array(layer(X)), expected, atol=1e-6)
    again = type(layer).from_config(layer.get_config())
    again.build((None, D))
    again.set_weights(layer.get_weights())
    np.testing.assert_allclose(array(again(X)), expected, atol=1e-6)


@on_one_backend
@pytest.mark.parametrize("router", ["top_k", "biased", "cosine"])
def test_copies_serve_as_fewer_experts_and_as_all_with_more_a_token(router):
    layer, _ = single(router=ROUTERS[router]())
    both = array(layer(X))
    surgery.set_top_k(layer, 1)
    with unlocked(layer.router):
        layer.router.renormalize = True
    best = array(layer(X))
    surgery.set_top_k(layer, 2)
    surgery.add_experts(layer, factor={"moe": 2}, noise=0.0)
    np.testing.assert_allclose(array(layer(X)), best, atol=1e-5)
    surgery.set_top_k(layer, 4)
    np.testing.assert_allclose(array(layer(X)), both, atol=1e-5)


@on_one_backend
def test_noise_makes_copies_differ_and_leaves_what_is_frozen():
    layer, weights = single()
    layer.experts.up_kernel.trainable = False
    surgery.add_experts(layer, factor=2, noise=0.1, seed=0)
    frozen = np.repeat(weights["up_kernel"], 2, axis=0)
    np.testing.assert_array_equal(array(layer.experts.up_kernel), frozen)
    columns = array(layer.router.kernel), np.repeat(weights["kernel"], 2, axis=1)
    kernels = array(layer.experts.down_kernel), np.repeat(weights["down_kernel"], 2, axis=0)
    for new, old in (columns, kernels):
        assert np.std(new - old) == pytest.approx(0.1 * old.std(), rel=0.3)
    assert (kernels[0][::2] != kernels[0][1::2]).all()
    for seed in (0, 1):
        other, _ = single()
        other.experts.up_kernel.trainable = False
        other.set_weights([weights.get(each.name, array(each)) for each in other.weights])
        surgery.add_experts(other, factor=2, noise=0.1, seed=seed)
        assert (array(other.experts.down_kernel) == kernels[0]).all() == (seed == 0)


def shared_bank():
    bank = layers.FeedForwardExperts(E, H)
    return keras.Sequential([keras.Input((D,)), *(layers.MixtureOfExperts(bank) for _ in "ab")])


def shared_router():
    router = routers.TopKRouter(E, top_k=2)
    moes = [layers.MixtureOfExperts(BANKS["plain"](), router, name=name) for name in "ab"]
    return keras.Sequential([keras.Input((D,)), *moes])


NANS = np.full_like(X, np.nan)
REFUSED = {
    "empty data": lambda: surgery.merge_experts(single()[0], data=[X[:0]]),
    "logits that are NaN": lambda: surgery.prune_experts(single()[0], data=[NANS]),
    "half a group": lambda: prune(single(router=ROUTERS["groups"]())[0], np.arange(5)),
    "a shared bank": lambda: surgery.prune_experts(shared_bank(), np.ones(E)),
    "one task": lambda: surgery.prune_experts(
        layers.MultiGateMixtureOfExperts(BANKS["plain"](), 1, "top_k"), np.ones(E)
    ),
    "another number of a shared router": lambda: surgery.set_top_k(shared_router(), {"a": 1}),
    "slots": lambda: surgery.prune_experts(single(router=routers.SoftRouter(E))[0], np.ones(E)),
}


@on_one_backend
@pytest.mark.parametrize("operate", REFUSED.values(), ids=REFUSED)
def test_wrong_results_are_refused(operate):
    with pytest.raises(ValueError, match=r"(?s)must .*Received: "):
        operate()
