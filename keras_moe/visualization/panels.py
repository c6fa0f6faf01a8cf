"""Arrays, lists or recorded routings by layer, and figures with one panel for each layer."""

import math

import matplotlib
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keras_moe._internal.checks import check_indices, check_integer
from keras_moe._internal.plain_text import as_text
from keras_moe.ops.routing import Routing

PANEL_SIZE = (4.4, 3.4)
MAX_COLUMNS = 3


def by_layer(source):
    """Dict of names to arrays or routings; the name of a lone array is the empty string."""
    named = source if isinstance(source, dict) else {"": source}
    if not named:
        raise ValueError("There must be a layer to draw. Received: {}")
    return {name: _joined(value) for name, value in named.items()}


def _joined(value):
    """One routing for a list of them, else an array."""
    routings = [value] if isinstance(value, Routing) else value
    if not isinstance(routings, (list, tuple)) or not isinstance(next(iter(routings), 0), Routing):
        return ops.convert_to_numpy(value)
    fields = zip(*(map(ops.convert_to_numpy, routing[:7]) for routing in routings))
    *of_tokens, counts, dropped = fields
    dropped = np.average(dropped, weights=[max(each.sum(), 1) for each in counts])
    return Routing(*[*map(np.concatenate, of_tokens), np.sum(counts, axis=0), dropped])


def routings_by_layer(source, num_experts=None):
    """Dict of names to routings, which have no probabilities if they come from indices."""
    found = by_layer(source)
    for name, value in found.items():
        if isinstance(value, Routing):
            continue
        if value.ndim != 2 or not value.size or value.dtype.kind not in "iu":
            received = f"{value.dtype} of shape {value.shape}"
            raise ValueError(f"The experts of tokens must be integers (T, K). Received: {received}")
        number = max(int(value.max()) + 1, 1) if num_experts is None else num_experts
        check_indices("indices", value, check_integer("num_experts", number))
        counts, mask = np.bincount(value[value >= 0], minlength=number), (value >= 0).any(axis=1)
        found[name] = Routing(value.astype("int32"), None, None, None, mask, counts, None)
    return found


def probabilities_by_layer(source):
    """Dict of names to probabilities (T, E) of the real tokens."""
    found = by_layer(source)
    for name, value in found.items():
        found[name] = value = value.probs[value.mask] if isinstance(value, Routing) else value
        is_table = value.ndim == 2 and value.shape[1] and value.dtype.kind == "f"
        if not is_table or not ((value >= 0) & (value <= 1 + 1e-4)).all():
            received = f"{value.dtype} of shape {value.shape}"
            raise ValueError(f"Probabilities must be floats (T, E) in [0, 1]. Received: {received}")
    return found


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
            axes.set_title(" · ".join(filter(None, (as_text(name), axes.get_title()))))
    for axes in panels[len(layers) :]:
        axes.remove()
    return figure


def heat_map(axes, values, colour_label, **kwargs):
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **kwargs)
    return axes.figure.colorbar(image, ax=axes, label=colour_label)


def count_on(*sides):
    for axis in sides:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
