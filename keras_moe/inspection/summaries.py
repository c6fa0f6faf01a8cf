"""The MoE layers of a model: their names, sizes and costs."""

import collections
import math
import os
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_moe import metrics
from keras_moe._internal.keras_internals import own_layers
from keras_moe.layers.gate import Gate
from keras_moe.layers.low_rank_experts import LowRankExperts
from keras_moe.layers.stacked_experts import StackedExperts

# Control and formatting characters, lone surrogates, separators of lines and paragraphs. Among them
# are those that turn the direction of writing, and those that a terminal obeys.
_ACTIVE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# They join letters and emojis.
_JOINERS = "\u200c\u200d"


def moe_layers(model: keras.Model) -> dict[str, Gate]:
    """The MoE layers of a Keras model by name, a dict in the order of the model.

    These are each `layers.MixtureOfExperts`, and the gate of each task of a
    `layers.MultiGateMixtureOfExperts`. If two have the same name, all get their paths, without the
    common beginning, or numbers. Raises a ValueError if the model has none.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> layers = keras_moe.inspection.moe_layers(keras.Sequential([keras.Input((16,)), moe]))
    """
    layers = named_layers(model)
    if not layers:
        rule = "The model must have a `MixtureOfExperts` layer"
        raise ValueError(f"{rule}. Received: {model.name!r} without one")
    return layers


def named_layers(model):
    """The MoE layers of a model by name, as `moe_layers`, or {}."""
    layers = find_layers(model)
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        paths = [layer.path.split("/") for layer in layers]
        shared = len(os.path.commonprefix(paths))
        names = ["_".join(path[shared:] or path[-1:]) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}_{number}" for number, name in enumerate(names)]
    return dict(zip(names, layers))


def find_layers(model):
    """The MoE layers in a model or layer, a list in the order of the model."""
    found: dict = {}

    def visit(layer):  # Keras lists nested models in reverse.
        if layer not in found:
            found[layer] = isinstance(layer, Gate)
            for part in own_layers(layer):
                visit(part)

    visit(model)
    return [layer for layer, is_mixture in found.items() if is_mixture]


def architecture(layer):
    """Yield classes, activations and shapes, which are equal in layers of one architecture."""
    for part in layer._flatten_layers():
        activation = getattr(part, "activation", None)
        yield type(part).__name__, getattr(activation, "__name__", type(activation).__name__)
    yield from ((weight.name, tuple(weight.shape)) for weight in layer.weights)


