"""Conversion of MoE layers from and to the layouts of Hugging Face's model families."""

import operator
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_moe import losses
from keras_moe._internal.checks import check_choice, check_integer, shortened
from keras_moe.convert.families import IN_FILES, Config
from keras_moe.convert.weights import check_plain, floats_of, read_config, tensor_reader
from keras_moe.layers import GatedExperts, GatedFeedForward, MixtureOfExperts


def from_hugging_face(
    source: str | os.PathLike | Mapping,
    layer: int,
    config: dict | None = None,
    into: MixtureOfExperts | None = None,
    **kwargs: Any,
) -> MixtureOfExperts:
    """The MoE block of a decoder layer of a Hugging Face model, as a `layers.MixtureOfExperts`.

    The page on starting from a model lists the families. Files need the package `safetensors`.

    Args:
        source: Path of a model's folder with `config.json` and `.safetensors` files, or of one such
            file; or a mapping of names to weights, such as a `state_dict`.
        layer: Integer. Number of the decoder layer, from 0.
        config: Dict or None. Content of `config.json`. None: it is in the folder.
        into: Built `layers.MixtureOfExperts` that gets the weights. None: a new one.
        **kwargs: Arguments of the new layer besides those in the config, such as `router_losses`.

    A ValueError is raised if the model is of another family or quantized, a weight is missing, a
    shape does not fit, or `into` computes something else.

    Example:

    >>> path = "Mixtral-8x7B-v0.1"
    >>> layer = keras_moe.convert.from_hugging_face(path, layer=0)  # doctest: +SKIP
    """
    config = read_config(source) if config is None else config
    if not isinstance(config, Mapping):
        received = f"Received: a `{type(config).__name__}`"
        raise TypeError(f"`config` must be a dict, such as `model.config.to_dict()`. {received}")
    config = Config({name: value for name, value in config.items() if value is not None})
    check_choice("model_type", config.get("model_type"), IN_FILES)
    if into is not None and kwargs:
        raise ValueError(f"`into` must be given without arguments of a layer. Received: {kwargs}")
    mixture = into
    if mixture is None:
        mixture = MixtureOfExperts(**{**_parts_of(config, kwargs.get("dtype")), **kwargs})
        mixture.build((None, None, config["hidden_size"]))
    check_plain(mixture)
    read, names = tensor_reader(source)
    experts = range(mixture.experts.num_experts)
    for prefix, rules in reversed(IN_FILES[config["model_type"]].layouts):
        prefix = prefix.format(layer=layer)
        if prefix + rules[-1].theirs.format(expert=0) in names:  # Layouts differ in the experts.
            break
    variables = _placed(mixture, rules, config)
    for rule in rules:
        if "{expert}" not in rule.theirs:
            values = rule.split(read(prefix + rule.theirs))
        else:  # One expert after the other, as all of them may fill the memory.
            values = []
            for expert in experts:
                own = rule.split(read(prefix + rule.theirs.format(expert=expert)))
                values = values or [np.empty((len(experts), *v.shape), v.dtype) for v in own]
                for stacked, value in zip(values, own):
                    stacked[expert] = value
        for name, value in zip(rule.ours, values):
            variables[name].assign(value)
    return mixture


def to_hugging_face(mixture: MixtureOfExperts, layer: int, family: str) -> dict:
    """The weights of a MoE layer under the names and in the shapes of Hugging Face's files.

    Returns a dict of names to arrays, for `safetensors.numpy.save_file` or a `state_dict`. A
    ValueError is raised if the layer lacks a weight of the family or computes something else.

    Args:
        mixture: `layers.MixtureOfExperts`. A built layer, such as one of `from_hugging_face`.
        layer: Integer. Number of the decoder layer, from 0.
        family: String. The `model_type` of the model, such as `"mixtral"`.

    Example:

    >>> arrays = keras_moe.convert.to_hugging_face(mixture, 0, "mixtral")  # doctest: +SKIP
    """
    check_choice("family", family, IN_FILES)
    return arrays_of(mixture, check_integer("layer", layer, minimum=0), family)


def arrays_of(mixture, layer, family, without=()):
    """As `to_hugging_face`, without a part such as the shared expert."""
    check_plain(mixture, but=mixture.experts)
    prefix, rules = IN_FILES[family].layouts[0]
    prefix, config = prefix.format(layer=layer), config_like(mixture, family)
    rules = tuple(rule for rule in rules if not rule.theirs.startswith(without))
    variables = _placed(mixture, rules, config, ("scaling_factor", *without))
    scale = getattr(mixture.router, "scaling_factor", 1.0)
    if "scaling_factor" in IN_FILES[family].router(config):
        scale = 1.0  # The config has it; other families have it in their kernels.

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


# Keras and PyTorch compute them alike under one name.
_ACTIVATIONS = ("silu", "swish", "gelu", "relu", "relu6", "mish", "sigmoid", "tanh", "linear")


