"""Heat maps of what each expert serves."""

import numpy as np
from matplotlib.figure import Figure
from whole_files import save_figure


def experts_by_class(usage, class_names, path):
    """Heat map of the share of each class's tokens that an expert serves.

    `usage` maps a layer's name to its (classes, experts) counts.
    """
    figure = Figure(figsize=(2 + 4 * len(usage), 2 + 0.25 * len(class_names)), layout="constrained")
    panels = figure.subplots(1, len(usage), squeeze=False, sharey=True)[0]
    for axes, (name, counts) in zip(panels, usage.items()):
        even = 1 / counts.shape[1]
        image = axes.imshow(shares(counts), aspect="auto", cmap="viridis", vmin=0)
        axes.set(title=name, xlabel="expert", xticks=range(counts.shape[1]))
        figure.colorbar(image, ax=axes, label=f"share of the row's tokens, even: {even:.3g}")
    panels[0].set_yticks(range(len(class_names)), class_names)
    save_figure(figure, path)


def experts_by_layer(usage, path):
    """Heat map of the share of each layer's tokens that an expert serves; see above."""
    layers = np.array([shares(counts.sum(axis=0)) for counts in usage.values()])
    figure = Figure(figsize=(6, 1.5 + 0.35 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(layers, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="expert", xticks=range(layers.shape[1]))
    axes.set_yticks(range(len(layers)), usage)
    figure.colorbar(image, ax=axes, label="share of the layer's tokens")
    save_figure(figure, path)


def shares(counts):
    """Counts along the last axis as shares of their sum; zeros where there are none."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
