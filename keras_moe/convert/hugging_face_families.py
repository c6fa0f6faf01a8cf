"""MoE blocks of Hugging Face's model families: names of weights, and the equal layer."""

from collections.abc import Callable
from typing import NamedTuple

from keras_moe import activations, losses, routers
from keras_moe._internal.checks import check_choice, shortened
from keras_moe.convert.weights import Rule
from keras_moe.layers import GatedExperts, GatedFeedForward, MixtureOfExperts


class Config(dict):
    """The entries of a `config.json` that are not null."""

    def __missing__(self, name):
        rule = f"The config of a model of {self['model_type']!r} must have `{name}`"
        raise ValueError(f"{rule}. Received: {', '.join(self)}")


class Family(NamedTuple):
    """The MoE block of one family of models.

    - `layouts`: pairs of the prefix of all names, with `{layer}` in it, and rules: for files, and
      for models in memory if they differ.
    - `router`, `experts`: from a `Config` to arguments of our router, a `router_class`, and bank.
    - `width`: name of the experts' hidden width in the config.
    - `shared`: from a `Config` to the width of the shared expert; `gated_shared` if that has a
      gate.
    - `scales_weights`: whether its config has the `scaling_factor` of the router. Otherwise the
      last kernels of the experts are multiplied by it.
    """

    layouts: tuple[tuple[str, tuple[Rule, ...]], ...]
    router: Callable
    experts: Callable = lambda config: {}
    width: str = "moe_intermediate_size"
    shared: Callable | None = None
    gated_shared: bool = False
    scales_weights: bool = False
    router_class: type = routers.TopKRouter


def _dense(theirs, ours):
    """Rules for linear layers, whose kernels are (outputs, inputs)."""
    return tuple(
        Rule(f"{their}.weight", (f"{our}kernel",), transposed=True)
        for their, our in zip(theirs, ours)
    )


_MLP = "model.layers.{layer}.mlp."
_BLOCK = "model.layers.{layer}.block_sparse_moe."
_LFM = "model.layers.{layer}.feed_forward."
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
    """The layouts of files and of models in memory, whose experts are stacked."""
    return (prefix, (*others, *by_expert)), (in_memory, (*others, *_STACKED))


def _bias(theirs):
    return Rule(theirs, ("router.selection_bias",))


_GPT_OSS = (
    Rule("router.weight", ("router.kernel",), transposed=True),
    Rule("router.bias", ("router.bias",)),
    Rule("experts.gate_up_proj", ("experts.gate_kernel", "experts.up_kernel"), interleaved=True),
    Rule("experts.gate_up_proj_bias", ("experts.gate_bias", "experts.up_bias"), interleaved=True),
    Rule("experts.down_proj", ("experts.down_kernel",)),
    Rule("experts.down_proj_bias", ("experts.down_bias",)),
)


def _renormalized(config):
    return {"renormalize": config["norm_topk_prob"]}


def _jittered(config):
    return {"renormalize": True, "input_jitter": config.get("router_jitter_noise", 0.0)}


def _loss_free(config):
    return {
        "renormalize": config["norm_topk_prob"],
        "scaling_factor": config["routed_scaling_factor"],
        "balancer": "loss_free",
    }


# By `model_type` of their config.
FAMILIES = {
    "mixtral": Family(
        _layouts(*_GATE, by_expert=_BY_NUMBER, prefix=_BLOCK), _jittered, width="intermediate_size"
    ),
    "qwen2_moe": Family(
        _layouts(*_GATE, *_shared("shared_expert"), *_SHARED_GATE),
        _renormalized,
        shared=lambda config: config["shared_expert_intermediate_size"],
        gated_shared=True,
    ),
    "qwen3_moe": Family(_layouts(*_GATE), _renormalized),
    "olmoe": Family(_layouts(*_GATE), _renormalized, width="intermediate_size"),
    "deepseek_v3": Family(
        _layouts(*_GATE, _bias("gate.e_score_correction_bias"), *_shared("shared_experts")),
        lambda config: {
            **_loss_free(config),
            "num_groups": config["n_group"],
            "top_groups": config["topk_group"],
        },
        shared=lambda config: config["moe_intermediate_size"] * config["n_shared_experts"],
        scales_weights=True,
        router_class=routers.GroupLimitedRouter,
    ),
    "gpt_oss": Family(
        ((_MLP, _GPT_OSS),),
        lambda config: {"renormalize": True, "use_bias": True},
        lambda config: {
            "activation": activations.quick_gelu,
            "use_bias": True,
            "clip": config.get("swiglu_limit", 7.0),
            "up_shift": 1.0,
        },
        width="intermediate_size",
    ),
    "minimax_m2": Family(
        _layouts(*_GATE, _bias("e_score_correction_bias"), by_expert=_BY_NUMBER, prefix=_BLOCK),
        lambda config: {**_jittered(config), "score": "sigmoid", "balancer": "loss_free"},
        width="intermediate_size",
    ),
    "lfm2_moe": Family(
        _layouts(*_GATE, _bias("expert_bias"), by_expert=_BY_NUMBER, prefix=_LFM, in_memory=_LFM),
        lambda config: {**_loss_free(config), "score": "sigmoid"},
        scales_weights=True,
    ),
}

