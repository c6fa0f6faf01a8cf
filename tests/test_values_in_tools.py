"""What tools for whole models take: their bad calls are refused before anything is done."""

import json

import keras
import numpy as np
import pytest
from layer_checks import D, E, moe, normal
from test_values_in import BAD_SEEDS, cases, is_refused

from keras_moe import (
    convert,
    inspection,
    layers,
    losses,
    optimizers,
    report,
    routers,
    summary,
    surgery,
    upcycle,
)

NO_MODELS = [None, "model.keras", 3, keras.Sequential]
NANS = np.full((2, D), np.nan, "float32")
MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "hidden_size": D,
    "intermediate_size": 3,
}


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "hidden_size": D,
    "moe_intermediate_size": 3,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def sparse():
    return keras.Sequential([keras.Input((D,)), moe(name="moe")])


def unbuilt():
    return keras.Sequential([moe()])


def dense():
    wide = keras.layers.Dense(6, "relu", name="up")
    return keras.Sequential([keras.Input((D,)), wide, keras.layers.Dense(D)])


def gated(**kwargs):
    layer = layers.MixtureOfExperts(layers.GatedExperts(E, 3, **kwargs.pop("bank", {})), **kwargs)
    layer.build((None, D))
    return layer


def compiled():
    model = sparse()
    model.compile("sgd", "mse")
    return model


def of_ids():
    ids = keras.Input((3,), dtype="int32", name="ids")
    return keras.Model(ids, moe()(keras.layers.Embedding(9, D)(ids)))


# The sizes are those of mixtral, the outputs are not.
NOT_MIXTRAL = [
    {"bank": {"activation": "gelu"}},
    {"bank": {"clip": 7.0}},
    {"bank": {"up_shift": 1.0}},
    {"router": routers.TopKRouter(score="sigmoid")},
    {"router": routers.TopKRouter(renormalize=False)},
    {"router": routers.TopKRouter(scaling_factor=2.0)},
    {"router": "dense"},
    {"router": "expert_choice"},
    {"router": "sinkhorn"},
]


def of_mixtral(gate=None):
    """Weights of a block of Mixtral, with another array for the router's."""
    weights = convert.to_hugging_face(gated(), 0, "mixtral")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    return {**weights, name: weights[name] if gate is None else gate}


def pruned(by="usage", data=(), **kwargs):
    model = keras.Sequential([keras.Input((D,)), moe(name="moe", **kwargs)])
    return surgery.prune_experts(model, by, keep=2, data=data)


# Experts choose, or tokens go to all of them.
CHOOSE_ALL = ["expert_choice", "dense"]

