"""MoE layers from models of Hugging Face, and back into their layout."""

import functools
from collections.abc import Mapping

import keras
import numpy as np

from keras_moe._internal.checks import check_choice, check_instance, check_integer
from keras_moe.convert.hugging_face_families import (
    FAMILIES,
    Config,
    check_computes_as,
    config_like,
    mixture_of,
)
from keras_moe.convert.weights import read_config, tensor_reader
from keras_moe.layers import MixtureOfExperts


def from_hugging_face(source, layer, config=None, into=None, **kwargs):
    """The MoE block of a decoder layer of a Hugging Face model, as a `layers.MixtureOfExperts`.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss. Weights are read one expert at a
    time; besides the layer's own, one stack of kernels is in memory. PyTorch is not needed, files
    need the package `safetensors`.

    Args:
        source: Path, or mapping of strings to tensors. Folder of a model with `config.json` and
            `.safetensors` files, or one such file; or the weights by name, such as a `state_dict`.
        layer: Integer. Number of the decoder layer, from 0.
        config: Dict or None. Content of `config.json`. None: it is in the folder.
        into: `layers.MixtureOfExperts` or None. A built layer that gets the weights. None: a new
            one.
        **kwargs: Arguments of the new layer besides those in the config, such as `router_losses`,
            `name` and `dtype`.

    Returns:
        The layer, built.

    Raises:
        ValueError: If the model is of another family or quantized, a weight is missing, a shape
            does not fit, or `into` computes something else.

    Example:

    >>> path = "Mixtral-8x7B-v0.1"
    >>> keras_moe.convert.from_hugging_face(path, layer=0)  # doctest: +SKIP
    <MixtureOfExperts name=mixture_of_experts, built=True>
    """
    layer = check_integer("layer", layer, minimum=0)
    config = check_instance("config", read_config(source) if config is None else config, Mapping)
    config = Config({name: value for name, value in config.items() if value is not None})
    check_choice("model_type", config.get("model_type"), FAMILIES)
    if into is None:
        mixture = mixture_of(config, **kwargs)
    elif kwargs:
        raise ValueError(
            f"`into` must be given without arguments of a new layer. Received: {', '.join(kwargs)}"
        )
    else:
        mixture = check_instance("into", into, MixtureOfExperts)
    _check_plain(mixture)
    check_computes_as(mixture, config)
    read, names = tensor_reader(source)
    num_experts = mixture.experts.num_experts
    prefix, rules = _layout_in(names, config["model_type"], layer, num_experts)
    _check_nothing_left(mixture, rules)
    for rule in rules:
        variables = [_variable(mixture, name) for name in rule.ours]
        for variable, value in zip(variables, _read(rule, prefix, num_experts, read)):
            variable.assign(value)
    return mixture


def to_hugging_face(mixture, layer, family):
    """The weights of a MoE layer under the names and in the shapes of Hugging Face's files.

    Args:
        mixture: `layers.MixtureOfExperts`. A built layer like those of `from_hugging_face`.
        layer: Integer. Number of the decoder layer, from 0.
        family: String. The `model_type` of the model, such as `"mixtral"`.

    Returns:
        Dict of names to arrays, for `safetensors.numpy.save_file` or a `state_dict`.

    Raises:
        ValueError: If there is no such family, or the layer lacks one of its weights, or computes
            something else, as with another activation than the family's.

    Example:

    >>> arrays = keras_moe.convert.to_hugging_face(
    ...     mixture, layer=0, family="mixtral"
    ... )  # doctest: +SKIP
    """
    check_instance("mixture", mixture, MixtureOfExperts)
    layer = check_integer("layer", layer, minimum=0)
    check_choice("family", family, FAMILIES)
    for part in (mixture.router, mixture.shared_expert, mixture.shared_gate):
        _check_plain(part)
    prefix, rules = FAMILIES[family].layouts[0]
    prefix = prefix.format(layer=layer)
    _check_nothing_left(mixture, rules)
    check_computes_as(mixture, config_like(mixture, family))
    arrays = {}
    for rule in rules:
        ours = [_value(mixture, name) for name in rule.ours]
        if "{expert}" not in rule.theirs:
            arrays[prefix + rule.theirs] = rule.join(ours)
            continue
        for expert in range(mixture.experts.num_experts):
            own = [stacked[expert] for stacked in ours]
            arrays[prefix + rule.theirs.format(expert=expert)] = rule.join(own)
    return arrays


def _check_nothing_left(mixture, rules):
    """The family has a place for each weight: others would be lost, or stay as they were."""
    placed = {id(_variable(mixture, name)) for rule in rules for name in rule.ours}
    weights = [each for part in mixture._flatten_layers() for each in part._trainable_variables]
    bias = getattr(mixture.router, "selection_bias", None)
    if bias is not None and np.any(keras.ops.convert_to_numpy(bias)):  # Zeros choose as none does.
        weights.append(bias)
    # The factors of LoRA are written with the kernels.
    left = [w.path for w in weights if id(w) not in placed and "_lora_" not in w.name]
    if left:
        raise ValueError(
            "The family must have a place for all weights of the layer. Received: a layer with "
            f"{', '.join(left)}"
        )


def _check_plain(part):
    for layer in () if part is None else part._flatten_layers():
        if layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
            raise ValueError(
                "The layer must have plain kernels, neither quantized nor with LoRA. Received: "
                f"{layer.path!r} with such kernels. Convert before that."
            )


def _layout_in(names, family, layer, num_experts):
    """The prefix and the rules of the family's layout whose weights are all there."""
    missing = []
    for prefix, rules in FAMILIES[family].layouts:
        prefix = prefix.format(layer=layer)
        wanted = (
            prefix + rule.theirs.format(expert=expert)
            for expert in range(num_experts)
            for rule in rules
        )
        absent = next((name for name in wanted if name not in names), None)
        if absent is None:
            return prefix, rules
        missing.append(absent)
    raise ValueError(
        f"A MoE block of {family!r} with {num_experts} experts must have all its weights. "
        f"Received: layer={layer}, without {' and without '.join(map(repr, missing))}"
    )


def _read(rule, prefix, num_experts, read):
    """The values of our weights in a rule, stacked one expert at a time."""
    if "{expert}" not in rule.theirs:
        return rule.split(read(prefix + rule.theirs))
    values: list = []
    for expert in range(num_experts):
        own = rule.split(read(prefix + rule.theirs.format(expert=expert)))
        values = values or [np.empty((num_experts, *each.shape), each.dtype) for each in own]
        for stacked, value in zip(values, own):
            stacked[expert] = value
    return values


def _value(mixture, name):
    """An array; a kernel of the bank as floats, with its LoRA."""
    variable = _variable(mixture, name)
    if name.startswith("experts.") and name.endswith("_kernel"):
        projection = name.removeprefix("experts.").removesuffix("_kernel")
        return mixture.experts.projection(projection).merged_kernel()
    return keras.ops.convert_to_numpy(variable)


def _variable(mixture, name):
    try:
        variable = functools.reduce(getattr, name.split("."), mixture)
    except AttributeError:
        variable = None
    if variable is None:
        raise ValueError(
            f"The layer must have all weights of the family. Received: {mixture!r} without `{name}`"
        )
    return variable