class LayerSummary(NamedTuple):
    """One MoE layer of a model.

    - `name`: its name in the model.
    - `num_experts`, `top_k`: number of experts, and of experts per token at most.
    - `parameters`, `active_parameters`: all that are trained, and those used for one token, which
      has `router.mean_top_k` experts. Experts that differ in size count with their mean.
    - `shared_parameters`: those among `parameters` that other MoE layers of the model have as well.
    - `flops`: of one token in a forward pass, two for each active parameter. Where whole samples
      are tokens, a parameter counts for each position that it is applied to, as in a convolution.
    - `counts`: assignments per expert over the whole training, or sums of their weights if each
      token has all experts; of a layer that was not trained, over counted evaluations.
    - `router`, `experts`: names of their classes.
    - `dtype`: of the experts, "int8" or "int4" if any is quantized, else the compute dtype.
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
    shared_parameters: int = 0


def summarize(model: keras.Model) -> list[LayerSummary]:
    """One `LayerSummary` for each MoE layer of a built model, in the order of the model.

    Args:
        model: A built Keras model with MoE layers.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32, use_bias=False)
    >>> moe = keras_moe.layers.MixtureOfExperts(experts, name="moe")
    >>> layer = keras_moe.inspection.summarize(keras.Sequential([keras.Input((16,)), moe]))[0]
    >>> layer.parameters, layer.active_parameters  # router 16 * 4, experts 2 * 16 * 32 each
    (4160, 2112)
    """
    summaries, layers = [], moe_layers(model)
    number_of = collections.Counter(part for each in layers.values() for part in _parts(each))
    for name, layer in layers.items():
        router, bank = layer.router, layer.banks[0]
        sizes = {part: _count_own(part) for part in _parts(layer)}
        shares = _active_shares([layer])
        active = {part: shares.get(part, 1.0) * size for part, size in sizes.items()}
        multiplied = active
        if getattr(layer, "token_axes", None) is not None:
            multiplied = {part: size * _num_positions(part) for part, size in active.items()}
        counts = layer.read_counts().assignments
        if not counts.any():
            counts = layer.read_counts(evaluation=True).assignments
        modes = [part.quantization_mode for part in bank._flatten_layers()]
        summaries.append(
            LayerSummary(
                name,
                num_experts=router.num_experts,
                top_k=router.max_top_k,
                parameters=sum(sizes.values()),
                active_parameters=round(sum(active.values())),
                flops=2 * round(sum(multiplied.values())),
                counts=counts.tolist(),
                router=type(router).__name__,
                experts=type(bank).__name__,
                dtype=next(filter(None, modes), bank.compute_dtype),
                shared_parameters=sum(sizes[part] for part in sizes if number_of[part] > 1),
            )
        )
    return summaries


def summary(model: keras.Model, print_fn: Callable = print) -> None:
    """Print the size and the use of each MoE layer of a model: `model.summary()` for experts.

    Each row has an `inspection.LayerSummary`. `busiest` is the load of the busiest expert, where 1
    is the mean, and `dead` the number of `metrics.dead_experts`, both over the whole training.

    Args:
        model: A built Keras model with MoE layers.
        print_fn: Function of a string, called once for each line.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> keras_moe.summary(keras.Sequential([keras.Input((16,)), moe]), print_fn=[].append)
    """
    layers, (total, active) = summarize(model), count_parameters(model)
    lines = [f"{as_text(model.name)}: {total:,} parameters, {active:,} of them active for a token"]
    rows = list(map(table_row, layers))
    lines += ["", *table([list(rows[0]), *(list(row.values()) for row in rows)])]
    if not any(sum(layer.counts) for layer in layers):
        lines += [
            "",
            "No counts are here: experts are counted in training. To count in evaluation: "
            "`with keras_moe.inspection.count_in_evaluation(model): model.evaluate(...)`.",
        ]
    for line in lines:
        print_fn(line)


def table_row(layer):
    """The cells of a table about a `LayerSummary`, a dict of texts by column."""
    used, shared = sum(layer.counts) > 0, layer.shared_parameters
    busiest = float(metrics.load_imbalance(layer.counts)) + 1
    return {
        "layer": as_text(layer.name),
        "experts": f"{layer.top_k} of {layer.num_experts}",
        "parameters": f"{layer.parameters:,}" + f" ({shared:,} shared)" * bool(shared),
        "active": f"{layer.active_parameters:,}",
        "FLOPs per token": f"{layer.flops:,}",
        "busiest": f"{busiest:.2f} x fair" if used else "-",
        "dead": f"{int(metrics.dead_experts(layer.counts))}" if used else "-",
        "dtype": layer.dtype,
    }


def as_text(value):
    r"""The text of a value, with an escape such as `\u202e` for each character that would act."""
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in _ACTIVE and letter not in _JOINERS
        else letter
        for letter in str(value)
    )


def table(rows):
    """Lines of a table of texts, with the first column to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]


def count_parameters(model: keras.Model) -> tuple[int, int]:
    """All parameters of a built model, and those used for one token, two integers.

    Counters work on none. Of experts that layers share, as many work as these layers choose.
    """
    layers = find_layers(model)
    shares = _active_shares(layers)
    parts = {part for layer in layers for part in (layer, layer.router)}
    counters = [weight for part in parts for weight in part._non_trainable_variables]
    total = model.count_params()
    for part in shares:
        if part.quantization_mode is not None:  # Two parameters of four bits are stored as one.
            stored = [*part._trainable_variables, *part._non_trainable_variables]
            total += _count_own(part) - sum(math.prod(weight.shape) for weight in stored)
    idle = sum((1 - share) * _count_own(part) for part, share in shares.items())
    return total, total - round(idle) - sum(math.prod(weight.shape) for weight in counters)


def _parts(layer):
    return set(layer._flatten_layers())


def _active_shares(layers):
    """How much of each part of the layers' banks, which they may share, works on a token."""
    shares: dict = {}
    for layer in layers:
        parts = [part for bank in layer.banks for part in bank._flatten_layers()]
        bases = [part.base for part in parts if isinstance(part, LowRankExperts)]
        always = {part for base in bases for part in base._flatten_layers()}
        share = layer.router.mean_top_k / layer.router.num_experts
        for part in parts:
            more = 1.0 if part in always else share
            shares[part] = min(1.0, shares.get(part, 0.0) + more)
    return shares


def _num_positions(part):
    """The number of positions of a sample that a layer applies its weights to."""
    shape = (part.get_build_config() or {}).get("input_shape", ())
    if hasattr(part, "strides"):  # a convolution
        shape = part.compute_output_shape(shape)
    axes = shape[2:] if getattr(part, "data_format", None) == "channels_first" else shape[1:-1]
    return math.prod(size or 1 for size in axes)


def _count_own(part):
    """Parameters of a layer without its sublayers, frozen and quantized ones included."""
    shapes = [weight.shape for weight in part._trainable_variables]
    if part.quantization_mode is not None:
        if isinstance(part, StackedExperts):
            shapes += [each.shape for each in part.projections if not each.is_vector]
        else:
            shapes += [each.shape for each in part._non_trainable_variables if each.dtype == "int8"]
    return sum(map(math.prod, shapes))
