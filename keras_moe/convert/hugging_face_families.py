"""The MoE blocks of Hugging Face's models: names of their weights, and our layer for them."""

from collections.abc import Callable
from typing import NamedTuple

from keras_moe import activations, losses, routers
from keras_moe._internal.checks import check_choice, shortened
from keras_moe.convert.weights import Rule
from keras_moe.layers import GatedExperts, GatedFeedForward, MixtureOfExperts


class Config(dict):
    """The entries of a `config.json` that are not null."""

    def __missing__(self, name):
        raise ValueError(
            f"The config of a model of {self['model_type']!r} must have `{name}`. "
            f"Received: {', '.join(self)}"
        )


class Family(NamedTuple):
    """The MoE block of one family of models.

    - `layouts`: pairs of the prefix of all names, with `{layer}` in it, and rules: that of files,
      and that of models in memory, if it is another.
    - `make`: from a `Config` and a dtype policy to arguments of a `MixtureOfExperts`.
    - `scales_weights`: whether its config has the `scaling_factor` of the router. Without it the
      last kernels of the experts are multiplied by this factor.
    """

    layouts: tuple[tuple[str, tuple[Rule, ...]], ...]
    make: Callable
    scales_weights: bool = False


def _dense(theirs, ours):
    """Rules for linear layers, whose kernels are (outputs, inputs)."""
    return tuple(
        Rule(f"{their}.weight", (f"{our}kernel",), transposed=True)
        for their, our in zip(theirs, ours)
    )


_MLP = "model.layers.{layer}.mlp."
_BLOCK = "model.layers.{layer}.block_sparse_moe."
_FEED_FORWARD = "model.layers.{layer}.feed_forward."
_OURS = ("experts.gate_", "experts.up_", "experts.down_")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_GATE = _dense(["gate"], ["router."])
_SHARED_GATE = _dense(["shared_expert_gate"], ["shared_gate."])
_BY_EXPERT = _dense([f"experts.{{expert}}.{name}" for name in _PROJECTIONS], _OURS)
_BY_NUMBER = _dense([f"experts.{{expert}}.w{number}" for number in (1, 3, 2)], _OURS)
_STACKED = (
    Rule("experts.gate_up_proj", ("experts.gate_kernel", "experts.up_kernel"), transposed=True),
    Rule("experts.down_proj", ("experts.down_kernel",), transposed=True),
)


def _shared(name):
    ours = ("shared_expert.gate.", "shared_expert.up.", "shared_expert.down.")
    return _dense([f"{name}.{projection}" for projection in _PROJECTIONS], ours)


def _layouts(*others, by_expert=_BY_EXPERT, prefix=_MLP, in_memory=_MLP):
    """The layout of files, and that of models in memory, whose experts are stacked."""
    return (prefix, (*others, *by_expert)), (in_memory, (*others, *_STACKED))


def _bias(theirs):
    return Rule(theirs, ("router.selection_bias",))


def _arguments(config, experts, router, **kwargs):
    weight = config.get("router_aux_loss_coef")
    router_losses = [losses.LoadBalance(weight)] if weight else []
    return {"experts": experts, "router": router, "router_losses": router_losses, **kwargs}


# Those that Keras and PyTorch compute alike under one name.
_ACTIVATIONS = ("silu", "swish", "gelu", "relu", "relu6", "mish", "sigmoid", "tanh", "linear")


def _activation(config):
    return check_choice("hidden_act", config.get("hidden_act", "silu"), _ACTIVATIONS)


