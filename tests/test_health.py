"""ExpertHealth: a collapsed run is told early, a healthy one never; every verdict and its fix."""

import pickle
import warnings

import keras
import numpy as np
import pytest
from layer_checks import D, E, array, moe, normal

from keras_moe import health, layers, losses, routers
from keras_moe.callbacks import ExpertHealth, ExpertMonitor, expert_health

EXPERTS, STEPS, BATCH = 8, 60, 16
# Findings come from counts alone. Whether these arrive is tested on each backend.
of_counts = pytest.mark.backends("torch")


def clustered(seed, size=STEPS * BATCH):
    """Tokens of sixteen clusters, each with a linear map of its own to learn."""
    generator = np.random.default_rng(seed)
    cluster = generator.integers(0, 16, size)
    x = generator.normal(size=(16, D))[cluster] + 0.5 * generator.normal(size=(size, D))
    maps = generator.normal(size=(16, D, 1)) / np.sqrt(D)
    return x.astype("float32"), np.einsum("nd,ndo->no", x, maps[cluster]).astype("float32")


def model_of(layer, optimizer=None):
    model = keras.Sequential([keras.Input((D,)), layer, keras.layers.Dense(1)])
    model.compile(optimizer or keras.optimizers.Adam(1e-2), "mse")
    return model


def expert_layer(router="top_k", router_losses=("load_balance", "router_z")):
    experts = layers.FeedForwardExperts(EXPERTS, 8)
    return layers.MixtureOfExperts(experts, router, router_losses, name="moe")


def collapsed_layer():
    """A router of zeros has no gradient to leave the first experts by without a balancing loss."""
    router = routers.TopKRouter(EXPERTS, kernel_initializer="zeros", trainable=False)
    return expert_layer(router, router_losses=())


def watched(model, x, y, watchdog, *others, **kwargs):
    """The findings, and how many batches were trained."""
    batches = CountBatches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
        model.fit(x, y, callbacks=[*others, watchdog, batches], **options)
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    expected, fixes = [], []
    for step, name, found in watchdog.findings:
        is_known = (name, found.fix) in fixes
        fix = "The advice is the same as before." if is_known else found.fix
        fixes.append((name, found.fix))
        stops = " Training stops here." * (watchdog.stop and found.level == health.PROBLEM)
        expected.append(f"{name}, step {step}: {found.text} {fix}{stops}")
    assert told == expected
    return watchdog.findings, batches.count


class CountBatches(keras.callbacks.Callback):
    count = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.count += 1


def restart(model, seed):
    """New weights and a new optimizer state without a new compilation."""
    keras.utils.set_random_seed(seed)
    fresh = model_of(expert_layer())
    model.set_weights(fresh.get_weights())
    for variable in model.optimizer.variables:
        if "learning_rate" not in variable.path:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))


@of_counts
def test_healthy_runs_are_never_flagged():
    model = model_of(expert_layer())
    for seed in range(20):
        restart(model, seed)
        findings, _ = watched(model, *clustered(seed), ExpertHealth(every=5))
        assert not findings, f"seed {seed}"


def test_a_collapsed_run_is_flagged_within_fifty_steps():
    model = model_of(collapsed_layer())
    for seed in range(20):
        findings, _ = watched(model, *clustered(seed), ExpertHealth(stop=True))
        (step, name, finding), *_ = findings
        assert step <= 50 and name == "moe"
        assert finding.text == ("The experts have collapsed: 100% of the work goes to 2 of 8."), (
            f"seed {seed}"
        )


@of_counts
def test_short_epochs_change_nothing():
    model = model_of(collapsed_layer())
    options = {"epochs": 6, "batch_size": 32}
    findings, _ = watched(model, *clustered(0, 7 * 32), ExpertHealth(), ExpertMonitor(), **options)
    assert findings[0][0] <= 50


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch takes single steps")
def test_batches_are_counted_where_several_are_one_execution():
    model = model_of(collapsed_layer())
    model.compile("adam", "mse", steps_per_execution=4)
    found, _ = watched(model, *clustered(0), ExpertHealth(stop=True))
    assert 30 <= found[0][0] <= 50
    heavy = model_of(expert_layer(router_losses=[losses.LoadBalance(1000.0)]))
    heavy.compile("adam", "mse", steps_per_execution=4)
    for batches in (4, 8):
        ((step, _, finding),), _ = watched(heavy, *clustered(0, batches * BATCH), ExpertHealth())
        assert step == batches and "not counting the constant 1e+03 of" in finding.text