def _parts_of(config, dtype=None):
    """Arguments of the `MixtureOfExperts` that computes the block of a config."""
    family = IN_FILES[config["model_type"]]
    # Families and releases differ in the name.
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts = config[next((name for name in names if name in config), names[0])]
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    activation = check_choice("hidden_act", config.get("hidden_act", "silu"), _ACTIVATIONS)
    # All weights are assigned later; drawing them would take long.
    experts = {"activation": activation, "kernel_initializer": "zeros", **family.experts(config)}
    router = {"top_k": config["num_experts_per_tok"], **family.router(config)}
    # At balance, Hugging Face's loss of all layers is K, and ours is 1 for each layer.
    weight = config.get("router_aux_loss_coef", 0) * config["num_experts_per_tok"]
    weight /= config.get("num_hidden_layers", 1)
    return {
        "experts": GatedExperts(num_experts, width, dtype=dtype, **experts),
        "router": family.router_class(num_experts, **router),
        "router_losses": [losses.LoadBalance(weight)] if weight else [],
        "shared_expert": family.shared
        and GatedFeedForward(family.shared(config), activation, dtype=dtype),
        "gated_shared_expert": family.gated_shared,
    }


def config_like(mixture, family):
    """The config of a family whose MoE block comes closest to a layer."""
    experts, router = mixture.experts, mixture.router
    width = getattr(experts, "hidden_dim", None) or 1  # refused later
    shared_width = getattr(mixture.shared_expert, "hidden_dim", width)
    return Config(
        model_type=family,
        num_experts=experts.num_experts,
        num_experts_per_tok=router.max_top_k,
        intermediate_size=width,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared_width,
        n_shared_experts=max(shared_width // width, 1),
        norm_topk_prob=renormalizes(router),
        routed_scaling_factor=getattr(router, "scaling_factor", 1.0),
        n_group=getattr(router, "num_groups", 1),
        topk_group=getattr(router, "top_groups", 1),
        swiglu_limit=getattr(experts, "clip", None) or 7.0,
    )


def _placed(mixture, rules, config, ignored=()):
    """The variables that rules name, of a layer that computes exactly the block of a config."""
    wrong, placed = _differences(mixture, config, ignored), {}
    if not wrong:
        names = [name for rule in rules for name in rule.ours]
        placed = {name: operator.attrgetter(name)(mixture) for name in names}
        wrong += [f"no weight `{name}`" for name in names if placed[name] is None]
        bias = getattr(mixture.router, "selection_bias", None)
        if bias is not None and "router.selection_bias" not in placed:
            if np.any(keras.ops.convert_to_numpy(bias)):  # Zeros change no choice.
                wrong.append("a `selection_bias`")
    if wrong:
        rule = f"The layer must be a block of {config['model_type']!r}"
        raise ValueError(f"{rule}. Received: {'; '.join(wrong)}")
    return placed


# Arguments of the parts of a layer that change how it begins or trains, not its outputs.
_TRAINING = (
    *("name", "trainable", "dtype", "seed", "balancer", "updates_selection_bias"),
    *("input_jitter", "logit_noise"),
)
_SUFFIXES = ("_initializer", "_regularizer", "lora_rank", "lora_alpha")


def _differences(mixture, config, ignored):
    """List how a layer differs from the block of a config, except in the `ignored` arguments."""
    found, parts = [], _parts_of(config)
    for name in sorted({"router", "experts", "shared_expert"}.difference(ignored)):
        part, wanted = getattr(mixture, name), parts[name]
        methods = ("call", "route", "logits", "project", "select", "network")
        own, other = type(part), type(wanted)
        computes_alike = issubclass(own, other) and all(
            getattr(own, method, None) is getattr(other, method, None) for method in methods
        )
        if not computes_alike:
            found.append(f"a `{type(part).__name__}` as {name}, not {type(wanted).__name__}")
        elif wanted is not None:
            given = part.get_config()
            found += [
                f"{key}={shortened(given.get(key))}, not {shortened(value)}"
                for key, value in wanted.get_config().items()
                if key not in (*_TRAINING, *ignored, "renormalize") and not key.endswith(_SUFFIXES)
                if given.get(key) != value
            ]
    if not found and renormalizes(mixture.router) != renormalizes(parts["router"]):
        found.append(f"renormalize={mixture.router.renormalize}")
    is_gated = mixture.gated_shared_expert
    if is_gated != parts["gated_shared_expert"] and "shared_expert" not in ignored:
        found.append(f"gated_shared_expert={is_gated}")
    if mixture.capacity is not None and mixture.capacity.evaluation_factor is not None:
        found.append(f"evaluation_factor={mixture.capacity.evaluation_factor}, not None")
    return found


def renormalizes(router):
    """Whether weights are divided by their sum; None divides several."""
    renormalize = getattr(router, "renormalize", None)
    return router.max_top_k > 1 if renormalize is None else renormalize