TOOLS = {
    "has_moe_layers": [(inspection.has_moe_layers, NO_MODELS)],
    "record_routings": [
        (lambda v: inspection.record_routings(v, [normal(2, D)]), NO_MODELS),
        (lambda v: inspection.record_routings(sparse(), v), [None, "x", 5, {"x": 1}, normal(2, D)]),
        (
            lambda v: inspection.record_routings(sparse(), v),
            [
                (normal(2, D), normal(2, D)),
                [normal(2, D + 1)],
                [[normal(2, D), normal(2, D)]],
                [],
                iter([]),
                [None],
                ["a"],
                [{"x": normal(2, D)}],
            ],
        ),
        (lambda v: inspection.record_routings(of_ids(), v), [[normal(2, 3)]]),
    ],
    "count_in_evaluation": [(inspection.count_in_evaluation, NO_MODELS)],
    "describe": [(inspection.describe, [*NO_MODELS, unbuilt()])],
    "Muon": [(lambda v: optimizers.Muon(exclude_layers=v), ["moe", 5, ["("], [3]])],
    "count_parameters": [(inspection.count_parameters, [*NO_MODELS, unbuilt()])],
    "summarize": [(inspection.summarize, [*NO_MODELS, unbuilt()])],
    "summary": [
        (lambda v: summary(sparse(), print_fn=v), [None, "print", lambda: None]),
        (summary, [*NO_MODELS, unbuilt()]),
    ],
    "sparsify": [(convert.sparsify, NO_MODELS)],
    "restore": [(convert.restore, NO_MODELS)],
    "to_hugging_face": [
        (lambda v: convert.to_hugging_face(v, 0, "mixtral"), [None, sparse(), moe()]),
        (lambda v: convert.to_hugging_face(gated(), v, "mixtral"), [-1, "0", 1.0, True]),
        # Weights that the family has no place for would be lost.
        (
            lambda v: convert.to_hugging_face(gated(**v), 0, "mixtral"),
            [{"bank": {"use_bias": True}}, {"shared_expert": keras.layers.Dense(D)}],
        ),
        (lambda v: convert.to_hugging_face(gated(**v), 0, "mixtral"), NOT_MIXTRAL),
    ],
    "from_hugging_face": [
        (lambda v: convert.from_hugging_face({}, v, MIXTRAL), [-1, "0", 1.0, True]),
        (lambda v: convert.from_hugging_face({}, 0, v), ["mixtral", 3, {"model_type": "mixtral"}]),
        (lambda v: convert.from_hugging_face({}, 0, MIXTRAL, into=v), ["moe", sparse(), moe()]),
        (lambda v: convert.from_hugging_face({}, 0, MIXTRAL, gated(), name=v), ["b"]),
        (
            lambda v: convert.from_hugging_face(of_mixtral(), 0, MIXTRAL, gated(**v)),
            [*NOT_MIXTRAL[:3], {"router": routers.TopKRouter(top_k=1)}],
        ),
        (lambda v: convert.from_hugging_face({}, 0, {**MIXTRAL, "hidden_act": v}), ["foo"]),
        *(
            (
                lambda v, field=field: convert.from_hugging_face({}, 0, {**DEEPSEEK, field: v}),
                [None, "x", -1],
            )
            for field in DEEPSEEK
        ),
        (
            lambda v: convert.from_hugging_face(of_mixtral(v), 0, MIXTRAL),
            [np.full((E, D), "a")],
        ),
        (lambda v: convert.from_hugging_face(v, 0), [None, 5, {}, ""]),
    ],
    "upcycle": [
        (upcycle, [None, "model"]),
        (lambda v: upcycle(dense(), select=v), ["(", 5, lambda: True, [3], [["up"]]]),
        (lambda v: upcycle(dense(), seed=v), BAD_SEEDS),
        (lambda v: upcycle(dense(), every=v), [0, 2]),
    ],
    "prune_experts": [
        (lambda v: pruned(by=v), [[1, 2, float("nan"), 3], ["a"] * E, abs, [[1], [2, 3]]]),
        (lambda v: pruned(by=v), [None, 0.5, 2, {"moe": [1] * E, "meo": [1] * E}, {}]),
        (lambda v: pruned(v, [normal(2, D)], router="soft"), ["usage", "saliency", [1] * E]),
        (lambda v: pruned(data=v), [None, "x", 5, [()], [(normal(2, D), normal(1, D))]]),
        (lambda v: pruned(data=v), [(normal(2, D), normal(2, D)), [normal(2, D + 1)]]),
        (lambda v: pruned(data=v), [[(normal(2, D),) * 4], [np.zeros((0, D), "float32")]]),
        *(
            (lambda v, by=by: pruned(by=by, data=v), [[NANS]])
            for by in ("usage", "saliency", "contribution")
        ),
        (
            lambda v: surgery.prune_experts(compiled(), [1] * E, 2, v),
            [[(normal(2, D), NANS)], [(normal(2, D + 1), normal(2, D))], [(normal(2, D), None)]],
        ),
        (lambda v: surgery.prune_experts(sparse(), [1] * E, v), [{}]),
        (lambda v: pruned([1] * E, router=v), [*CHOOSE_ALL, routers.ReLURouter(top_k=3)]),
    ],
    "merge_experts": [(lambda v: surgery.merge_experts(sparse(), 2, v), [[NANS], [NANS[:0]]])],
    "set_top_k": [
        (lambda v: surgery.set_top_k(sparse(), v), [0, E + 1, "2", None, {}, {"nope": 1}]),
        (lambda v: surgery.set_top_k(moe(router=v), 1), CHOOSE_ALL),
    ],
}


