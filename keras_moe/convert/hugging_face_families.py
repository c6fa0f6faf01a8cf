"""The MoE blocks of Hugging Face's models: names of their weights, and our layer for them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import keras

from keras_moe import activations, losses, routers
from keras_moe._internal.validation import (
    check_flag,
    check_fraction,
    check_not_negative,
    check_positive_integer,
    check_positive_number,
    shortened,
)
from keras_moe.convert.rules import Rule
from keras_moe.layers import GatedExperts, GatedFeedForward, MixtureOfExperts


class Fields(Mapping):
    """The fields of a config, checked where they are read; null stands for none."""

    def __init__(self, config):
        self._config = config

    def __getitem__(self, name):
        value = self._config[name]
        if value is None:
            raise KeyError(name)
        return _CHECKS[name](name, value) if name in _CHECKS else value

    def __iter__(self):
        return iter(self._config)

    def __len__(self):
        return len(self._config)


_CHECKS = {
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts",
            "num_experts_per_tok",
            "num_local_experts",
            "shared_expert_intermediate_size",
            "topk_group",
        ),
        check_positive_integer,
    ),
    "norm_topk_prob": check_flag,
    "routed_scaling_factor": check_positive_number,
    "router_aux_loss_coef": check_not_negative,
    "router_jitter_noise": check_fraction,
    "swiglu_limit": check_positive_number,
}


class Family(NamedTuple):
    """The MoE block of one family of models.

    - `layouts`: pairs of the prefix of all names, with `{layer}` in it, and rules. The first is
      that of files; models in memory may have another.
    - `make`: from a config, the content of `config.json`, and a dtype policy to arguments of a
      `MixtureOfExperts`.
    """

    layouts: tuple[tuple[str, tuple[Rule, ...]], ...]
    make: Callable


def _dense(theirs, ours):
    """Rules for linear layers, whose kernels are (outputs, inputs)."""
    return tuple(
        Rule(f"{their}.weight", (f"{our}_kernel",), transposed=True)
        for their, our in zip(theirs, ours)
    )


_OURS = ("experts.gate", "experts.up", "experts.down")
_MLP = "model.layers.{layer}.mlp."
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_GATE = Rule("gate.weight", ("router.kernel",), transposed=True)
_BY_EXPERT = _dense([f"experts.{{expert}}.{name}" for name in _PROJECTIONS], _OURS)
_STACKED = (
    Rule("experts.gate_up_proj", ("experts.gate_kernel", "experts.up_kernel"), transposed=True),
    Rule("experts.down_proj", ("experts.down_kernel",), transposed=True),
)


def _shared(name):
    return tuple(
        Rule(f"{name}.{part}_proj.weight", (f"shared_expert.{part}.kernel",), transposed=True)
        for part in ("gate", "up", "down")
    )


def _layouts(*others, by_expert=_BY_EXPERT, prefix=_MLP):
    """The layout of files, and that of models in memory, whose experts are stacked."""
    return (prefix, (*others, *by_expert)), (_MLP, (*others, *_STACKED))


def _arguments(config, experts, router, shared_expert=None, **kwargs):
    weight = config.get("router_aux_loss_coef")
    return {
        "experts": experts,
        "router": router,
        "router_losses": [losses.LoadBalance(weight)] if weight else [],
        "shared_expert": shared_expert,
        **kwargs,
    }


def _num_experts(config):
    """The number of experts, whatever the family and the release call it."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    found = [config[name] for name in names if name in config]
    if not found:
        raise KeyError(" or ".join(map(repr, names)))
    return found[0]


def _experts(config, width="moe_intermediate_size", **kwargs):
    kwargs = {"activation": config.get("hidden_act", "silu"), **kwargs}
    # All weights are assigned later; drawing them would take long.
    return GatedExperts(_num_experts(config), config[width], kernel_initializer="zeros", **kwargs)


def _top_k(config, **kwargs):
    return routers.TopKRouter(_num_experts(config), config["num_experts_per_tok"], **kwargs)


def _mixtral(config, dtype):
    return _arguments(
        config,
        _experts(config, "intermediate_size", dtype=dtype),
        _top_k(
            config,
            renormalize=True,
            input_jitter=config.get("router_jitter_noise", 0.0),
        ),
    )


def _qwen3_moe(config, dtype, width="moe_intermediate_size", **kwargs):
    return _arguments(
        config,
        _experts(config, width, dtype=dtype),
        _top_k(config, renormalize=config["norm_topk_prob"]),
        **kwargs,
    )


def _qwen2_moe(config, dtype):
    width = config["shared_expert_intermediate_size"]
    shared = GatedFeedForward(width, config["hidden_act"], dtype=dtype)
    return _qwen3_moe(config, dtype, shared_expert=shared, gated_shared_expert=True)


def _olmoe(config, dtype):
    return _qwen3_moe(config, dtype, width="intermediate_size")


def _deepseek_v3(config, dtype):
    shared_width = config["moe_intermediate_size"] * config["n_shared_experts"]
    router = routers.GroupLimitedRouter(
        _num_experts(config),
        num_groups=config["n_group"],
        top_groups=config["topk_group"],
        top_k=config["num_experts_per_tok"],
        renormalize=config["norm_topk_prob"],
        scaling_factor=config["routed_scaling_factor"],
        balancer="loss_free",
    )
    return _arguments(
        config,
        _experts(config, dtype=dtype),
        router,
        GatedFeedForward(shared_width, config["hidden_act"], dtype=dtype),
    )


