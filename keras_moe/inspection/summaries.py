"""Engines, sizes and costs of the MoE layers of a model."""

import math
from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import metrics
from keras_moe._internal.plain_text import as_text, table
from keras_moe.backend import backend
from keras_moe.inspection.finding import built_layers, has_moe_layers
from keras_moe.layers.stacked_experts import StackedExperts
from keras_moe.ops.platforms import named_platform

_HEADER = ("layer", "experts", "parameters", "active", "FLOPs a token", "busiest", "dead", "engine")


class LayerSummary(NamedTuple):
    """One MoE layer of a model.

    - `name`: its name in the model.
    - `num_experts`, `top_k`: experts, and how many of them serve a token at most.
    - `parameters`, `active_parameters`: all that are trained, and those that work on one token;
      experts that differ in size count with their mean. K experts work on a token (with
      `routers.TopPRouter` at most), with `routers.ReLURouter` its target, with
      `routers.ExpertChoiceRouter` the capacity factor, with `routers.DenseRouter` all, and with
      `routers.SoftRouter` 1, as if there were as many slots as tokens. Experts that several layers
      share count in each of them.
    - `flops`: of one token, forward, at two for each active parameter.
    - `counts`: assignments per expert, or sums of their weights where all serve each token, since
      the counters were last reset, or in the epoch before that, if they are empty.
    - `router`, `experts`: names of their classes.
    - `dtype`: the compute dtype of the experts.
    - `platform`: "cpu", "gpu" or "tpu".
    - `engine`: "rows" (kernels for all rows at once), "padded" (one batched product over padded
      tiles), "tiles" (a loop over tiles of rows), "slices" (groups of their exact sizes) or "loop"
      (for few rows on TensorFlow); for experts that are Keras layers "vectorized" (all tiles at
      once, each with a copy of its weights), "scan" (one tile after another) or "slices".
    """

    name: str
    num_experts: int
    top_k: int
    parameters: int
    active_parameters: int
    flops: int
    counts: list
    router: str
    experts: str
    dtype: str
    platform: str
    engine: str


def summarize(model: keras.Model) -> list[LayerSummary]:
    """One `LayerSummary` for each MoE layer of a built model, in the order of the model.

    The engine follows from the backend, the platform, the dtype, and whether `model.compile` turned
    XLA on. To read it for a platform that is not here, call this in the context `ops.platform`.

    Args:
        model: A built Keras model.

    Raises:
        ValueError: If the model has no MoE layer, or one that is not built.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32, use_bias=False)
    >>> moe = keras_moe.layers.MixtureOfExperts(experts, name="moe")
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> layer = keras_moe.inspection.summarize(model)[0]
    >>> layer.parameters, layer.active_parameters  # router 16 * 4, experts 2 * 16 * 32 each
    (4160, 2112)
    >>> layer.router, layer.experts, layer.dtype
    ('TopKRouter', 'FeedForwardExperts', 'float32')
    """
    platform = named_platform() or backend.current_platform()
    is_tensorflow = keras.backend.backend() == "tensorflow"
    by_xla = is_tensorflow and bool(getattr(model, "jit_compile", False))
    has_static_shapes = backend.compiles_static_shapes() or by_xla
    return [
        _summary(name, layer, platform, layer.experts.engine_on(platform, has_static_shapes))
        for name, layer in built_layers(model).items()
    ]


def _summary(name, layer, platform, engine):
    router, bank = layer.router, layer.experts
    parameters, of_experts = map(_count, (layer, bank))
    active = parameters - of_experts + round(of_experts * router.mean_top_k / bank.num_experts)
    counts = ops.convert_to_numpy(layer.expert_counts)
    if not counts.any() and layer.last_counts is not None:
        counts = layer.last_counts
    return LayerSummary(
        name=name,
        num_experts=bank.num_experts,
        top_k=router.max_top_k,
        parameters=parameters,
        active_parameters=active,
        flops=2 * active,
        counts=counts.tolist(),
        router=type(router).__name__,
        experts=type(bank).__name__,
        dtype=bank.compute_dtype,
        platform=platform,
        engine=engine,
    )


def summary(model: keras.Model, print_fn: Callable = print) -> None:
    """Print the size and the use of each MoE layer of a model: `model.summary()` for experts.

    Below the parameters of the model, as `model.count_params()` counts them, a table has one row
    for each MoE layer. `inspection.LayerSummary` explains `parameters`, `active`, `FLOPs a token`
    and `engine`. `busiest` is the load of the busiest expert, where 1 is an equal share, and `dead`
    the number of `metrics.dead_experts`: in the last epoch or evaluation that an `ExpertMonitor`
    watched, in all of a training without.

    Args:
        model: A built Keras model.
        print_fn: Function of a string, called once for each line.

    Raises:
        ValueError: If the model has no MoE layer, or one that is not built.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> moe = keras_moe.layers.MixtureOfExperts(experts, name="moe")
    >>> lines = []
    >>> keras_moe.summary(keras.Sequential([keras.Input((16,)), moe]), print_fn=lines.append)
    >>> lines[3].split()[:6]
    ['moe', '2', 'of', '4', '4,352', '2,208']
    """
    layers, (total, active) = summarize(model), count_parameters(model)
    lines = [
        f"{as_text(model.name)}: {total:,} parameters, {active:,} of them active for a token",
        "",
        *table([_HEADER, *map(_row, layers)]),
    ]
    if not any(sum(layer.counts) for layer in layers):
        lines += [
            "",
            "No counts are here: experts are counted in training. To count in evaluation: "
            "`with keras_moe.inspection.count_in_evaluation(model): model.evaluate(...)`.",
        ]
    for line in lines:
        print_fn(line)


def _row(layer):
    used = sum(layer.counts) > 0
    busiest = float(metrics.load_imbalance(layer.counts)) + 1
    return (
        as_text(layer.name),
        f"{layer.top_k} of {layer.num_experts}",
        f"{layer.parameters:,}",
        f"{layer.active_parameters:,}",
        f"{layer.flops:,}",
        f"{busiest:.2f} x fair" if used else "-",
        f"{int(metrics.dead_experts(layer.counts))}" if used else "-",
        f"{layer.engine or '-'} ({layer.platform})",
    )


def count_parameters(model: keras.Model) -> tuple[int, int]:
    """All parameters of a model, and those that work on one token.

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
    """Parameters of a layer without its sublayers, frozen and quantized ones included."""
    shapes = [weight.shape for weight in part._trainable_variables]
    if part.quantization_mode is not None:
        if isinstance(part, StackedExperts):
            shapes += [projection.shape for projection in part.projections]
        else:
            shapes += [each.shape for each in part._non_trainable_variables if each.dtype == "int8"]
    return sum(map(math.prod, shapes))


def _count_unstored(part):
    """How many more parameters a quantized layer has than numbers: two of four bits are one."""
    if part.quantization_mode is None:
        return 0
    stored = [*part._trainable_variables, *part._non_trainable_variables]
    return _count_own(part) - sum(math.prod(weight.shape) for weight in stored)