@pytest.mark.parametrize("call, value", cases(TOOLS))
def test_a_tool_refuses(call, value):
    is_refused(call, value)


def test_a_context_is_entered_again():
    model = sparse()
    (layer,) = model.layers
    counting = inspection.count_in_evaluation(model)
    for _ in range(2):
        with counting, counting:
            model(normal(2, D))
        assert not layer.counts_in_evaluation
    assert np.sum(keras.ops.convert_to_numpy(layer.expert_counts)) == 8


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"model_type": "mixtral"}'])
def test_a_config_that_is_none_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    is_refused(lambda path: convert.from_hugging_face(path, 0), tmp_path)


def test_a_file_of_weights_that_is_none_is_named(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    is_refused(lambda path: convert.from_hugging_face(path, 0), tmp_path)


@pytest.mark.parametrize("path", [None, 5, "", True, b"page.html", "no/such/page.html", "."])
def test_a_report_names_a_wrong_path_before_it_runs_the_model(path):
    is_refused(lambda path: report(None, None, path=path), path)


@pytest.mark.parametrize("labels", [[0.5, 1.5], [None, None], ["a", 1]])
def test_a_report_refuses_labels_that_are_none(labels, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.html"
    is_refused(lambda v: report(sparse(), normal(2, D), labels=v, path=path), labels)


@pytest.mark.parametrize(
    "data", [None, "data", [[1, 2, 3]], np.full((2, 3), "a"), np.ones((2, 4), int), normal(2, 3)]
)
def test_a_report_refuses_data_that_are_none(data, tmp_path):
    pytest.importorskip("matplotlib")
    is_refused(lambda v: report(of_ids(), v, path=tmp_path / "page.html"), data)


@pytest.mark.parametrize(
    "arguments",
    [
        ([normal(2, D), normal(2, D)],),
        (normal(2, D + 1),),
        (np.array([["a"] * D] * 2),),
        (normal(2, D), [1]),
        (normal(2, D), None, "text"),
    ],
)
def test_a_report_of_a_model_without_experts_refuses(arguments, tmp_path):
    pytest.importorskip("matplotlib")
    is_refused(lambda v: report(dense(), *v, path=tmp_path / "page.html"), arguments)


def test_a_report_names_labels_in_their_shape(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"labels.shape=\(2, 3\) for 2 tokens"):
        report(sparse(), normal(2, D), np.zeros((2, 3), int), path=tmp_path / "page.html")


def test_weights_of_a_dense_model_are_none_of_a_mixture(tmp_path):
    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(D)])
    model.save_weights(tmp_path / "dense.weights.h5")
    is_refused(sparse().load_weights, tmp_path / "dense.weights.h5")


