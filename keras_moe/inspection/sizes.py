"""Sizes and costs of the MoE layers of a model."""

import math
from typing import NamedTuple

from keras import ops

from keras_moe import metrics
from keras_moe._internal.plain_text import as_text
from keras_moe.inspection.engines import describe
from keras_moe.inspection.finding import built_layers, has_moe_layers
from keras_moe.layers.stacked_experts import StackedExperts

_HEADER = ("layer", "experts", "parameters", "active", "FLOPs a token", "busiest", "dead", "engine")


class LayerSummary(NamedTuple):
    """One MoE layer.

    - `name`: its name in the model.
    - `num_experts`, `top_k`: experts, and how many of them serve a token at most.
    - `parameters`, `active_parameters`: all that are trained, and those of them that work on one
      token; experts that differ in size count with their mean. How many experts work on a token is
      K where tokens choose (with `routers.TopPRouter` that is the most), the target of
      `routers.ReLURouter`, the capacity factor of `routers.ExpertChoiceRouter`, all of
      `routers.DenseRouter`. With `routers.SoftRouter` it is 1, as if there were as many slots as
      tokens: the cost is that of the slots, however many tokens they are mixed from. Experts that
      several layers share count in each of them.
    - `flops`: of one token, forward, at two for each active parameter.
    - `counts`: assignments per expert since the counters were last reset, or in the epoch before
      that, if they are empty.
    """

    name: str
    num_experts: int
    top_k: int
    parameters: int
    active_parameters: int
    flops: int
    counts: list


def summarize(model):
    """One `LayerSummary` for each MoE layer of a built model, in the order of the model.

    Args:
        model: A built Keras model.

    Raises:
        ValueError: If the model has no MoE layer, or one that is not built.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32, use_bias=False)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> layer = keras_moe.inspection.summarize(model)[0]
    >>> layer.parameters, layer.active_parameters  # router 16 * 4, experts 2 * 16 * 32 each
    (4160, 2112)
    """
    return [_summary(name, layer) for name, layer in built_layers(model).items()]


def _summary(name, layer):
    num_experts, router = layer.experts.num_experts, layer.router
    parameters, experts = map(_count, (layer, layer.experts))
    active = parameters - experts + round(experts * router.mean_top_k / num_experts)
    counts = ops.convert_to_numpy(layer.expert_counts)
    if not counts.any() and layer.last_counts is not None:
        counts = layer.last_counts
    counts = counts.tolist()
    return LayerSummary(name, num_experts, router.max_top_k, parameters, active, 2 * active, counts)


def summary(model, print_fn=print):
    """Print the size and the use of each MoE layer of a model: `model.summary()` for experts.

    Below the parameters of the model (those of `model.count_params()`, which counts the counters of
    the layers as well), a table has one row for each MoE layer. `parameters`, `active` and
    `FLOPs a token` are those of `inspection.LayerSummary`. `busiest` is the load of the busiest
    expert, where 1 is an equal share, and `dead` the number of experts without a token: in the last
    epoch or evaluation that an `ExpertMonitor` watched, in all of a training without. `engine` is
    that of `inspection.LayerDescription`.

    Args:
        model: A built Keras model.
        print_fn: Function of a string, called once for each line.

    Raises:
        ValueError: If the model has no MoE layer, or one that is not built.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> lines = []
    >>> keras_moe.summary(model, print_fn=lines.append)
    >>> lines[3].split()[:6]
    ['moe', '2', 'of', '4', '4,352', '2,208']
    """
    descriptions, layers = describe(model), summarize(model)
    total, active = count_parameters(model)
    print_fn(f"{as_text(model.name)}: {total:,} parameters, {active:,} of them active for a token")
    print_fn("")
    rows = [_HEADER, *map(_row, layers, descriptions)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print_fn("  ".join([name.ljust(widths[0]), *cells]))
    if not any(sum(layer.counts) for layer in layers):
        print_fn("")
        print_fn(
            "No counts are here: experts are counted in training. To count in evaluation: "
            "`with keras_moe.inspection.count_in_evaluation(model): model.evaluate(...)`."
        )


def _row(layer, description):
    used = sum(layer.counts) > 0
    busiest = float(metrics.load_imbalance(layer.counts)) + 1
    return (
        as_text(layer.name),
        f"{layer.top_k} of {layer.num_experts}",
        f"{layer.parameters:,}",
        f"{layer.active_parameters:,}",
        f"{layer.flops:,}",
        f"{busiest:.2f} x fair" if used else "-",
        str(layer.counts.count(0)) if used else "-",
        f"{description.engine or '-'} ({description.platform})",
    )


def count_parameters(model):
    """All parameters of a model, and those of them that work on one token.

    Experts that several layers share count once. As many of them work on a token as these layers
    choose together, and at most all.

    Args:
        model: A built Keras model, with MoE layers or without.

    Returns:
        Two integers.

    Raises:
        ValueError: If the model is not built.
    """
    # By part, because layers may share a bank, and banks a layer.
    active_shares: dict = {}
    for layer in built_layers(model).values() if has_moe_layers(model) else ():
        share = layer.router.mean_top_k / layer.experts.num_experts
        for part in layer.experts._flatten_layers():
            active_shares[part] = min(1.0, active_shares.get(part, 0.0) + share)
    idle = sum((1 - share) * _count_own(part) for part, share in active_shares.items())
    total = model.count_params() + sum(map(_count_unstored, active_shares))
    return total, total - round(idle)


def _count(layer):
    return sum(map(_count_own, layer._flatten_layers()))


def _count_own(part):
    """Parameters of a layer without those of its sublayers, frozen and quantized ones included."""
    shapes = [weight.shape for weight in part._trainable_variables]
    if isinstance(part, StackedExperts) and part.quantization_mode is not None:
        shapes += [projection.shape for projection in part.projections]
    elif part.quantization_mode is not None:
        integers = (each for each in part._non_trainable_variables if each.dtype == "int8")
        shapes += [weight.shape for weight in integers]
    return sum(map(math.prod, shapes))


def _count_unstored(part):
    """How many more parameters a quantized layer has than numbers: two of four bits are one."""
    if part.quantization_mode is None:
        return 0
    stored = [*part._trainable_variables, *part._non_trainable_variables]
    return _count_own(part) - sum(math.prod(weight.shape) for weight in stored)
