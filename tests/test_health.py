"""ExpertHealth: a collapsed run is found early, a healthy one never; every verdict and its fix."""

import random
import warnings

import keras
import layer_checks
import numpy as np
import pytest
from backends import on_one_backend
from forced_router import ForcedRouter
from layer_checks import D, E, moe, one_hot_router

from keras_moe import health, layers, losses, routers
from keras_moe.callbacks import ExpertHealth, ExpertMonitor

EXPERTS, STEPS, BATCH = 8, 60, 16


def clustered(seed, size=STEPS * BATCH):
    """Tokens of sixteen clusters, each with a linear map of its own to learn."""
    generator = np.random.default_rng(seed)
    cluster = generator.integers(0, 16, size)
    x = generator.normal(size=(16, D))[cluster] + 0.5 * generator.normal(size=(size, D))
    maps = generator.normal(size=(16, D, 1)) / np.sqrt(D)
    return x.astype("float32"), np.einsum("nd,ndo->no", x, maps[cluster]).astype("float32")


def model_of(layer, optimizer=None, **kwargs):
    optimizer = optimizer or keras.optimizers.Adam(1e-2)
    return layer_checks.model_of(layer, keras.layers.Dense(1), optimizer=optimizer, **kwargs)


def expert_layer(router="top_k", router_losses=("load_balance", "router_z")):
    experts = layers.FeedForwardExperts(EXPERTS, 8)
    return layers.MixtureOfExperts(experts, router, router_losses, name="moe")


def collapsed_layer(router_losses=()):
    """A router of zeros has no gradient to leave the first experts by without a balancing loss."""
    router = routers.TopKRouter(EXPERTS, kernel_initializer="zeros", trainable=False)
    return expert_layer(router, router_losses)


def watched(model, x, y, *callbacks, **kwargs):
    """The findings of the watchdog among the callbacks, and how many batches were trained."""
    (watchdog,) = (each for each in callbacks if isinstance(each, ExpertHealth))
    batches = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: batches.append(batch)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
        model.fit(x, y, callbacks=[*callbacks, count], **options)
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    for text, (step, name, found) in zip(told, watchdog.findings, strict=True):
        assert text.startswith(f"{name}, step {step}: {found.text} ")
        stops = watchdog.stop and found.level == health.PROBLEM
        assert text.endswith("Training stops here.") == stops
    return watchdog.findings, len(batches)


@on_one_backend
def test_healthy_runs_are_never_flagged():
    for seed in range(2):
        random.seed(seed)  # not by Keras, which would load TensorFlow
        model = model_of(expert_layer())
        findings, _ = watched(model, *clustered(seed), ExpertHealth(every=5))
        assert not findings, f"seed {seed}"


def test_a_collapsed_run_is_flagged_within_fifty_steps():
    model = keras.Sequential([collapsed_layer(), keras.layers.Dense(1)])  # built by the first batch
    model.compile("adam", "mse")
    for seed in range(2):
        findings, batches = watched(model, *clustered(seed), ExpertHealth(stop=True), epochs=3)
        (step, name, finding), *_ = findings
        assert step <= 50 and name == "moe" and batches == step + 1
        assert finding.text == "The experts have collapsed: 100% of the work goes to 2 of 8."


@pytest.mark.backends("tensorflow", "jax")  # PyTorch takes single steps
def test_batches_are_counted_where_several_are_one_execution():
    model = model_of(collapsed_layer(), steps_per_execution=4)
    found, _ = watched(model, *clustered(0), ExpertHealth(stop=True))
    assert 30 <= found[0][0] <= 50


class OwnBalance(losses.RouterLoss):
    balances = True


class LargeBalance(losses.LoadBalance):
    usual_weight = 1.0


ADVISED = [
    (losses.LoadBalance(0.5), 0.0, "(weight=0): give it a weight above 0."),
    (losses.LoadBalance(0.5), 0.5, "(weight=0.5), a large weight"),
    (LargeBalance(0.5), 0.5, "(weight=0.5): give it ten times the weight."),
]


