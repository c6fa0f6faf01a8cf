"""Search spaces, costs and budgets, with KerasTuner itself."""

import random
import warnings

import keras
import keras_tuner
import numpy as np
import pytest
from layer_checks import D, normal

from keras_moe import layers, losses, routers, tuner
from keras_moe.tuner import SET_TOP_K, TAKE_TOP_K

# A search makes layers and reads logs, which are tested on each backend.
pytestmark = [
    pytest.mark.backends("torch"),
    # KerasTuner asks the current thread for its name in an old way.
    pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No trial so far"),
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
    for others in ((16, 32), (8, 64)):  # none of the first's values, or some of them
        with pytest.raises(ValueError, match="different names. .* a second space 'moe'"):
            space(num_experts=others).sample(hp)
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


def test_a_budget_that_no_trial_has_kept_to_warns():
    objective = tuner.WithinBudget(100)

    def warned(cost):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            objective.get_value({"val_loss": 1.0, "active_flops": cost})
        return [str(each.message) for each in caught]

    assert warned(300) == [
        "No trial so far has kept to the budget of 100. The lowest active_flops is 300"
    ]
    assert not warned(400) and warned(200)
    assert not warned(100) and not warned(150), "a trial has kept to it"


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


def run(folder, objective, max_trials):
    """Trials of a search as pairs of cost and loss, and the best one."""
    oracle = keras_tuner.oracles.RandomSearchOracle(objective, max_trials=max_trials, seed=3)
    search = keras_tuner.Tuner(oracle, build, directory=folder, project_name="search")
    x, y = normal(8, D), np.zeros((8, 1), "float32")
    fit = {"batch_size": 4, "epochs": 2, "validation_data": (x, y), "verbose": 0}
    search.search(x, y, callbacks=[tuner.CostMonitor()], **fit)

    def cost_and_loss(trial):
        return tuple(map(trial.metrics.get_best_value, ("active_flops", "val_loss")))

    (best,) = oracle.get_best_trials()
    return list(map(cost_and_loss, oracle.trials.values())), cost_and_loss(best)


def test_a_search_keeps_to_its_budget_and_resumes_where_it_stopped(tmp_path):
    flops = 2 * (64 + 4 * (16 * D + 4 + D))  # eight experts, four of them active, active width 16
    trials, best = run(tmp_path, tuner.WithinBudget(flops), max_trials=4)
    assert len(trials) == 4
    within = [loss for cost, loss in trials if cost <= flops]
    assert best[0] <= flops and best[1] == min(within)
    assert len(within) < 4, "the budget must have excluded something"

    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("trial.json")}
    trials, _ = run(tmp_path, tuner.WithinBudget(flops), max_trials=5)
    assert len(trials) == 5 and len(files) == 4
    assert {file: file.stat().st_mtime_ns for file in files} == files, "no trial ran twice"
