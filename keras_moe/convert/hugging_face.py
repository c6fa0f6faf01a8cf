"""MoE layers out of models of Hugging Face, and back into their layout."""

import contextlib
import functools
from collections.abc import Mapping

import keras
import numpy as np

from keras_moe._internal.parameters import parameters_of
from keras_moe._internal.tensor_checks import check_numbers, is_of
from keras_moe._internal.validation import check_choice, dtype_of, is_whole, listed, shortened
from keras_moe.convert.hugging_face_families import (
    FAMILIES,
    Fields,
    check_computes_as,
    config_like,
    mixture_of,
)
from keras_moe.convert.tensor_files import config_of, opened
from keras_moe.layers.mixture_of_experts import MixtureOfExperts


def from_hugging_face(source, layer, config=None, into=None, **kwargs):
    """The MoE block of a decoder layer of a Hugging Face model, as a `layers.MixtureOfExperts`.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss. Weights are read one expert at a
    time; besides the layer's own, one stack of kernels is in memory. PyTorch is not needed, files
    need the package `safetensors`.

    Args:
        source: folder of a model with `config.json` and `.safetensors` files, or one such file; or
            a mapping of names to arrays or tensors, such as a `state_dict`.
        layer: number of the decoder layer, from 0.
        config: content of `config.json` as a dict. None: it is in the folder.
        into: a built `MixtureOfExperts` that is given the weights. None: a new one.
        **kwargs: of a new layer: other arguments of `MixtureOfExperts` than the config says, such
            as `router_losses`, `name` and `dtype`.

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
    _check_layer_number(layer)
    config = config_of(source) if config is None else config
    if not isinstance(config, Mapping):
        raise TypeError(
            "`config` must be the content of `config.json`, a dict. Received: "
            f"{shortened(config)} (of type {type(config).__name__}). Pass `model.config.to_dict()`."
        )
    config = Fields(config)
    check_choice("model_type", config.get("model_type"), tuple(FAMILIES))
    if config.get("quantization_config") is not None:
        raise ValueError(
            "The weights must be floats, of a model that is not quantized. Received: a config with "
            "`quantization_config`. Dequantize the weights, and leave that entry out."
        )
    if into is None:
        with _reading(config):
            mixture = mixture_of(config, **kwargs)
    else:
        check_is_mixture("into", into)
        if kwargs:
            raise ValueError(
                "Arguments of a new layer must not be given with `into`. Received: "
                f"{', '.join(kwargs)}. Leave them out."
            )
        mixture = into
    _check_plain(mixture)
    with _reading(config):
        check_computes_as(mixture, config)
    with opened(source) as (read, names):
        prefix, rules = _layout_in(names, config["model_type"], layer)
        _check_all_there(names, prefix, rules, mixture.experts.num_experts)
        _check_nothing_left(mixture, rules)
        for rule in rules:
            variables = [_variable(mixture, name) for name in rule.ours]
            for variable, value in zip(variables, _read(rule, prefix, mixture, read)):
                _assign(variable, value, prefix + rule.theirs)
    return mixture


def to_hugging_face(mixture, layer, family):
    """The weights of a MoE layer under the names and in the shapes of Hugging Face's files.

    Args:
        mixture: a built `MixtureOfExperts` like those of `from_hugging_face`.
        layer: number of the decoder layer, from 0.
        family: the `model_type` of the model, such as "mixtral".

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
    check_is_mixture("mixture", mixture)
    _check_layer_number(layer)
    check_choice("family", family, tuple(FAMILIES))
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
            arrays[prefix + rule.theirs] = _written(rule, ours)
            continue
        for expert in range(mixture.experts.num_experts):
            own = [stacked[expert] for stacked in ours]
            arrays[_name(prefix, rule, expert)] = _written(rule, own)
    return arrays


def _check_layer_number(layer):
    if not is_whole(layer) or layer < 0:
        raise ValueError(
            "`layer` must be the number of a decoder layer. Received: "
            f"layer={shortened(layer)}. Count them from 0."
        )


def check_is_mixture(name, mixture):
    if not isinstance(mixture, MixtureOfExperts):
        raise TypeError(
            f"`{name}` must be a `layers.MixtureOfExperts`. Received: an object of type "
            f"{type(mixture).__name__}. Pass one of `inspection.moe_layers(model).values()`."
        )
    if not mixture.built:
        raise ValueError(
            f"`{name}` must be built, so that it has weights. Received: {mixture!r}. Call it on "
            "inputs, or build it, first."
        )


