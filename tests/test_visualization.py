"""Plots: the numbers they show, and that they draw with few and many experts and layers."""

import io

import numpy as np
from backends import on_one_backend
from layer_checks import normal
from matplotlib.colors import to_rgba
from test_inspection import two_block_model

from keras_moe import inspection, visualization
from keras_moe.visualization import MAX_ROWS

# Arrays are drawn by NumPy. Routings are recorded on each backend in `test_inspection.py`.
pytestmark = on_one_backend


def draws(num_experts, tokens=60, top_k=2):
    scores = np.random.default_rng(0).normal(size=(tokens, num_experts))
    return np.argsort(-scores, axis=1)[:, :top_k].astype("int32")


def drawn(figure):
    """The axes of a figure, which must survive being drawn."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return figure.axes


def image(axes):
    return np.asarray(axes.get_images()[0].get_array())


def rows_of(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def titles(figure):
    """Names of the layers."""
    return [axes.get_title().split(" ")[0] for axes in figure.axes if axes.get_title()]


def plots(num_experts, names):
    """Each plot of random data, with a panel for each name."""
    random = np.random.default_rng(0)
    indices = {name: draws(num_experts) for name in names}
    return [
        visualization.shares_over_time({n: random.random((5, num_experts)) for n in names}),
        visualization.specialization(indices, np.arange(60) % 3, num_experts=num_experts),
        visualization.coactivation(indices, num_experts),
    ]


def test_every_plot_draws_any_number_of_experts_and_layers():
    names = [f"layer_{n}" for n in range(4)]
    for figure in plots(4, names):
        drawn(figure)
        assert titles(figure) == names
    for figure in plots(256, ["$a_only$"]):
        axes, *colours = drawn(figure)
        assert len(colours) <= 1 and len(axes.get_xticks()) < 15


def test_shares_are_multiples_of_a_fair_share():
    rows = [[1, 1, 1, 1], [8, 4, 4, 0], [0, 0, 0, 0], [np.nan] * 4]
    axes = drawn(visualization.shares_over_time(rows))[0]
    expected = np.log2([[1, 1, 1, 1], [2, 1, 1, 1 / 8], [1 / 8] * 4, [np.nan] * 4])
    np.testing.assert_allclose(image(axes), expected.T)
    assert axes.get_facecolor() == to_rgba("silver")  # behind NaN
    ticks = {label.get_text() for label in axes.get_xticklabels()}
    assert {"0", "1", "2"} <= ticks


def test_specialization_counts_choices_and_leaves_out_padding():
    indices = [[0, 1], [0, 2], [3, -1], [3, 3], [1, 1]]
    axes = drawn(visualization.specialization(indices, [0, 0, 1, 1, -1], ["a", "b"]))[0]
    np.testing.assert_allclose(image(axes), [[0.5, 0.25, 0.25, 0], [0, 0, 0, 1]])
    assert rows_of(axes) == ["a", "b"]
    assert axes.get_title() == "mutual information: 0.99 of 0.99 bits"
    visualization.specialization(indices, np.array([0, 0, 1, 1, 2], "uint8"), ["a", "b", "c"])
    # Padding is no string.
    indices = np.array([[0], [1], [1], [-1], [-1], [-1]])
    axes = drawn(visualization.specialization(indices, ["a", "b", "b", "p", "p", "p"]))[0]
    assert rows_of(axes) == ["a", "b"]


def test_the_most_frequent_strings_are_sorted_by_their_experts():
    words = ["b"] * 9 + ["a"] * 4 + ["c"] * 4
    indices = np.array([[1]] * 9 + [[0]] * 4 + [[0]] * 2 + [[2]] * 2)
    axes = drawn(visualization.specialization(indices, words))[0]
    assert rows_of(axes) == ["a", "b", "c"], "half of c is most of expert 2"
    words = [f"once_{n}" for n in range(50)] + ["often"] * 3
    axes = drawn(visualization.specialization(draws(4, tokens=53), words))[0]
    assert "often" in rows_of(axes) and len(image(axes)) == MAX_ROWS


def test_coactivation_is_the_share_of_the_rows_tokens():
    indices, nan = np.array([[0, 1], [0, 1], [0, 2], [-1, -1]]), np.nan
    expected = [[nan, 2 / 3, 1 / 3], [1, nan, 0], [1, 0, nan]]
    np.testing.assert_allclose(image(drawn(visualization.coactivation(indices))[0]), expected)


def test_recorded_routings_are_drawn_as_they_are():
    recorded = inspection.record_routings(two_block_model(), [normal(2, 5, 8), normal(2, 5, 8)])
    figures = [
        visualization.coactivation(recorded),
        visualization.specialization(recorded, np.arange(4)),
    ]
    for figure in figures:
        assert titles(figure) == ["first", "second"]
    assert image(figures[0].axes[0]).shape == (4, 4), "experts without a token have a place"
