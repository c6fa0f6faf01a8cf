"""The comparison of routers, on made-up text that needs no network."""

import pathlib
import sys

import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.backends("torch")

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "studies"))

import compare_routers  # noqa: E402
import datasets  # noqa: E402
from made_up_text import made_up_text  # noqa: E402


@pytest.fixture
def made_up_data(monkeypatch):
    data = made_up_text((128, 32, 64))
    monkeypatch.setattr(datasets, "load", lambda name, data_dir=None: data)


def test_routers_learn_and_a_collapse_stays_until_it_is_balanced(
    made_up_data, monkeypatch, tmp_path, capsys
):
    # Twenty steps are few: the bias has to hurry.
    bias = {"balancer": compare_routers.routers.LossFreeBias(rate=0.02)}
    monkeypatch.setitem(compare_routers.BALANCING, "loss_free bias", bias)
    arguments = ["--smoke", "--seeds", "1", "--routers", "top_k", "hash", "--balancing", "nothing"]
    results = compare_routers.main([*arguments, "loss_free bias", "--output", str(tmp_path)])
    assert all(runs[0]["test_accuracy"] > 0.6 for runs in results["routers"].values())
    collapsed = compare_routers.NUM_EXPERTS / 2 - 1  # two of sixteen experts do everything
    assert results["balancing"]["nothing"][0]["imbalance"] == [collapsed] * 2
    assert results["balancing"]["loss_free bias"][0]["imbalance"][-1] < collapsed / 2
    assert "imbalance.png" in [path.name for path in tmp_path.iterdir()]
    table = capsys.readouterr().out.splitlines()
    for name in ("top_k", "hash", "nothing", "loss_free bias"):
        assert sum(line.startswith(name) for line in table) == 1


@pytest.mark.parametrize(
    "imbalance, steps", [([0.1, 0.2], 0), ([7, 0.6, 0.4], 20), ([7, 0.4, 0.6], None)]
)
def test_balance_is_reached_where_it_stays(imbalance, steps):
    assert compare_routers.steps_to_balance(imbalance) == steps