def _gpt_oss(config, dtype):
    experts = _experts(
        config,
        "intermediate_size",
        activation=activations.quick_gelu,
        use_bias=True,
        clip=config.get("swiglu_limit", 7.0),
        up_shift=1.0,
        dtype=dtype,
    )
    router = _top_k(config, renormalize=True, use_bias=True)
    return _arguments(config, experts, router)


_SHARED_GATE = Rule("shared_expert_gate.weight", ("shared_gate.kernel",), transposed=True)
_GPT_OSS = (
    Rule("router.weight", ("router.kernel",), transposed=True),
    Rule("router.bias", ("router.bias",)),
    Rule("experts.gate_up_proj", ("experts.gate_kernel", "experts.up_kernel"), interleaved=True),
    Rule("experts.gate_up_proj_bias", ("experts.gate_bias", "experts.up_bias"), interleaved=True),
    Rule("experts.down_proj", ("experts.down_kernel",)),
    Rule("experts.down_proj_bias", ("experts.down_bias",)),
)

# By `model_type` of their config.
FAMILIES = {
    "mixtral": Family(
        _layouts(
            _GATE,
            by_expert=_dense([f"experts.{{expert}}.w{number}" for number in (1, 3, 2)], _OURS),
            prefix="model.layers.{layer}.block_sparse_moe.",
        ),
        _mixtral,
    ),
    "qwen2_moe": Family(_layouts(_GATE, *_shared("shared_expert"), _SHARED_GATE), _qwen2_moe),
    "qwen3_moe": Family(_layouts(_GATE), _qwen3_moe),
    "olmoe": Family(_layouts(_GATE), _olmoe),
    "deepseek_v3": Family(
        _layouts(
            _GATE,
            Rule("gate.e_score_correction_bias", ("router.selection_bias",)),
            *_shared("shared_experts"),
        ),
        _deepseek_v3,
    ),
    "gpt_oss": Family(((_MLP, _GPT_OSS),), _gpt_oss),
}


# Arguments of parts of a layer that change how it is called, begins or trains, not its outputs.
_CHANGE_NO_OUTPUT = (
    "name",
    "trainable",
    "dtype",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "input_jitter",
    "logit_noise",
    "seed",
    "balancer",
    "lora_rank",
    "lora_alpha",
)


def parts_of(config, dtype=None):
    """Arguments of our layer for the MoE block of a config."""
    activation = config.get("hidden_act", "silu")
    try:
        keras.activations.get(activation)
    except ValueError as error:
        raise ValueError(
            "`hidden_act` of the config must be an activation of Keras. Received: "
            f"hidden_act={shortened(activation)}. Name one in the config, such as 'gelu'."
        ) from error
    return FAMILIES[config["model_type"]].make(config, dtype)


def mixture_of(config, dtype=None, **kwargs):
    """Our layer for the MoE block of a config, built and without weights."""
    mixture = MixtureOfExperts(**{**parts_of(config, dtype), "dtype": dtype, **kwargs})
    mixture.build((None, None, config["hidden_size"]))
    return mixture


def config_like(mixture, family):
    """The config of a family's model whose MoE blocks have the sizes of a layer.

    It has what releases of the family choose among, as they choose it in this layer; the activation
    is the same in all.
    """
    experts, router, shared = mixture.experts, mixture.router, mixture.shared_expert
    width = experts.hidden_dim
    shared_width = getattr(shared, "hidden_dim", width)
    return {
        "model_type": family,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": router.max_top_k,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shared_width,
        "n_shared_experts": max(shared_width // width, 1),
        "hidden_act": "silu",
        "norm_topk_prob": _renormalizes(router),
        "routed_scaling_factor": getattr(router, "scaling_factor", 1.0),
        "n_group": getattr(router, "num_groups", 1),
        "topk_group": getattr(router, "top_groups", 1),
        "swiglu_limit": experts.clip or 7.0,
    }


def check_computes_as(mixture, config):
    """Refuse a layer whose outputs are not those of the block of a config.

    Raises:
        ValueError: If a part is of another class or has other arguments, or a capacity holds
            outside of training.
    """
    received = []
    parts = parts_of(config)
    for name in ("router", "experts", "shared_expert"):
        part, wanted = getattr(mixture, name), parts[name]
        if not isinstance(part, type(wanted)):
            received.append(f"a `{type(part).__name__}` as {name}, not {type(wanted).__name__}")
        elif wanted is not None:
            given = _arguments_of(part)
            received += [
                f"{key}={shortened(given.get(key))}, not {shortened(value)}"
                for key, value in _arguments_of(wanted).items()
                if given.get(key) != value
            ]
    if mixture.capacity is not None and mixture.capacity.evaluation_factor is not None:
        received.append(f"evaluation_factor={mixture.capacity.evaluation_factor}, not None")
    if received:
        raise ValueError(
            f"The layer must compute as {config['model_type']!r} does. Received: "
            f"{'; '.join(received)}. Make it with these arguments, or choose another model."
        )


def _arguments_of(part):
    config = part.get_config()
    if "renormalize" in config:
        config["renormalize"] = _renormalizes(part)
    return {key: value for key, value in config.items() if key not in _CHANGE_NO_OUTPUT}


def _renormalizes(router):
    """Whether weights are divided by their sum: None stands for whether there are several."""
    renormalize = getattr(router, "renormalize", None)
    return router.max_top_k > 1 if renormalize is None else renormalize