@of_counts
def test_training_stops_when_asked_to():
    x, y = clustered(0)
    _, batches = watched(model_of(collapsed_layer()), x, y, ExpertHealth(stop=True), epochs=3)
    assert batches == 31
    _, batches = watched(model_of(collapsed_layer()), x, y, ExpertHealth())
    assert batches == STEPS


def test_balancing_losses_get_heavier_once_when_asked_to():
    router = routers.TopKRouter(EXPERTS, kernel_initializer="zeros", trainable=False)
    for rebalance, factor in ((True, 10), (False, 1)):
        layer = expert_layer(router, [losses.LoadBalance(0.02), losses.RouterZ(0.003)])
        watched(model_of(layer), *clustered(0), ExpertHealth(rebalance=rebalance), epochs=2)
        np.testing.assert_allclose(array(layer.router_loss_weights), [0.02 * factor, 0.003])


@of_counts
def test_what_rebalancing_did_is_told_and_that_it_was_in_vain():
    router = routers.TopKRouter(EXPERTS, kernel_initializer="zeros", trainable=False)
    layer = expert_layer(router, [losses.LoadBalance(0.01), losses.RouterZ(0.001)])
    watchdog = ExpertHealth(every=5, patience=2, rebalance=True)
    findings, _ = watched(model_of(layer), *clustered(0), watchdog, epochs=2)
    (first, _, collapse), (second, _, again) = findings
    # Counted from the change on, and nothing for a third time: not that most experts are dead.
    assert (first, second) == (10, 20)
    assert collapse.fix.startswith("The weight of its LoadBalance is now 0.1. What else to try: ")
    assert again.text == collapse.text
    for finding in (collapse, again):
        assert (
            "ten times" not in finding.fix
            and "LoadBalance(weight=0.1), a large weight" in finding.fix
        )


@of_counts
@pytest.mark.parametrize(
    "weight, advice",
    [(0.0, "(weight=0): give it a weight above 0."), (0.5, "(weight=0.5), a large weight")],
)
def test_a_loss_that_is_off_or_large_is_not_rebalanced(weight, advice):
    router = routers.TopKRouter(EXPERTS, kernel_initializer="zeros", trainable=False)
    layer = expert_layer(router, [losses.LoadBalance(0.5)])
    layer.set_router_loss_weight(0, weight)
    findings, _ = watched(model_of(layer), *clustered(0), ExpertHealth(rebalance=True, stop=True))
    assert advice in findings[0][2].fix and "is now" not in findings[0][2].fix
    assert layer.loss_weights_in_force == [weight]


@of_counts
def test_a_weight_is_large_by_what_is_usual_for_its_loss():
    router = routers.TopKRouter(EXPERTS, kernel_initializer="zeros", trainable=False)
    layer = expert_layer(router, [LargeBalance(0.5)])
    findings, _ = watched(model_of(layer), *clustered(0), ExpertHealth(rebalance=True, stop=True))
    assert findings[0][2].fix.startswith("The weight of its LargeBalance is now 5. ")


@of_counts
@pytest.mark.parametrize("top_k", [1, 2])
def test_inputs_far_from_zero_collapse_until_they_are_centred(top_k):
    x, y = clustered(0)
    means = 6 * np.random.default_rng(0).normal(size=D).astype("float32")
    normalization = keras.layers.Normalization()
    normalization.adapt(x + means)
    cases = [(means, None, True), (means, normalization, False)]
    # The mean over a token's features is that of each feature only where these are the same.
    cases += [(6, None, True), (6, keras.layers.LayerNormalization(), False)]
    for mean, centred, goes_wrong in cases:
        keras.utils.set_random_seed(0)
        layer = expert_layer(routers.TopKRouter(top_k=top_k))
        model = keras.Sequential([keras.Input((D,)), layer, keras.layers.Dense(1)])
        if centred is not None:
            model = keras.Sequential([keras.Input((D,)), centred, *model.layers])
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        findings, _ = watched(model, x + mean, y, ExpertHealth(every=5, stop=True), epochs=2)
        assert bool(findings) == goes_wrong, (mean, centred)


@of_counts
def test_what_is_remembered_does_not_grow_with_the_looks():
    layer = expert_layer()
    layer.build((None, D))
    watch, sizes = expert_health._Watch(layer, patience=3), []
    for _ in range(20):
        layer.expert_counts.assign_add(np.full(EXPERTS, 1000.0, "float32"))
        list(watch.look(layer))
        sizes.append(len(pickle.dumps(vars(watch))))
    assert sizes[-1] == sizes[5]


