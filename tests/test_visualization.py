"""Plots: the numbers they show, and that they draw with few and many experts and layers."""

import io

import keras
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from layer_checks import moe, normal, one_hot, one_hot_router  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402
from test_inspection import two_block_model  # noqa: E402

from keras_moe import inspection, visualization  # noqa: E402
from keras_moe.visualization import labels  # noqa: E402


def draws(num_experts, seed=0, tokens=60, top_k=2):
    scores = np.random.default_rng(seed).normal(size=(tokens, num_experts))
    return np.argsort(-scores, axis=1)[:, :top_k].astype("int32")


def drawn(figure):
    """The axes of a figure, which must survive being drawn."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure.axes


def image(axes):
    return np.asarray(axes.get_images()[0].get_array())


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


DRAW = {
    "shares": lambda e, names: visualization.shares_over_time(
        {n: np.random.default_rng(0).random((5, e)) for n in names}
    ),
    "specialization": lambda e, names: visualization.specialization(
        {n: draws(e) for n in names}, np.arange(60) % 3, num_experts=e
    ),
    "coactivation": lambda e, names: visualization.coactivation({n: draws(e) for n in names}, e),
    "confidence": lambda e, names: visualization.confidence(
        {n: np.random.default_rng(0).dirichlet(np.ones(e), 60) for n in names}
    ),
    "settling": lambda e, names: visualization.settling(
        [{n: draws(e, seed) for n in names} for seed in range(3)], e
    ),
}


@pytest.mark.backends("torch")
@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
@pytest.mark.parametrize("num_experts", [4, 256])
def test_every_plot_draws_any_number_of_experts_and_layers(draw, num_experts):
    names = [f"layer_{n}" for n in range(4)]
    figure = draw(num_experts, names)
    drawn(figure)
    assert [title.split(" ")[0] for title in titles(figure)] == names
    assert len(drawn(draw(num_experts, ["$a_only$"]))) <= 2, "a panel and its colours"


def test_no_plot_has_more_ticks_than_can_be_read():
    for axes in drawn(DRAW["coactivation"](256, ["moe"]))[:1]:
        assert len(axes.get_xticks()) < 15


def test_small_probabilities_fill_the_plot():
    (axes,) = drawn(DRAW["confidence"](256, ["moe"]))
    assert axes.get_xlim()[1] < 0.2


def test_shares_are_multiples_of_a_fair_share():
    rows = [[1, 1, 1, 1], [8, 4, 4, 0], [0, 0, 0, 0], [np.nan] * 4]
    figure = visualization.shares_over_time(rows)
    expected = np.log2([[1, 1, 1, 1], [2, 1, 1, 1 / 8], [1 / 8] * 4, [np.nan] * 4])
    axes = drawn(figure)[0]
    np.testing.assert_allclose(image(axes), expected.T)
    assert axes.get_facecolor() == to_rgba("silver")  # behind what is NaN


def test_shares_of_a_resumed_training_begin_with_its_first_epoch():
    axes, *_ = drawn(visualization.shares_over_time(np.ones((3, 4)), first_epoch=5))
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert {"5", "6", "7"} <= set(labels) and "0" not in labels


def test_specialization_counts_choices_and_leaves_out_padding():
    indices = np.array([[0, 1], [0, 2], [3, -1], [3, 3], [1, 1]])
    axes = drawn(visualization.specialization(indices, [0, 0, 1, 1, -1], ["a", "b"]))[0]
    visualization.specialization(indices, np.array([0, 0, 1, 1, 2], "uint8"), ["a", "b", "c"])
    np.testing.assert_allclose(image(axes), [[0.5, 0.25, 0.25, 0], [0, 0, 0, 1]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_title() == "0.99 of 1.84 bits in common"


def test_labels_of_documents_are_those_of_their_tokens():
    indices = np.array([[0], [0], [1], [1]])
    axes = drawn(visualization.specialization(indices, ["sport", "space"]))[0]
    assert axes.get_title() == "1.00 of 1.00 bits in common"


def test_the_most_frequent_strings_stand_on_top_and_the_rest_is_left_out():
    words = ["rare"] + ["often"] * 3 + [f"once_{n}" for n in range(50)]
    axes = drawn(visualization.specialization(draws(4, tokens=54), words))[0]
    assert axes.get_yticklabels()[0].get_text() == "often"
    assert len(image(axes)) == labels.MAX_ROWS


def test_padding_is_no_frequent_string():
    indices = np.array([[0], [1], [1], [-1], [-1], [-1]])
    axes = drawn(visualization.specialization(indices, ["a", "b", "b", "p", "p", "p"]))[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["b", "a"]


def test_coactivation_is_the_share_of_the_rows_tokens():
    indices = np.array([[0, 1], [0, 1], [0, 2], [-1, -1]])
    nan = np.nan
    expected = [[nan, 2 / 3, 1 / 3], [1, nan, 0], [1, 0, nan]]
    np.testing.assert_allclose(image(drawn(visualization.coactivation(indices))[0]), expected)


def test_confidence_is_the_highest_probability_of_real_tokens():
    layer = moe(router=one_hot_router())
    _, routing = layer(one_hot(0, 1)[None], mask=np.array([[True, False]]), return_routing=True)
    routing = keras.tree.map_structure(keras.ops.convert_to_numpy, routing)
    axes = drawn(visualization.confidence({"moe": [routing, routing]}))[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights[-1] == pytest.approx(1) and sum(heights) == pytest.approx(1)


def test_settling_compares_choices_whatever_their_order():
    moments = [np.array([[0, 1], [2, 3]]), np.array([[1, 0], [0, 1]]), np.array([[0, 1], [0, 1]])]
    axes = drawn(visualization.settling(moments, num_experts=4))[0]
    to_last, to_previous, chance = (line.get_ydata() for line in axes.get_lines())
    np.testing.assert_allclose(to_last, [0.5, 1.0])
    np.testing.assert_allclose(to_previous, [0.5, 1.0])
    assert chance[0] == 0.5


def test_recorded_routings_are_drawn_as_they_are():
    recorded = inspection.record_routings(two_block_model(), [normal(2, 5, 8), normal(2, 5, 8)])
    figures = [
        visualization.specialization(recorded, np.arange(4)),
        visualization.coactivation(recorded),
        visualization.confidence(recorded),
        visualization.settling([recorded, recorded]),
    ]
    for figure in figures:
        drawn(figure)
        assert [title.split(" ")[0] for title in titles(figure)] == ["first", "second"]
    assert image(figures[1].axes[0]).shape == (4, 4), "experts without a token have a place"


def test_a_routing_of_tensors_is_drawn():
    _, routing = moe(router=one_hot_router(top_k=2))(normal(2, 5, 8), return_routing=True)
    for draw in (visualization.coactivation, visualization.confidence):
        drawn(draw({"moe": routing}))
    drawn(visualization.specialization(routing, np.arange(10)))


INDICES = np.zeros((6, 2), "int32")
MISTAKES = {
    "There must be a layer to draw. Received: {}. Pass an array or a dict.": (
        lambda: visualization.confidence({})
    ),
    "Shares must have the axes time and expert. Received: shape (4,). Pass one row for each "
    "epoch.": lambda: visualization.shares_over_time([1, 1, 1, 1]),
    "The experts of tokens must be integers (T, K). Received: shape (6, 2) of float64. Pass "
    "`routing.indices`, or what `inspection.record_routings(model, batches)` returns.": lambda: (
        visualization.coactivation(INDICES.astype("float64"))
    ),
    "There must be one label for each token, or for each of equally long documents. Received: "
    "labels.shape=(4,) for 6 tokens. Flatten the labels, and repeat those of documents that differ "
    "in length.": lambda: visualization.specialization(INDICES, [0, 1, 2, 3]),
    "Settling needs at least two checkpoints to compare. Received: 1. Record routings several "
    "times while training.": lambda: visualization.settling([INDICES]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_told_with_the_way_out(message):
    with pytest.raises(ValueError) as error:
        MISTAKES[message]()
    assert str(error.value) == message


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch):
    import importlib
    import sys

    panels = sys.modules["keras_moe.visualization.panels"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError) as error:
        importlib.reload(panels)
    assert str(error.value) == (
        "Plots need matplotlib, which is not installed. Run `pip install matplotlib`."
    )