def _num_experts(config):
    """The number of experts, whatever the family and the release call it."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return config[next((name for name in names if name in config), names[0])]


def _experts(config, width="moe_intermediate_size", **kwargs):
    kwargs = {"activation": _activation(config), **kwargs}
    # All weights are assigned later; drawing them would take long.
    return GatedExperts(_num_experts(config), config[width], kernel_initializer="zeros", **kwargs)


def _top_k(config, **kwargs):
    return routers.TopKRouter(_num_experts(config), config["num_experts_per_tok"], **kwargs)


def _mixtral(config, dtype):
    jitter = config.get("router_jitter_noise", 0.0)
    return _arguments(
        config,
        _experts(config, "intermediate_size", dtype=dtype),
        _top_k(config, renormalize=True, input_jitter=jitter),
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
    shared = GatedFeedForward(width, _activation(config), dtype=dtype)
    return _qwen3_moe(config, dtype, shared_expert=shared, gated_shared_expert=True)


def _olmoe(config, dtype):
    return _qwen3_moe(config, dtype, width="intermediate_size")


def _deepseek_v3(config, dtype):
    router = routers.GroupLimitedRouter(
        _num_experts(config),
        num_groups=config["n_group"],
        top_groups=config["topk_group"],
        top_k=config["num_experts_per_tok"],
        renormalize=config["norm_topk_prob"],
        scaling_factor=config["routed_scaling_factor"],
        balancer="loss_free",
    )
    width = config["moe_intermediate_size"] * config["n_shared_experts"]
    shared = GatedFeedForward(width, _activation(config), dtype=dtype)
    return _arguments(config, _experts(config, dtype=dtype), router, shared_expert=shared)


def _minimax_m2(config, dtype):
    jitter = config.get("router_jitter_noise", 0.0)
    router = _top_k(
        config, score="sigmoid", renormalize=True, balancer="loss_free", input_jitter=jitter
    )
    return _arguments(config, _experts(config, "intermediate_size", dtype=dtype), router)


def _lfm2_moe(config, dtype):
    router = _top_k(
        config,
        score="sigmoid",
        renormalize=config["norm_topk_prob"],
        scaling_factor=config["routed_scaling_factor"],
        balancer="loss_free",
    )
    return _arguments(config, _experts(config, dtype=dtype), router)


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
    return _arguments(config, experts, _top_k(config, renormalize=True, use_bias=True))


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
        _layouts(*_GATE, by_expert=_BY_NUMBER, prefix=_BLOCK),
        _mixtral,
    ),
    "qwen2_moe": Family(_layouts(*_GATE, *_shared("shared_expert"), *_SHARED_GATE), _qwen2_moe),
    "qwen3_moe": Family(_layouts(*_GATE), _qwen3_moe),
    "olmoe": Family(_layouts(*_GATE), _olmoe),
    "deepseek_v3": Family(
        _layouts(
            *_GATE,
            _bias("gate.e_score_correction_bias"),
            *_shared("shared_experts"),
        ),
        _deepseek_v3,
        scales_weights=True,
    ),
    "gpt_oss": Family(((_MLP, _GPT_OSS),), _gpt_oss),
    "minimax_m2": Family(
        _layouts(*_GATE, _bias("e_score_correction_bias"), by_expert=_BY_NUMBER, prefix=_BLOCK),
        _minimax_m2,
    ),
    "lfm2_moe": Family(
        _layouts(
            *_GATE,
            _bias("expert_bias"),
            by_expert=_BY_NUMBER,
            prefix=_FEED_FORWARD,
            in_memory=_FEED_FORWARD,
        ),
        _lfm2_moe,
        scales_weights=True,
    ),
}

# Families whose block is that of another one.
_ALIKE = {
    "mixtral": ("minimax",),
    "qwen2_moe": ("qwen3_next",),
    "qwen3_moe": ("mellum",),
    "olmoe": ("flex_olmo",),
    "deepseek_v3": (
        *("deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "solar_open"),
    ),
}
FAMILIES.update({name: FAMILIES[family] for family in _ALIKE for name in _ALIKE[family]})


def mixture_of(config, dtype=None, **kwargs):
    """Our layer for the MoE block of a config, built and without weights."""
    arguments = FAMILIES[config["model_type"]].make(config, dtype)
    mixture = MixtureOfExperts(**{**arguments, "dtype": dtype, **kwargs})
    mixture.build((None, None, config["hidden_size"]))
    return mixture


def config_like(mixture, family):
    """The config of the model of a family whose MoE blocks are as a layer, as far as they can."""
    experts, router = mixture.experts, mixture.router
    width = experts.hidden_dim
    shared_width = getattr(mixture.shared_expert, "hidden_dim", width)
    return Config(
        model_type=family,
        num_experts=experts.num_experts,
        num_experts_per_tok=router.max_top_k,
        intermediate_size=width,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared_width,
        n_shared_experts=max(shared_width // width, 1),
        norm_topk_prob=_renormalizes(router),
        routed_scaling_factor=getattr(router, "scaling_factor", 1.0),
        n_group=getattr(router, "num_groups", 1),
        topk_group=getattr(router, "top_groups", 1),
        swiglu_limit=experts.clip or 7.0,
    )


# Arguments of the parts of a layer that change how it begins or trains, not its outputs.
_TRAINING = ("name", "trainable", "dtype", "seed", "balancer", "input_jitter", "logit_noise")
_SUFFIXES = ("_initializer", "_regularizer", "lora_rank", "lora_alpha")


def differences(mixture, config, but=()):
    """The reasons why the outputs of a layer are not those of the block of a config.

    `but` holds names of arguments that may differ.
    """
    found = []
    parts = FAMILIES[config["model_type"]].make(config, None)
    for name in ("router", "experts", "shared_expert"):
        part, wanted = getattr(mixture, name), parts.get(name)
        if not isinstance(part, type(wanted)):
            found.append(f"a `{type(part).__name__}` as {name}, not {type(wanted).__name__}")
        elif wanted is not None:
            given = _arguments_of(part)
            found += [
                f"{key}={shortened(given.get(key))}, not {shortened(value)}"
                for key, value in _arguments_of(wanted).items()
                if given.get(key) != value and key not in but
            ]
    if mixture.gated_shared_expert != parts.get("gated_shared_expert", False):
        found.append(f"gated_shared_expert={mixture.gated_shared_expert}")
    if mixture.capacity is not None and mixture.capacity.evaluation_factor is not None:
        found.append(f"evaluation_factor={mixture.capacity.evaluation_factor}, not None")
    return found


def _arguments_of(part):
    config = part.get_config()
    if "renormalize" in config:
        config["renormalize"] = _renormalizes(part)
    return {
        key: value
        for key, value in config.items()
        if key not in _TRAINING and not key.endswith(_SUFFIXES)
    }


def _renormalizes(router):
    """Whether weights are divided by their sum: None means whether there are several."""
    renormalize = getattr(router, "renormalize", None)
    return router.max_top_k > 1 if renormalize is None else renormalize
