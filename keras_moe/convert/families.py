"""The table of model families: their MoE blocks in Hugging Face's files and in KerasHub."""

from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import routers
from keras_moe._internal.serialization import register
from keras_moe.convert.weights import Rule


class Config(dict):
    """The entries of a `config.json` that are not null."""

    def __missing__(self, name):
        rule = f"The config of a model of {self['model_type']!r} must have `{name}`"
        raise ValueError(f"{rule}. Received: {', '.join(self)}")


class Block(NamedTuple):
    """The MoE block of a family in KerasHub.

    - `cls`, `router`, `experts`: name of its class; paths of its router's `Dense` and of its bank.
    - `weights`: rules for the weights of the bank, in the order in which KerasHub makes them.
    - `shared`, `shared_gate`: names of the expert that serves all tokens and its gate, if any.
    - `returns_weights`: whether it returns the weights of all experts, and not the logits.
    - `is_decoder`: whether it is a whole decoder layer, which calls its router and its experts.
    """

    cls: str
    router: str
    experts: str
    weights: tuple[Rule, ...]
    shared: str | None = None
    shared_gate: str | None = None
    returns_weights: bool = False
    is_decoder: bool = False


class Family(NamedTuple):
    """One family of models.

    - `router`, `experts`: from a `Config` to arguments of our router, a `router_class`, and bank.
    - `layouts`: pairs of a prefix with `{layer}` and rules, of files and, if other, in memory.
    - `shared`: from a `Config` to the width of the shared expert; `gated_shared`: it has a gate.
    - `block`: its block in KerasHub.
    - `model`, `backbones`: name of its models in Transformers, and the KerasHub backbones that are
      exported as such a model.
    """

    router: Callable
    experts: Callable = lambda config: {}
    layouts: tuple[tuple[str, tuple[Rule, ...]], ...] = ()
    shared: Callable | None = None
    gated_shared: bool = False
    router_class: type = routers.TopKRouter
    block: Block | None = None
    model: str = ""
    backbones: tuple[str, ...] = ()


@register
def tanh_gelu(values):
    return keras.activations.gelu(values, approximate=True)


@register
def quick_gelu(values):
    return values * ops.sigmoid(1.702 * values)


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
    Rule("gate_up_proj", ("gate_kernel", "up_kernel"), interleaved=True),
    Rule("gate_up_proj_bias", ("gate_bias", "up_bias"), interleaved=True),
    Rule("down_proj", ("down_kernel",)),
    Rule("down_proj_bias", ("down_bias",)),
)


_ROUTER = (*_dense(["router"], ["router."]), Rule("router.bias", ("router.bias",)))


def _in_experts(rule):
    ours = tuple(f"experts.{name}" for name in rule.ours)
    return rule._replace(theirs=f"experts.{rule.theirs}", ours=ours)


def _renormalized(config):
    return {"renormalize": config["norm_topk_prob"]}


def _jittered(config):
    return {"renormalize": True, "input_jitter": config.get("router_jitter_noise", 0.0)}


def _loss_free(config):
    scale = config["routed_scaling_factor"]
    return {**_renormalized(config), "scaling_factor": scale, "balancer": "loss_free"}


_SPARSE_GATE = "_sparse_feedforward_gate_dense"
_QWEN_BLOCK = Block(
    *("Qwen3SparseMoeBlock", _SPARSE_GATE, "expert_bank"),
    weights=(
        Rule("_expert_feedforward_gate_dense", ("gate_kernel", "up_kernel")),
        Rule("_expert_feedforward_output_dense", ("down_kernel",)),
    ),
)

