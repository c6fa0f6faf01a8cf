"""Conversion of MoE layers from and to Hugging Face's layouts."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_moe._internal.checks import check_choice, check_integer
from keras_moe._internal.keras_internals import parameters_of
from keras_moe.convert.hugging_face_families import (
    FAMILIES,
    Config,
    config_like,
    differences,
    mixture_of,
)
from keras_moe.convert.weights import check_plain, floats_of, read_config, tensor_reader
from keras_moe.layers import MixtureOfExperts


def from_hugging_face(
    source: str | os.PathLike | Mapping,
    layer: int,
    config: dict | None = None,
    into: MixtureOfExperts | None = None,
    **kwargs: Any,
) -> MixtureOfExperts:
    """The MoE block of a decoder layer of a Hugging Face model, as a `layers.MixtureOfExperts`.

    The guide to conversion lists the families, such as Mixtral, Qwen3-MoE, DeepSeek-V3 and gpt-oss.
    Weights are read one expert at a time; besides the layer's own, one stack of kernels is in
    memory. PyTorch is not needed, files need the package `safetensors`.

    Args:
        source: Path, or mapping of strings to tensors. Folder of a model with `config.json` and
            `.safetensors` files, or one such file; or the weights by name, such as a `state_dict`.
        layer: Integer. Number of the decoder layer, from 0.
        config: Dict or None. Content of `config.json`. None: it is in the folder.
        into: `layers.MixtureOfExperts` or None. A built layer that gets the weights. None: a new
            one.
        **kwargs: Arguments of the new layer besides those in the config, such as `router_losses`.

    Returns:
        The layer, built.

    Raises:
        ValueError: If the model is of another family or quantized, a weight is missing, a shape
            does not fit, or `into` computes something else.

    Example:

    >>> path = "Mixtral-8x7B-v0.1"
    >>> layer = keras_moe.convert.from_hugging_face(path, layer=0)  # doctest: +SKIP
    """
    config = read_config(source) if config is None else config
    config = Config({name: value for name, value in config.items() if value is not None})
    check_choice("model_type", config.get("model_type"), FAMILIES)
    if into is not None and kwargs:
        raise ValueError(f"`into` must be given without arguments of a layer. Received: {kwargs}")
    mixture = mixture_of(config, **kwargs) if into is None else into
    check_plain(mixture)
    read, names = tensor_reader(source)
    num_experts = mixture.experts.num_experts
    prefix, rules = _layout_in(names, config["model_type"], layer, num_experts)
    variables = check_block(mixture, rules, config)
    for rule in rules:
        for name, value in zip(rule.ours, _read(rule, prefix, num_experts, read)):
            variables[name].assign(value)
    return mixture


def to_hugging_face(mixture: MixtureOfExperts, layer: int, family: str) -> dict:
    """The weights of a MoE layer under the names and in the shapes of Hugging Face's files.

    Args:
        mixture: `layers.MixtureOfExperts`. A built layer, such as one of `from_hugging_face`.
        layer: Integer. Number of the decoder layer, from 0.
        family: String. The `model_type` of the model, such as `"mixtral"`.

    Returns:
        Dict of names to arrays, for `safetensors.numpy.save_file` or a `state_dict`.

    Raises:
        ValueError: If there is no such family, or the layer lacks one of its weights, or computes
            something else, as with another activation than the family's.

    Example:

    >>> arrays = keras_moe.convert.to_hugging_face(mixture, 0, "mixtral")  # doctest: +SKIP
    """
    prefix, rules, variables = layout_of(mixture, layer, family, 0, but=("scaling_factor",))
    # Without a place in the family's config, the factor of the router goes into the kernels.
    scale = 1.0 if FAMILIES[family].scales_weights else getattr(mixture.router, "scaling_factor", 1)

    def value(name):
        if not name.startswith("experts."):
            return keras.ops.convert_to_numpy(variables[name])
        floats = floats_of(mixture.experts, name.removeprefix("experts."))
        return floats * scale if scale != 1 and name.startswith("experts.down_") else floats

    arrays = {}
    for rule in rules:
        ours = list(map(value, rule.ours))
        if "{expert}" not in rule.theirs:
            arrays[prefix + rule.theirs] = rule.join(ours)
            continue
        for expert in range(mixture.experts.num_experts):
            own = [stacked[expert] for stacked in ours]
            arrays[prefix + rule.theirs.format(expert=expert)] = rule.join(own)
    return arrays


def layout_of(mixture, layer, family, number, but=()):
    """The prefix and the rules of a layout of a family, and the variables of a layer by name."""
    layer = check_integer("layer", layer, minimum=0)
    prefix, rules = FAMILIES[check_choice("family", family, FAMILIES)].layouts[number]
    check_plain(mixture, but=mixture.experts)
    variables = check_block(mixture, rules, config_like(mixture, family), but)
    return prefix.format(layer=layer), rules, variables


def check_block(mixture, rules, config, but=()):
    """The variables that rules name, of a layer that computes exactly the block of a config."""
    wrong, placed = differences(mixture, config, but), {}
    if not wrong:
        names = [name for rule in rules for name in rule.ours]
        placed = {name: functools.reduce(getattr, name.split("."), mixture) for name in names}
        wrong += [f"no weight `{name}`" for name in names if placed[name] is None]
        known = {id(variable) for variable in placed.values()}
        weights = parameters_of(mixture)
        bias = getattr(mixture.router, "selection_bias", None)
        if bias is not None and np.any(keras.ops.convert_to_numpy(bias)):  # Zeros change no choice.
            weights.append(bias)
        # The factors of LoRA are written with the kernels.
        more = [each for each in weights if id(each) not in known and "_lora_" not in each.name]
        wrong += [f"a weight {each.path!r} without a place" for each in more]
    if wrong:
        raise ValueError(
            f"The layer must be a block of {config['model_type']!r}. Received: {'; '.join(wrong)}"
        )
    return placed


def _layout_in(names, family, layer, num_experts):
    """The prefix and the rules of the family's first layout without a missing weight."""
    missing = []
    for prefix, rules in FAMILIES[family].layouts:
        prefix, experts = prefix.format(layer=layer), range(num_experts)
        wanted = [prefix + rule.theirs.format(expert=e) for e in experts for rule in rules]
        absent = [name for name in wanted if name not in names]
        if not absent:
            return prefix, rules
        missing.append(absent[0])
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
