"""What one finds by guessing: `dir`, and routers that take the number of experts of their layer."""

import inspect

import keras
import numpy as np
import pytest
from layer_checks import CASES, D, E, moe, normal

import keras_moe
from keras_moe import routers
from keras_moe.callbacks import ExpertMonitor

ROUTERS = [each for each in CASES if issubclass(each, routers.Router)]


def test_dir_shows_what_is_public():
    assert dir(keras_moe) == sorted([*keras_moe.__all__, "tuner", "visualization", "__version__"])
    for name in dir(keras_moe):
        part = getattr(keras_moe, name)
        assert part is not None
        if inspect.ismodule(part):
            assert dir(part) == sorted({*part.__all__}) == sorted(part.__all__), name
            assert all(hasattr(part, name) for name in part.__all__), name


@pytest.mark.parametrize("with_options", [True, False])
@pytest.mark.parametrize("router_class", ROUTERS)
def test_a_router_takes_the_number_of_experts_of_its_layer(router_class, with_options):
    case = CASES[router_class]
    arguments = {**case.required(), **(case.options() if with_options else {})}
    router = router_class(**{**arguments, "num_experts": None})
    config = router.get_config()
    assert config["num_experts"] is None
    router.bind(E)
    router.bind(9)
    expected = router_class.from_config({**config, "num_experts": E})
    ours, theirs = ({**each.get_config(), "name": None} for each in (router, expected))
    assert ours == theirs
    assert (router.top_k, router.max_top_k) == (expected.top_k, expected.max_top_k)


class Tempered(routers.TopKRouter):
    def __init__(self, temperature, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature


@pytest.mark.parametrize(
    "router", [routers.TopKRouter(top_k=1, balancer="loss_free"), Tempered(0.5, top_k=1)]
)
def test_the_router_of_a_layer_is_the_one_it_was_given(router):
    router.trainable = router.updates_selection_bias = False
    layer = moe(router=router)
    assert layer.router is router and router.num_experts == E
    assert not router.trainable and not router.updates_selection_bias
    assert layer(normal(3, D)).shape == (3, D)


def gini(counts):
    counts = np.sort(counts)
    ranks = np.arange(1, len(counts) + 1)
    return 2 * np.sum(ranks * counts) / (len(counts) * np.sum(counts)) - 1 - 1 / len(counts)


def test_a_metric_of_ones_own_is_logged():
    model = keras.Sequential([keras.Input((D,)), moe(name="moe"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    monitor = ExpertMonitor(expert_shares=True, metrics=[gini])
    logs = model.fit(
        normal(16, D), normal(16, 1), validation_split=0.5, callbacks=[monitor], verbose=0
    ).history
    (value,) = logs["moe_gini"]
    shares = [logs[f"moe_expert_share_{expert}"][0] for expert in range(E)]
    assert isinstance(value, float) and value == pytest.approx(gini(shares), abs=1e-6)
    assert "val_moe_gini" in logs
