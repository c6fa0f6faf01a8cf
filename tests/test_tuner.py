"""Search spaces, costs and the table of trials, with KerasTuner itself."""

import random
from types import SimpleNamespace

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner.engine.trial import Trial
from layer_checks import D, normal

from keras_moe import layers, losses, routers, tuner
from keras_moe.tuner import SET_TOP_K, TAKE_TOP_K

# A search makes layers and reads logs, which are tested on each backend.
pytestmark = [
    pytest.mark.backends("torch"),
    # KerasTuner asks the current thread for its name in an old way.
    pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning"),
]


def space(**changes):
    arguments = {"active_width": (16, 32), "num_experts": (4, 8), "top_k": (2, 1, 4), **changes}
    return tuner.SearchSpace(**arguments)


def hyperparameters(**values):
    hp = keras_tuner.HyperParameters()
    hp.values = {f"moe/{name}": value for name, value in values.items()}
    return hp


def sizes(layer):
    return layer.experts.num_experts, layer.router.top_k, layer.experts.hidden_dim


def weights(layer):
    return [(type(loss), loss.weight) for loss in layer.router_losses]


def test_the_first_values_are_the_defaults():
    layer = space(capacity_factors=(1.25, None)).sample(hyperparameters(), name="sparse")
    assert layer.name == "sparse" and type(layer.router) is routers.TopKRouter
    assert sizes(layer) == (4, 2, 8) and layer.capacity.factor == 1.25
    assert weights(layer) == [(losses.LoadBalance, 0.01), (losses.RouterZ, 0.001)]


def test_values_of_a_trial_reach_the_layer():
    searched = space(
        routers=("top_k", "sinkhorn"),
        capacity_factors=(2, None),
        loss_weights={"router_entropy": (0.1, 0)},
    )
    values = {"num_experts": 8, "router": "sinkhorn", "top_k": 4, "active_width": 32}
    hp = hyperparameters(**values, capacity_factor="None", router_entropy_weight=0.0)
    more = [losses.LoadBalance(0.05)]
    layer = searched.sample(hp, experts=layers.GatedExperts, router_losses=more)
    assert type(layer.experts) is layers.GatedExperts and layer.capacity is None
    assert type(layer.router) is routers.SinkhornRouter and sizes(layer) == (8, 4, 8)
    assert weights(layer) == [(losses.RouterEntropy, 0.0), (losses.LoadBalance, 0.05)]


def test_a_router_that_sets_its_own_k_is_not_asked_for_one():
    searched = space(routers=("top_k", "switch"), top_k=(2, 4))
    for router, expected in (("switch", (4, 1, 16)), ("top_k", (4, 2, 8))):
        hp = hyperparameters(router=router)
        assert sizes(searched.sample(hp)) == expected
        assert ("moe/top_k" in hp.values) == (router == "top_k")
    space(routers=("switch",)).sample(hyperparameters())


def test_layers_of_one_space_share_their_values_and_others_do_not():
    hp = hyperparameters(num_experts=8)
    first, second, other = (space(name=name).sample(hp) for name in ("moe", "moe", "other"))
    assert [layer.experts.num_experts for layer in (first, second, other)] == [8, 8, 4]
    with pytest.raises(ValueError, match="different names. .* two spaces 'moe' .* `num_experts`"):
        space(num_experts=(16, 32)).sample(hp)
    # What a user has fixed before stays.
    hp = keras_tuner.HyperParameters()
    hp.Fixed("moe/num_experts", 8)
    assert space().sample(hp).experts.num_experts == 8


@pytest.mark.parametrize("name", TAKE_TOP_K + SET_TOP_K)
def test_every_token_has_k_experts_whatever_the_router(name):
    router = space(routers=(name,), num_experts=(8,)).sample(hyperparameters()).router
    routing = router(normal(16, D), training=True)
    assert (keras.ops.convert_to_numpy(routing.indices) >= 0).sum() == 16 * router.top_k


LOSSES = [-1e6, -1.0, 0.0, 0.1, 3.0, 1e6]


def test_a_trial_above_the_budget_is_worse_than_any_within():
    objective = tuner.WithinBudget(100.0)
    within = [objective.get_value({"val_loss": loss, "active_flops": 100.0}) for loss in LOSSES]
    above = [objective.get_value({"val_loss": loss, "active_flops": 100.1}) for loss in LOSSES]
    assert within == sorted(within) and len(set(within)) == len(LOSSES)
    assert max(within) < min(above)
    assert objective.direction == "min"
    costs = [objective.get_value({"val_loss": 1.0, "active_flops": cost}) for cost in (200, 400)]
    assert costs[0] < costs[1], "towards the budget is better"
    objective = tuner.WithinBudget(0.5, cost="step_seconds", loss="val_mse")
    assert not objective.has_value({"val_loss": 1.0, "step_seconds": 0.1})
    cheap, slow = ({"val_mse": 1.0, "step_seconds": seconds} for seconds in (0.5, 0.6))
    assert objective.get_value(cheap) < 1 < objective.get_value(slow)


def test_the_monitor_times_steps_without_the_first(monkeypatch):
    monitor, logs = tuner.CostMonitor(), {}
    monitor.set_model(build(hyperparameters()))
    times = iter([0.0, 60.0, 61.0, 63.0, 100.0, 107.0])
    monkeypatch.setattr("keras_moe.tuner.time.perf_counter", lambda: next(times))
    for batches, seconds in ((3, 1.5), (1, 7.0)):
        monitor.on_epoch_begin(0)
        for batch in range(batches):
            monitor.on_train_batch_end(batch)
        monitor.on_epoch_end(0, logs)
        assert logs["step_seconds"] == seconds
    # Router 8 * 4; two experts with kernels 8 * 8 up and down and biases 8 up and down.
    assert logs["active_flops"] == 2 * (32 + 2 * (64 + 64 + 8 + 8))
    assert logs["parameters"] == 32 + 4 * (64 + 64 + 8 + 8) + D + 1


