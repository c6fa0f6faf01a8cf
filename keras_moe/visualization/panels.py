"""Figures with one panel for each layer, and axes that suit any number of experts."""

import math

from keras_moe._internal.plain_text import as_text

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        "Plots need matplotlib, which is not installed. Run `pip install matplotlib`."
    ) from error

PANEL_SIZE = (4.4, 3.4)
MAX_COLUMNS = 3


def one_panel_a_layer(layers, draw, panel_size=PANEL_SIZE):
    """A figure whose panels are drawn by `draw(axes, array)`; `layers` maps names to arrays."""
    columns = min(len(layers), MAX_COLUMNS)
    rows = math.ceil(len(layers) / columns)
    # Names come from data: a dollar sign in them must not start a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure((columns * panel_size[0], rows * panel_size[1]), layout="constrained")
        panels: list = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (name, array) in zip(panels, layers.items()):
            draw(axes, array)
            axes.set_title(" · ".join(part for part in (as_text(name), axes.get_title()) if part))
    for axes in panels[len(layers) :]:
        axes.remove()
    return figure


def heat_map(axes, values, colour_label, **kwargs):
    """Values (rows, columns) as colours. Rows run downwards."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **kwargs)
    return axes.figure.colorbar(image, ax=axes, label=colour_label)


def count_on(axis):
    """Whole numbers along an axis, as many as there is room for."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