@contextlib.contextmanager
def _reading(config):
    """A context in which what a config lacks is named."""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"The config must have what {config['model_type']!r} has. Received: a config without "
            f"{error.args[0]}. Pass the whole content of `config.json`."
        ) from error


def _check_nothing_left(mixture, rules):
    """The family has a place for each weight: what has none would be lost, or stay as it was."""
    written = {id(_variable(mixture, name)) for rule in rules for name in rule.ours}
    # What LoRA has learned is written with the kernels.
    own = [w for w in parameters_of(mixture) if "_lora_" not in w.name]
    bias = getattr(mixture.router, "selection_bias", None)
    if bias is not None and np.any(keras.ops.convert_to_numpy(bias)):  # Zeros choose as none does.
        own.append(bias)
    left = [w.path for w in own if id(w) not in written]
    if left:
        raise ValueError(
            "The family must have a place for all weights of the layer. Received: "
            f"{listed(left)}, which it has none for. Choose another family, or a layer like "
            "those of `from_hugging_face`."
        )


def _check_plain(part):
    for layer in () if part is None else part._flatten_layers():
        if layer.quantization_mode is not None or getattr(layer, "lora_enabled", False):
            raise ValueError(
                "The layer must have plain kernels, neither quantized nor with LoRA. Received: "
                f"{layer.path!r} with such kernels. Convert before that."
            )


def _layout_in(names, family, layer):
    """The prefix and the rules of the family's layout whose weights are all there."""
    missing = []
    for prefix, rules in FAMILIES[family].layouts:
        prefix = prefix.format(layer=layer)
        absent = [name for rule in rules if (name := _name(prefix, rule)) not in names]
        if not absent:
            return prefix, rules
        missing.append(absent[0])
    raise ValueError(
        f"The weights of a MoE block must have the names that they have in {family!r}. Received: "
        f"layer={layer}, without {' and without '.join(map(repr, missing))}. Pass the number of a "
        "layer with experts, of a model that is not quantized."
    )


def _check_all_there(names, prefix, rules, num_experts):
    """`_layout_in` has looked for the weights of the first expert."""
    wanted = (_name(prefix, rule, expert) for expert in range(num_experts) for rule in rules)
    absent = next((name for name in wanted if name not in names), None)
    if absent is not None:
        raise ValueError(
            f"The weights of all {num_experts} experts must be there. Received: weights without "
            f"{absent!r}. Load all files of the model."
        )


def _name(prefix, rule, expert=0):
    return prefix + rule.theirs.format(expert=expert)


def _read(rule, prefix, mixture, read):
    """The values of our weights that a rule is about."""
    if "{expert}" not in rule.theirs:
        return _split(rule, prefix + rule.theirs, read)
    values: list = []
    for expert in range(mixture.experts.num_experts):
        own = _split(rule, _name(prefix, rule, expert), read)
        if not values:
            values = [np.empty((mixture.experts.num_experts, *v.shape), v.dtype) for v in own]
        for stacked, value in zip(values, own):
            stacked[expert] = value
    return values


def _split(rule, name, read):
    array = read(name)
    check_numbers(name, array)
    return rule.split(_turned(rule, array))


def _written(rule, ours):
    return np.ascontiguousarray(_turned(rule, rule.join(ours)))


def _turned(rule, array):
    return np.swapaxes(array, -1, -2) if rule.transposed else array


def _value(mixture, name):
    """An array; a kernel of the bank as floats, with what LoRA has learned."""
    variable = _variable(mixture, name)
    if name.startswith("experts.") and name.endswith("_kernel"):
        return mixture.experts.merged_kernel(name[len("experts.") : -len("_kernel")])
    return keras.ops.convert_to_numpy(variable)


def _variable(mixture, name):
    try:
        variable = functools.reduce(getattr, name.split("."), mixture)
    except AttributeError:
        variable = None
    if variable is None:
        raise ValueError(
            f"The layer must have all weights of the family. Received: {mixture!r} without "
            f"`{name}`. Make it by `from_hugging_face`, or like one of its layers."
        )
    return variable


def _assign(variable, value, name):
    if tuple(variable.shape) != value.shape:
        raise ValueError(
            "The shapes of the layer must be those of the model. Received: "
            f"{name!r} of shape {value.shape} for `{variable.path}` of shape "
            f"{tuple(variable.shape)}. Pass the config of the model, and a layer that is like it."
        )
    if not is_of("float", value):
        raise ValueError(
            "The weights must be floats, of a model that is not quantized. Received: "
            f"{name!r} of {dtype_of(value)}. Dequantize the model first."
        )
    variable.assign(value)