def build(hp):
    random.seed(0)  # not by Keras, which would load TensorFlow
    model = keras.Sequential([keras.Input((D,)), space().sample(hp), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


RandomSearch = keras_tuner.oracles.RandomSearchOracle
BayesianOptimization = keras_tuner.oracles.BayesianOptimizationOracle
Hyperband = keras_tuner.oracles.HyperbandOracle


def defaults_first(oracle):
    return type(f"First{oracle.__name__}", (tuner.DefaultsFirst, oracle), {})


def search_in(folder, oracle):
    return keras_tuner.Tuner(oracle, build, directory=folder, project_name="search")


def run(search, callbacks):
    x, y = normal(8, D), np.zeros((8, 1), "float32")
    fit = {"batch_size": 4, "epochs": 2, "validation_data": (x, y), "verbose": 0}
    search.search(x, y, callbacks=callbacks, **fit)
    return tuner.pareto_table(search)


DEFAULTS = {"num_experts": 4, "router": "top_k", "top_k": 2, "active_width": 16}
DEFAULTS |= {"capacity_factor": "None", "load_balance_weight": 0.01, "router_z_weight": 0.001}
DEFAULTS = {f"moe/{name}": value for name, value in DEFAULTS.items()}


@pytest.mark.parametrize("oracle", [RandomSearch, BayesianOptimization, Hyperband])
def test_the_first_trial_has_the_defaults_and_the_second_has_not(oracle, tmp_path):
    search = search_in(tmp_path, defaults_first(oracle)("val_loss", seed=1))
    first, second = (search.oracle.create_trial(name) for name in ("a", "b"))
    own = {"tuner/epochs", "tuner/initial_epoch", "tuner/bracket", "tuner/round"}
    values = first.hyperparameters.values
    assert {name: values[name] for name in values if name not in own} == DEFAULTS
    assert own <= set(values) or oracle is not Hyperband
    assert second.hyperparameters.values != values


def test_a_search_keeps_to_its_budget_and_resumes_where_it_stopped(tmp_path):
    flops = 2 * (64 + 4 * (16 * D + 4 + D))  # eight experts, four of them active, active width 16
    objective, first_random = tuner.WithinBudget(flops), defaults_first(RandomSearch)
    search = search_in(tmp_path, first_random(objective, max_trials=4, seed=3))
    rows = run(search, [tuner.CostMonitor()])
    assert len(rows) == 4 and rows[0].efficient
    assert [row.cost for row in rows] == sorted(row.cost for row in rows)
    (best,) = search.oracle.get_best_trials()
    assert best.score == min(trial.score for trial in search.oracle.trials.values())
    (row,) = (row for row in rows if row.trial == best.trial_id)
    assert row.loss == min(row.loss for row in rows if row.cost <= flops)
    assert any(row.cost > flops for row in rows), "the budget must have excluded something"

    again = search_in(tmp_path, first_random(objective, max_trials=5, seed=3))
    assert again.remaining_trials == 1
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("trial.json")}
    assert len(run(again, [tuner.CostMonitor()])) == 5 and len(files) == 4
    assert {file: file.stat().st_mtime_ns for file in files} == files, "no trial ran twice"


def finished(*points):
    trials = {}
    for number, (cost, loss) in enumerate(points):
        trial = Trial(hyperparameters(num_experts=number), str(number), "COMPLETED")
        for name, value in {"active_flops": cost, "val_loss": loss}.items():
            trial.metrics.update(name, value)
        trials[trial.trial_id] = trial
    trials["failed"] = Trial(hyperparameters(), "failed", "FAILED")
    return SimpleNamespace(oracle=SimpleNamespace(trials=trials))


def test_efficient_trials_are_those_that_no_other_beats():
    rows = tuner.pareto_table(finished((4, 1.0), (1, 3.0), (2, 3.0), (2, 2.0), (8, 2.5)))
    assert [(row.trial, row.cost, row.loss, row.efficient) for row in rows] == [
        ("1", 1.0, 3.0, True),
        ("3", 2.0, 2.0, True),
        ("2", 2.0, 3.0, False),
        ("0", 4.0, 1.0, True),
        ("4", 8.0, 2.5, False),
    ]


def test_a_budget_below_all_trials_is_reported():
    search = finished((8896, 1.0), (9000, 0.5))
    search.oracle.objective = tuner.WithinBudget(1_000)
    with pytest.warns(UserWarning, match="within the budget of 1,000 .* cheapest has 8,896"):
        tuner.pareto_table(search)


def test_the_table_as_text_is_the_same_in_a_worker_that_asks_its_chief():
    search = finished((1000, 1.0), (65536, 3.0))
    rows = tuner.pareto_table(search)
    trials = [trial for trial in search.oracle.trials.values() if trial.status == "COMPLETED"]

    def get_best_trials(number):
        return [Trial.from_proto(trial.to_proto()) for trial in trials[:number]]

    oracle = SimpleNamespace(max_trials=None, get_best_trials=get_best_trials)
    assert tuner.pareto_table(SimpleNamespace(oracle=oracle)) == rows
    rows[1].values["rate"] = 0.001
    assert tuner.format_table(rows).splitlines() == [
        "   trial    cost    loss  moe/num_experts   rate",
        "*      0   1,000  1.0000                0      -",
        "       1  65,536  3.0000                1  0.001",
    ]