# By `model_type` of their config in Transformers.
FAMILIES = {
    "mixtral": Family(
        _jittered,
        layouts=_layouts(*_GATE, by_expert=_BY_NUMBER, prefix=_BLOCK),
        block=Block(
            *("MixtralSparseMoeBlock", _SPARSE_GATE, "expert_bank"),
            weights=(
                Rule("_expert_feedforward_gate_dense", ("gate_kernel",)),
                Rule("_expert_feedforward_intermediate_dense", ("up_kernel",)),
                Rule("_expert_feedforward_output_dense", ("down_kernel",)),
            ),
        ),
        model="Mixtral",
        backbones=("MixtralBackbone", "LlamaBackbone", "MistralBackbone"),
    ),
    "qwen2_moe": Family(
        _renormalized,
        layouts=_layouts(*_GATE, *_shared("shared_expert"), *_SHARED_GATE),
        shared=lambda config: config["shared_expert_intermediate_size"],
        gated_shared=True,
        block=_QWEN_BLOCK._replace(
            cls="QwenSparseMoeBlock",
            shared="shared_expert_dense",
            shared_gate="shared_expert_gate_dense",
        ),
        model="Qwen2Moe",
        backbones=("QwenMoeBackbone",),
    ),
    "qwen3_moe": Family(
        _renormalized,
        layouts=_layouts(*_GATE),
        block=_QWEN_BLOCK,
        model="Qwen3Moe",
        backbones=("Qwen3Backbone", "Qwen3MoeBackbone"),
    ),
    "qwen3_5_moe": Family(
        lambda config: {"renormalize": True},
        block=_QWEN_BLOCK._replace(
            cls="Qwen3_5MoeSparseMoeBlock",
            router="_router_gate",
            shared="shared_expert",
            shared_gate="_shared_expert_gate",
        ),
    ),
    "olmoe": Family(_renormalized, layouts=_layouts(*_GATE)),
    "deepseek_v3": Family(
        lambda config: {
            **_loss_free(config),
            "num_groups": config["n_group"],
            "top_groups": config["topk_group"],
        },
        layouts=_layouts(*_GATE, _bias("gate.e_score_correction_bias"), *_shared("shared_experts")),
        shared=lambda config: config["moe_intermediate_size"] * config["n_shared_experts"],
        router_class=routers.GroupLimitedRouter,
    ),
    "gpt_oss": Family(
        lambda config: {"renormalize": True, "use_bias": True},
        lambda config: {
            "activation": quick_gelu,
            "use_bias": True,
            "clip": config.get("swiglu_limit", 7.0),
            "up_shift": 1.0,
        },
        layouts=((_MLP, (*_ROUTER, *map(_in_experts, _GPT_OSS))),),
        block=Block(
            *("GptOssSparseMoeBlock", "router.router_dense", "experts", _GPT_OSS),
            returns_weights=True,
        ),
        model="GptOss",
        backbones=("GptOssBackbone",),
    ),
    "minimax_m2": Family(
        lambda config: {**_jittered(config), "score": "sigmoid", "balancer": "loss_free"},
        layouts=_layouts(
            *_GATE, _bias("e_score_correction_bias"), by_expert=_BY_NUMBER, prefix=_BLOCK
        ),
    ),
    "lfm2_moe": Family(
        lambda config: {**_loss_free(config), "score": "sigmoid"},
        layouts=_layouts(
            *_GATE, _bias("expert_bias"), by_expert=_BY_NUMBER, prefix=_LFM, in_memory=_LFM
        ),
    ),
    "gemma4": Family(
        lambda config: {"renormalize": True},
        lambda config: {"activation": tanh_gelu},
        block=Block(
            *("Gemma4TextDecoderBlock", "moe_router.proj", "moe_expert_bank"),
            weights=(
                Rule("gate_proj", ("gate_kernel",)),
                Rule("up_proj", ("up_kernel",)),
                Rule("down_proj", ("down_kernel",)),
                Rule("per_expert_scale", ("output_scale",)),
            ),
            is_decoder=True,
        ),
    ),
}

# Further families, by the family with the same block.
_ALIKE = {
    "mixtral": "minimax",
    "qwen2_moe": "qwen3_next",
    "qwen3_moe": "mellum",
    "olmoe": "flex_olmo",
    "deepseek_v3": "deepseek_v32 dots1 glm4_moe glm4_moe_lite glm_moe_dsa solar_open",
}

# The families whose files are read and written.
IN_FILES = {name: family for name, family in FAMILIES.items() if family.layouts}
IN_FILES.update({name: FAMILIES[like] for like in _ALIKE for name in _ALIKE[like].split()})