@of_counts
def test_dead_experts_are_told_after_a_longer_while():
    experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
    router = routers.TopKRouter(E, 1, kernel_initializer=scaled_identity)
    layer = moe(experts, router=router, router_losses=(), name="moe")
    x = np.eye(D, dtype="float32")[np.tile([0, 1, 2], 40 * BATCH)]
    model = model_of(layer, keras.optimizers.SGD(0.0))
    findings, _ = watched(model, x, x[:, :1], ExpertHealth(every=5, patience=2))
    assert [(step, finding.text) for step, _, finding in findings] == [
        (30, "1 of 4 experts serves no token in 6 looks: 3. At the last look 1 of 4 had none.")
    ]


@of_counts
def test_dead_experts_are_told_again_when_others_join_them():
    experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
    router = routers.TopKRouter(E, 1, kernel_initializer=scaled_identity)
    layer = moe(experts, router=router, router_losses=(), name="moe")
    # Expert 3 never has anything to do, and 2 only for the first thirty batches.
    x = np.eye(D, dtype="float32")[[0, 1, 2] * 10 * BATCH + [0, 1] * 20 * BATCH]
    watchdog = ExpertHealth(every=10, patience=1)
    findings, _ = watched(model_of(layer, keras.optimizers.SGD(0.0)), x, x[:, :1], watchdog)
    assert [(step, finding.text) for step, _, finding in findings] == [
        (30, "1 of 4 experts serves no token in 3 looks: 3. At the last look 1 of 4 had none."),
        (60, "2 of 4 experts serve no token in 3 looks: 2, 3. At the last look 2 of 4 had none."),
    ]


@keras.saving.register_keras_serializable("tests")
def scaled_identity(shape, dtype=None):
    return 10 * keras.ops.eye(*shape, dtype=dtype)


def test_a_router_that_is_not_a_number_is_told():
    x, y = clustered(0, 20 * BATCH)
    x[BATCH] = np.nan
    findings, _ = watched(model_of(expert_layer()), x, y, ExpertHealth(every=2, stop=True))
    assert findings[0][2].text == "The router computes what is not a number."
    assert findings[0][0] == 2


def test_exploding_logits_are_told():
    model = model_of(expert_layer(router_losses=()), keras.optimizers.Adam(5.0))
    findings, _ = watched(model, *clustered(0), ExpertHealth())
    assert any(finding.text.startswith("Router logits explode") for _, _, finding in findings)


@of_counts
def test_only_what_differs_between_experts_explodes():
    layer = expert_layer()
    layer.build((None, D))
    watch, kernel = expert_health._Watch(layer, patience=3), array(layer.router.kernel)
    for grown, is_found in ((kernel + 1e3, False), (1e4 * kernel, True)):
        layer.router.kernel.assign(grown)
        assert (watch._judge_router(layer.router) is not None) == is_found


@of_counts
@pytest.mark.parametrize(
    "weight, text",
    [
        (1e-7, "LoadBalance(weight=1e-07) is too weak to have any effect."),
        (100.0, "LoadBalance(weight=100) is 0."),
        (1e-2, None),
        (0, None),
    ],
)
def test_a_useless_weight_is_told(weight, text):
    model = model_of(expert_layer(router_losses=[losses.LoadBalance(weight)]))
    findings, _ = watched(model, *clustered(0, 4 * BATCH), ExpertHealth())
    assert [finding.text.startswith(text or "-") for _, _, finding in findings] == [True] * (
        text is not None
    )