@on_one_backend
@pytest.mark.parametrize("loss, weight, advice", ADVISED)
def test_advice_goes_by_the_present_weight_of_a_loss(loss, weight, advice):
    layer = collapsed_layer([loss])
    layer.set_router_loss_weight(0, weight)
    findings, _ = watched(model_of(layer), *clustered(0), ExpertHealth(stop=True))
    assert advice in findings[0][2].fix


@on_one_backend
def test_dead_experts_are_reported_after_a_while_and_when_others_join_them():
    experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
    layer = moe(experts, router=one_hot_router(), router_losses=(), name="moe")
    # Expert 3 never has anything to do, and 2 only for the first thirty batches.
    x = np.eye(D, dtype="float32")[[0, 1, 2] * 10 * BATCH + [0, 1] * 20 * BATCH]
    watchdog = ExpertHealth(every=10, patience=1)
    findings, _ = watched(model_of(layer, keras.optimizers.SGD(0.0)), x, x[:, :1], watchdog)
    assert [(step, finding.text) for step, _, finding in findings] == [
        (30, "Expert 3 of 4 is dead in 3 checks. At the last check 1 of 4 were dead."),
        (60, "Experts 2, 3 of 4 are dead in 3 checks. At the last check 2 of 4 were dead."),
    ]


@on_one_backend
def test_a_collapse_that_recovers_is_not_reported():
    """The spread is 0, 0.04 and 0.09 at two checks and at the end, of which 0.1 is a collapse."""
    experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
    layer = moe(experts, router=one_hot_router(), router_losses=(), name="moe")
    x = np.eye(D, dtype="float32")[[0] * 80 + [0] * 78 + [1] * 2 + [0] * 75 + [1] * 5]
    watchdog = ExpertHealth(every=5)
    assert not watched(model_of(layer, keras.optimizers.SGD(0.0)), x, x[:, :1], watchdog)[0]


@on_one_backend
def test_experts_that_die_in_a_short_training_are_reported_at_its_end():
    experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
    layer = moe(experts, router=one_hot_router(), name="moe")
    x = np.eye(D, dtype="float32")[[0, 1, 2] * 15 * BATCH]
    watchdog = ExpertHealth()
    model = model_of(layer, keras.optimizers.SGD(0.0))
    ((step, _, finding),), _ = watched(model, x, x[:, :1], watchdog)
    assert step == 45 and finding.text.startswith("Expert 3 of 4 is dead in 3 checks.")


@on_one_backend
@pytest.mark.parametrize("with_monitor", [False, True])
def test_a_collapse_in_a_short_training_is_reported_at_its_end(with_monitor):
    x, y = clustered(0, 10)
    options = {"batch_size": 1, "epochs": 3}
    monitors = [ExpertMonitor()] * with_monitor
    findings, _ = watched(model_of(collapsed_layer()), x, y, *monitors, ExpertHealth(), **options)
    ((step, _, finding),) = findings
    assert step == 30 and finding.text.startswith("The experts have collapsed: 100%")
    assert not watched(model_of(expert_layer()), x, y, ExpertHealth(), **options)[0]


@on_one_backend
def test_a_capacity_that_drops_most_is_reported_once():
    layer = expert_layer()
    layer = layers.MixtureOfExperts(layer.experts, capacity_factor=0.25, name="moe")
    findings, _ = watched(model_of(layer), *clustered(0), ExpertHealth())
    ((step, _, finding),) = [each for each in findings if "no slot" in each[2].text]
    assert step <= 50 and "Raise `capacity_factor`" in finding.fix


@on_one_backend
def test_a_router_of_nan_and_exploding_logits_are_found():
    x, y = clustered(0, 40 * BATCH)
    model = model_of(expert_layer(router_losses=()), keras.optimizers.Adam(5.0))
    findings, _ = watched(model, x, y, ExpertHealth())
    assert any(finding.text.startswith("Router logits explode") for _, _, finding in findings)
    x[BATCH] = np.nan
    findings, _ = watched(model, x, y, ExpertHealth(every=2, stop=True))
    assert findings[-1][2].text == "The router's logits are NaN."
    assert findings[-1][0] == 2