# Families with the block of another one.
_ALIKE = {
    "mixtral": "minimax",
    "qwen2_moe": "qwen3_next",
    "qwen3_moe": "mellum",
    "olmoe": "flex_olmo",
    "deepseek_v3": "deepseek_v32 dots1 glm4_moe glm4_moe_lite glm_moe_dsa solar_open",
}
FAMILIES.update({name: FAMILIES[like] for like in _ALIKE for name in _ALIKE[like].split()})

# Keras and PyTorch compute them alike under one name.
_ACTIVATIONS = ("silu", "swish", "gelu", "relu", "relu6", "mish", "sigmoid", "tanh", "linear")


def parts_of(config, dtype=None):
    family = FAMILIES[config["model_type"]]
    # Families and releases differ in the name.
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts = config[next((name for name in names if name in config), names[0])]
    activation = check_choice("hidden_act", config.get("hidden_act", "silu"), _ACTIVATIONS)
    # All weights are assigned later; drawing them would take long.
    experts = {"activation": activation, "kernel_initializer": "zeros", **family.experts(config)}
    router = family.router(config)
    shared = family.shared and GatedFeedForward(family.shared(config), activation, dtype=dtype)
    weight = config.get("router_aux_loss_coef")
    return {
        "experts": GatedExperts(num_experts, config[family.width], dtype=dtype, **experts),
        "router": family.router_class(num_experts, top_k=config["num_experts_per_tok"], **router),
        "router_losses": [losses.LoadBalance(weight)] if weight else [],
        "shared_expert": shared,
        "gated_shared_expert": family.gated_shared,
    }


def mixture_of(config, dtype=None, **kwargs):
    mixture = MixtureOfExperts(**{**parts_of(config, dtype), "dtype": dtype, **kwargs})
    mixture.build((None, None, config["hidden_size"]))
    return mixture


def config_like(mixture, family):
    """The config of a family whose MoE block comes closest to a layer."""
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
    """Why a layer computes something else than the block of a config, but for some arguments."""
    found = []
    parts = parts_of(config)
    for name in ("router", "experts", "shared_expert"):
        part, wanted = getattr(mixture, name), parts[name]
        if not isinstance(part, type(wanted)):
            found.append(f"a `{type(part).__name__}` as {name}, not {type(wanted).__name__}")
        elif wanted is not None:
            given = _arguments_of(part)
            found += [
                f"{key}={shortened(given.get(key))}, not {shortened(value)}"
                for key, value in _arguments_of(wanted).items()
                if given.get(key) != value and key not in but
            ]
    if mixture.gated_shared_expert != parts["gated_shared_expert"]:
        found.append(f"gated_shared_expert={mixture.gated_shared_expert}")
    if mixture.capacity is not None and mixture.capacity.evaluation_factor is not None:
        found.append(f"evaluation_factor={mixture.capacity.evaluation_factor}, not None")
    return found


def _arguments_of(part):
    config = part.get_config()
    if "renormalize" in config:
        config["renormalize"] = _renormalizes(part)
    kept = [key for key in config if key not in _TRAINING and not key.endswith(_SUFFIXES)]
    return {key: config[key] for key in kept}


def _renormalizes(router):
    """Whether weights are divided by their sum; None divides several."""
    renormalize = getattr(router, "renormalize", None)
    return router.max_top_k > 1 if renormalize is None else renormalize