def test_a_model_that_is_built_by_its_first_batch_is_watched():
    model = keras.Sequential([collapsed_layer(), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    findings, _ = watched(model, *clustered(0), ExpertHealth())
    assert findings[0][0] <= 50


@pytest.mark.parametrize(
    "counts, top_k, expected",
    [
        ([5, 5, 5, 5], 1, 1.0),
        ([9, 0, 0, 0], 1, 0.0),
        ([5, 5, 0, 0], 2, 0.0),
        ([5, 5, 0, 0], 1, 1 / 3),
        ([0, 0, 0, 0], 1, 0.0),
        ([5], 1, 1.0),
    ],
)
def test_spread_of_known_loads(counts, top_k, expected):
    assert health.spread(counts, top_k) == pytest.approx(expected)


TEXTS = {
    "The busiest expert does 2.8 times its fair share.": lambda: health.judge_load(
        [700, 100, 100, 100], 1, ""
    ),
    "1 of 4 experts serves no token at all: 2.": lambda: health.judge_load([90, 110, 0, 90], 1, ""),
    "12 of 16 experts serve no token at all: 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 2 more.": (
        lambda: health.judge_load([1000] * 4 + [0] * 12, 1, "")
    ),
    "12% of the assignments found no slot in their expert.": lambda: health.judge_drops(0.12),
    "The router computes what is not a number.": lambda: health.judge_router(0.5, np.nan),
    "Router logits explode: they reach 99, which makes every choice absolute.": (
        lambda: health.judge_router(0.5, 99.0)
    ),
    "The router is all but certain of every choice, so it hardly learns any more.": (
        lambda: health.judge_router(0.01, 9.0)
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_verdicts(text):
    assert text in [finding.text for finding in TEXTS[text]()]


def test_a_sound_layer_has_no_finding():
    assert health.judge_load(np.array([90, 110, 100, 100]), 2, "") == []
    assert health.judge_drops(0.0) == health.judge_router(0.6, 5.0) == []


class OwnBalance(losses.RouterLoss):
    balances = True


class LargeBalance(losses.LoadBalance):
    usual_weight = 1.0


ADVICE = {
    "add `losses.LoadBalance()`": lambda: moe(router_losses=["router_z"]),
    "by LoadBalance(weight=0.02): give it ten times": lambda: moe(
        router_losses=[losses.LoadBalance(0.02), "router_z"]
    ),
    "by LoadBalance(weight=0.1), a large weight": lambda: moe(
        router_losses=[losses.LoadBalance(0.1)]
    ),
    "by OwnBalance(weight=0.05): give it ten times": lambda: moe(router_losses=[OwnBalance(0.05)]),
    "by OwnBalance(weight=0.5): give it ten times": lambda: moe(router_losses=[OwnBalance(0.5)]),
    "by LargeBalance(weight=5): give it ten times": lambda: moe(router_losses=[LargeBalance(5.0)]),
    "by LargeBalance(weight=10), a large weight": lambda: moe(router_losses=[LargeBalance(10.0)]),
    "by LossFreeBias(rate=0.001): raise the rate, for example to 0.01.": lambda: moe(
        router=routers.TopKRouter(balancer="loss_free")
    ),
    "by LossFreeBias(rate=0.003): raise the rate, for example to 0.01.": lambda: moe(
        router=routers.TopKRouter(balancer=routers.LossFreeBias(0.003))
    ),
    "by LossFreeBias(rate=0.01): lower the rate if the load jumps": lambda: moe(
        router=routers.TopKRouter(balancer=routers.LossFreeBias(0.01))
    ),
    "by QuantileBias(momentum=0): lower the momentum": lambda: moe(
        router=routers.TopKRouter(balancer="quantile")
    ),
    "The loss of the router balances": lambda: moe(router="relu"),
}


@pytest.mark.parametrize("text", ADVICE)
def test_the_advice_names_what_balances(text):
    layer = ADVICE[text]()
    assert text in layer.balance_advice()
    assert ("add `losses" in layer.balance_advice()) == ("add `losses" in text)
    assert "have means far from zero, centre them, by" in layer.balance_advice()


def test_the_advice_names_the_weight_in_force():
    layer = moe(router_losses=[losses.LoadBalance(0.02)])
    layer.build((None, D))
    layer.set_router_loss_weight(0, 0.5)
    assert "LoadBalance(weight=0.5)" in layer.balance_advice()


def test_it_watches_models_with_experts_only():
    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="at least one `MixtureOfExperts` layer"):
        model.fit(normal(2, D), normal(2, 1), callbacks=[ExpertHealth()], verbose=0)


@pytest.mark.parametrize("router", [routers.ReLURouter(4, top_k=2), routers.TopPRouter(4)])
def test_who_may_have_fewer_experts_can_collapse_as_well(router):
    assert health.spread([100, 0, 0, 0], router.min_top_k) == 0
    assert health.spread([100, 100, 0, 0], router.min_top_k) > health.COLLAPSED


def test_a_loss_is_heavy_by_the_weight_it_has_now():
    found = [losses.LoadBalance(1.0)]
    assert health.judge_heavy_losses(found, [0.0], 1.0, [3.0]) is None
    assert health.judge_heavy_losses(found, [1.0], float("nan"), [3.0]) is None
    assert "LoadBalance(weight=1)" in health.judge_heavy_losses(found, [1.0], 3.5, [3.0]).text


def test_a_loss_of_ones_own_is_judged_by_the_weight_it_says_is_usual():
    class Overload(losses.RouterLoss):
        balances, usual_weight = True, 0.01

    assert "Overload(weight=1e-06) is too weak" in health.judge_weak_loss(Overload(1e-6), 1e-6).text
    found = health.judge_heavy_losses([Overload(50.0)], [50.0], 52.0, [1.02])
    assert "Overload(weight=50) is 51 of" in found.text and "of about 0.01" in found.fix


def test_ten_times_the_usual_weight_is_not_heavy():
    found = [losses.LoadBalance(0.1)]
    weight = float(np.float32(0.1))  # as a layer keeps it
    assert health.judge_heavy_losses(found, [weight], 0.2, [2.0]) is None
    assert health.judge_heavy_losses(found, [2 * weight], 0.2, [2.0]) is not None


@of_counts
@pytest.mark.parametrize("logs", [None, {}, {"loss": float("nan")}])
def test_no_loss_is_heavy_where_that_of_the_model_is_not_known(logs):
    layer = expert_layer(router_losses=[losses.LoadBalance(1.0)])
    watchdog = ExpertHealth()
    watchdog.set_model(model_of(layer))
    watchdog.on_train_begin()
    layer.router_loss_totals.assign([1.2])
    layer.call_count.assign(1.0)
    watchdog.on_epoch_end(0, logs)
    assert not watchdog.findings


@of_counts
def test_a_loss_is_not_heavy_because_the_task_is_learned():
    layer = expert_layer(router_losses=[losses.LoadBalance(1.0)])
    watchdog = ExpertHealth()
    watchdog.set_model(model_of(layer))
    watchdog.on_train_begin()
    for loss, value, expected in ((9.0, 1.0, 0), (1.1, 1.05, 0), (6.0, 5.0, 1)):
        layer.router_loss_totals.assign([value])
        layer.call_count.assign(1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            watchdog.on_epoch_end(0, {"loss": loss})
        layer.reset_counts()
        assert len(watchdog.findings) == expected


def test_the_constant_part_of_a_loss_is_not_heavy():
    found = [losses.LoadBalance(1.0), losses.RouterZ()]
    # The task has a loss of 0.1; an even load, one that is not, and one that was not measured.
    assert health.judge_heavy_losses(found, [1.0, 0.001], 1.1, [1.0, 2.0]) is None
    assert health.judge_heavy_losses(found, [1.0, 0.001], 1.3, [1.2, 2.0]) is not None
    assert health.judge_heavy_losses(found, [1.0, 0.001], 1.3) is None
    with pytest.raises(ValueError, match="a value for each loss. Received: 1 values for 2 losses"):
        health.judge_heavy_losses(found, [1.0, 0.001], 1.3, [1.2])


@pytest.mark.parametrize("first, validation_split", [(ExpertHealth, 0.0), (ExpertMonitor, 0.25)])
def test_a_heavy_loss_is_found_beside_a_monitor(first, validation_split):
    watchdog, monitor = ExpertHealth(), ExpertMonitor()
    order = [watchdog, monitor] if first is ExpertHealth else [monitor, watchdog]
    model = model_of(expert_layer(router_losses=[losses.LoadBalance(1000.0)]))
    options = {"validation_split": validation_split, "batch_size": BATCH, "verbose": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.fit(*clustered(0, 4 * BATCH), callbacks=order, **options)
    ((_, _, finding),) = watchdog.findings
    assert "not counting the constant 1e+03 of" in finding.text


@of_counts
def test_counts_from_before_a_reset_make_no_loss_heavy():
    layer = expert_layer(router_losses=[losses.LoadBalance(1.0)])
    model = model_of(layer)
    layer.call_count.assign(3.0)  # of losses of 0, in a training without a monitor
    # The counters pass where they were before the monitor of this one resets them.
    watchdog = ExpertHealth()
    options = {"batch_size": BATCH, "verbose": 0}
    model.fit(*clustered(0, 4 * BATCH), callbacks=[watchdog, ExpertMonitor()], **options)
    assert not watchdog.findings


def test_a_heavy_weight_is_no_heavy_loss_where_the_load_is_even():
    layer = expert_layer(routers.DenseRouter(), [losses.LoadBalance(1000.0)])
    findings, _ = watched(model_of(layer), *clustered(0, 4 * BATCH), ExpertHealth())
    assert not findings