@on_one_backend
@pytest.mark.parametrize("num_batches", [1, 40])
@pytest.mark.parametrize("make", [expert_layer, collapsed_layer])
def test_logits_of_nan_are_no_collapse(num_batches, make):
    """A router of NaN, and one that is frozen, after one step and after many."""
    layer, (x, y) = make(router_losses=["load_balance"]), clustered(0, num_batches * BATCH)
    findings, _ = watched(model_of(layer), x * np.nan, y, ExpertHealth())
    assert [finding.text for *_, finding in findings] == ["The router's logits are NaN."]


class WithoutTraining(keras.Model):
    def __init__(self):
        super().__init__()
        self.moe = expert_layer()

    def call(self, inputs):
        return self.moe(inputs)


@on_one_backend
@pytest.mark.parametrize("callback", [ExpertHealth, ExpertMonitor])
def test_a_model_that_does_not_tell_its_layers_of_training_is_found(callback):
    model = WithoutTraining()
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="Training counts no token.*`self.moe"):
        model.fit(*clustered(0, BATCH), callbacks=[callback()], verbose=0)


WEIGHTS = {
    1e-7: "LoadBalance(weight=1e-07) is too weak to have any effect.",
    1000.0: "not counting the constant 1e+03 of",
}


@on_one_backend
@pytest.mark.parametrize("weight, text", WEIGHTS.items())
def test_a_useless_weight_is_found_beside_a_monitor(weight, text):
    model = model_of(expert_layer(router_losses=[losses.LoadBalance(weight)]))
    callbacks, options = (ExpertMonitor(), ExpertHealth()), {"validation_split": 0.25}
    ((_, _, found),), _ = watched(model, *clustered(0, 4 * BATCH), *callbacks, **options)
    assert text in found.text


@on_one_backend
def test_counts_from_before_a_training_and_even_loads_make_no_loss_heavy():
    layer = expert_layer(router_losses=[losses.LoadBalance(1.0)])
    model = model_of(layer)
    counters = {weight.name: weight for weight in layer.weights}
    of_another_training = [[999.0, 1.0, 9.9], [3.0, 3.0, 3.0]]
    counters["value_totals"].assign(np.stack([of_another_training, np.zeros((2, 3))]))
    findings, _ = watched(model, *clustered(0, 4 * BATCH), ExpertMonitor(), ExpertHealth())
    assert not findings
    layer = expert_layer(ForcedRouter(), [losses.LoadBalance(1000.0)])
    findings, _ = watched(model_of(layer), *clustered(0, 4 * BATCH), ExpertHealth())
    assert not findings


@on_one_backend
def test_a_loss_is_heavy_by_what_it_adds_to_an_even_load():
    def heavy(found, weights, total, values):
        return health.heavy_losses(list(zip(found, weights, values)), total)

    found = [losses.LoadBalance(1.0), losses.RouterZ()]
    # The task has a loss of 0.1; an even load, one that is not, and one that was not measured.
    assert heavy(found, [1.0, 0.001], 1.1, [1.0, 2.0]) is None
    assert "LoadBalance(weight=1)" in heavy(found, [1.0, 0.001], 1.3, [1.2, 2.0]).text
    assert heavy(found, [1.0, 0.001], 1.3, [np.nan, np.nan]) is None
    assert heavy(found[:1], [0.0], 1.0, [3.0]) is None
    assert heavy(found[:1], [1.0], float("nan"), [3.0]) is None
    # Ten times the usual weight is not heavy.
    weight = float(np.float32(0.1))  # as a layer stores it
    assert heavy([losses.LoadBalance(0.1)], [weight], 0.2, [2.0]) is None
    assert heavy([losses.LoadBalance(0.1)], [2 * weight], 0.2, [2.0]) is not None
    # A user-defined loss is judged by its own usual weight.
    weak = health.weak_loss(LargeBalance(1e-4), 1e-4)
    assert "LargeBalance(weight=0.0001) is too weak" in weak.text
    assert heavy([LargeBalance(9.0)], [9.0], 9.5, [1.5]) is None
    finding = heavy([LargeBalance(50.0)], [50.0], 52.0, [1.02])
    assert "LargeBalance(weight=50) is 1 of a loss of up to 2, not" in finding.text
    assert "a weight of about 1," in finding.fix