def test_a_tuner_refuses():
    keras_tuner = pytest.importorskip("keras_tuner")
    from keras_moe import tuner

    hp = keras_tuner.HyperParameters

    def watching(callback):
        callback.set_model(sparse())
        return callback

    def sampled(*names):
        """Spaces of these names, which differ in their values, in one search."""
        search = hp()
        for number, name in enumerate(names, 1):
            tuner.SearchSpace((8 * number,), name=name).sample(search)

    def priced(cost):
        search = type("Tuner", (), {"oracle": oracle("val_loss", 3)})
        tuner.pareto_table(search, cost)

    def without_constructor(*bases):
        return type("OfOnesOwn", bases, {"__init__": lambda self: None})()

    oracle = keras_tuner.oracles.RandomSearchOracle
    row = tuner.ParetoRow("a", 1.0, 2.0, True, {})
    calls = {
        "fields of a row": [
            (lambda v: tuner.format_table([row._replace(**v)]), [{"cost": "1"}, {"trial": 1}]),
            (lambda v: tuner.format_table([row._replace(**v)]), [{"loss": None}, {"values": None}]),
        ],
        "loss_weights": [(lambda v: tuner.SearchSpace((8,), loss_weights=v), [0.1, "x", (1, 2)])],
        "name": [(lambda v: tuner.SearchSpace((8,), name=v), [3, "", None])],
        "hp": [(lambda v: tuner.SearchSpace((8,)).sample(v), [None, {}, keras_tuner])],
        "cost": [(lambda v: tuner.WithinBudget(9, cost=v), [None, ""])],
        "loss": [(lambda v: tuner.WithinBudget(9, loss=v), [None, 1])],
        "model": [(lambda v: tuner.CostMonitor().on_epoch_end(0, v), [None, {}])],
        "epoch": [(lambda v: watching(tuner.CostMonitor()).on_epoch_end(0, v), [None, {}])],
        "experts": [(lambda v: tuner.SearchSpace((8,)).sample(hp(), v), [None, lambda n: n])],
        "experts made already": [
            (lambda v: tuner.SearchSpace((8,)).sample(hp(), v), [layers.FeedForwardExperts(E, 4)]),
        ],
        "classes that make no bank": [
            (
                lambda v: tuner.SearchSpace((8,)).sample(hp(), v),
                [keras.layers.Dense, layers.MixtureOfExperts, lambda n, h: keras.layers.Dense(h)],
            ),
        ],
        "two spaces of one name": [(lambda v: sampled(*v), [("moe", "moe")])],
        "values of a space, later": [
            (lambda v: setattr(tuner.SearchSpace((8,)), *v), [("top_k", 3), ("name", None)]),
            (
                lambda v: setattr(tuner.SearchSpace((8,)), *v),
                [("capacity_factors", (1.0,)), ("loss_weights", 0.1)],
            ),
        ],
        "subclasses": [
            (lambda v: without_constructor(tuner.SearchSpace).sample(v), [hp()]),
            (lambda v: without_constructor(tuner.WithinBudget).get_value(v), [{}]),
            (
                lambda v: without_constructor(tuner.DefaultsFirst, oracle).populate_space(v),
                ["0"],
            ),
        ],
        "bases of an oracle": [
            (
                lambda v: type("Mine", v, {})("val_loss", 3),
                [(tuner.DefaultsFirst,), (oracle, tuner.DefaultsFirst)],
            ),
        ],
        "chosen": [
            (
                lambda v: tuner.SearchSpace((8,)).sample(hp(), **v),
                [{"router": "soft"}, {"capacity_factor": 1.0}],
            ),
        ],
        "losses besides": [
            (
                lambda v: tuner.SearchSpace((8,)).sample(hp(), router_losses=v),
                [None, "load_balance", losses.LoadBalance(), [1]],
            ),
        ],
        "logs": [
            (tuner.WithinBudget(9).get_value, [None, "val_loss", {"val_loss": 1.0}]),
            (tuner.WithinBudget(9).has_value, [None, "val_loss"]),
            (
                lambda v: tuner.WithinBudget(9).get_value({"active_flops": 1.0, "val_loss": v}),
                ["x", None, [1, 2]],
            ),
        ],
        "weights": [
            (
                lambda v: tuner.SearchSpace((8,), loss_weights={"load_balance": v}),
                [("a",), (True,), (-1.0,), (0.1, 0.1), ()],
            ),
        ],
        "search": [(tuner.pareto_table, [None, "search"]), (priced, [3, ["val_loss"], None])],
        "rows": [(tuner.format_table, [None, "rows", [1], [("a", 1.0, 2.0, True, {})]])],
    }
    for case in cases(calls):
        is_refused(*case.values)
    sampled("moe", "second_moe")
    search = hp()
    for number, scope in enumerate(("encoder", "decoder"), 1):
        with search.name_scope(scope):
            tuner.SearchSpace((8 * number,)).sample(search)
    search.Boolean("wide")
    for number, wide in enumerate((True, False), 1):
        with search.conditional_scope("wide", [wide]):
            if search.get("wide") == wide:
                tuner.SearchSpace((8 * number,)).sample(search)
    search = hp()
    for _ in range(2):  # as where the function that builds a model makes the space
        tuner.SearchSpace((8, 16), capacity_factors=(None, 1.0)).sample(search)


@pytest.mark.parametrize("devices", ["cpu:0", 5, [None], ["gpu:99"]])
def test_devices_that_do_not_exist_are_named(devices):
    if keras.backend.backend() != "jax":
        pytest.skip("only JAX has devices to choose from")
    from keras_moe import distribution

    is_refused(lambda v: distribution.expert_parallel(experts=1, devices=v), devices)