SPREADS = {((5, 5, 5, 5), 1): 1.0, ((9, 0, 0, 0), 1): 0.0, ((5, 5, 0, 0), 2): 0.0}
SPREADS |= {((5, 5, 0, 0), 1): 1 / 3, ((0, 0, 0, 0), 1): 0.0, ((5,), 1): 1.0}
TEXTS = {
    "The busiest expert does 2.8 times": lambda: health.judge_load([700, 100, 100, 100], 1, ""),
    "Expert 2 of 4 is dead.": lambda: health.judge_load([90, 110, 0, 90], 1, ""),
    "Experts 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 2 more of 16 are dead.": (
        lambda: health.judge_load([1000] * 4 + [0] * 12, 1, "")
    ),
    "6% of the assignments found no slot in their expert.": lambda: health.judge_drops(0.06),
    "Router logits explode: 31 makes every": lambda: health.judge_router(0.5, 31.0),
    "The router is all but certain of every choice": lambda: health.judge_router(0.049, 9.0),
}


@on_one_backend
def test_verdicts_of_numbers():
    for (counts, top_k), expected in SPREADS.items():
        assert health.spread(counts, top_k) == pytest.approx(expected)
    for router in (routers.ReLURouter(4, top_k=2), routers.TopPRouter(4)):
        assert router.min_top_k == 1  # tokens may have fewer experts, and collapse onto one
    for text, judge in TEXTS.items():
        assert any(finding.text.startswith(text) for finding in judge()), text
    assert health.judge_load(np.array([90, 110, 100, 100]), 2, "") == []
    assert health.judge_drops(0.0) == health.judge_router(0.6, 5.0) == []
    assert health.judge_drops(0.05) == health.judge_router(0.05, 30.0) == []
    with pytest.raises(ValueError, match="`entropy` must be a share"):  # in nats
        health.judge_router(2.0, 9.0)


ADVICE = {
    "add `losses.LoadBalance()`": ["router_z"],
    "by LoadBalance(weight=0.02): give it ten times": [losses.LoadBalance(0.02), "router_z"],
    "by LoadBalance(weight=0.1), a large weight": [losses.LoadBalance(0.1)],
    "by OwnBalance(weight=0.5): give it ten times": [OwnBalance(0.5)],
    "by LargeBalance(weight=10), a large weight": [LargeBalance(10.0)],
    "by LossFreeBias(rate=0.003): raise the rate, for example to 0.01.": (
        routers.LossFreeBias(0.003)
    ),
    "by LossFreeBias(rate=0.01): lower the rate if the load jumps": routers.LossFreeBias(0.01),
    "by QuantileBias(momentum=0): lower the momentum": "quantile",
}


@on_one_backend
def test_the_advice_names_what_balances():
    assert "The loss of the router balances" in health.balance_advice(moe(router="relu"))
    for text, balancing in ADVICE.items():
        is_loss = isinstance(balancing, list)
        router = routers.TopKRouter(balancer=None if is_loss else balancing)
        layer = moe(router=router, router_losses=balancing if is_loss else None)
        advice = health.balance_advice(layer)
        assert text in advice
        assert ("add `losses" in advice) == ("add `losses" in text)
        assert "have means far from zero, centre them, by" in advice
    layer = moe(router_losses=[losses.LoadBalance(0.02)])
    layer.build((None, D))
    layer.set_router_loss_weight(0, 0.5)
    assert "LoadBalance(weight=0.5)" in health.balance_advice(layer), "the weight in force"
