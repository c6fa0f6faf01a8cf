"""MoE blocks of KerasHub's model families: places of weights, and equal parts."""

from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_moe import activations, routers
from keras_moe.convert.weights import Rule


class Family(NamedTuple):
    """The MoE block of one family of models.

    - `router`: path of its `Dense` layer of the router.
    - `experts`: name of its bank of experts.
    - `weights`: rules for the weights of the bank, in the order in which KerasHub makes them.
    - `make_router`: from a block to our router.
    - `gated`: arguments of our `GatedExperts`.
    - `shared`, `shared_gate`: names of the expert that serves all tokens and its gate, if any.
    - `balance`: name of the weight of the load-balancing loss, if it has one.
    - `returns_weights`: whether it returns the weights of all experts, and not the logits.
    - `is_decoder`: whether it is a whole decoder layer, which calls its router and its experts one
      after the other, with different inputs. Its bank has a learned scale of each output.
    """

    router: str
    experts: str
    weights: tuple[Rule, ...]
    make_router: Callable
    gated: dict = {}
    shared: str | None = None
    shared_gate: str | None = None
    balance: str | None = None
    returns_weights: bool = False
    is_decoder: bool = False


class BareRouter(routers.TopKRouter):
    """A router that saves weights and no random state, as the `Dense` layer that it replaces."""

    def save_own_variables(self, store):
        keras.Layer.save_own_variables(self, store)


def _renormalized(block, top_k=None, **kwargs):
    # All weights are assigned later; drawing them would take long.
    kwargs = {"renormalize": True, "kernel_initializer": "zeros", **kwargs}
    return BareRouter(block.num_experts, top_k or block.top_k, name="router", **kwargs)


def _tanh_gelu(values):
    return keras.activations.gelu(values, approximate=True)


_QWEN = Family(
    router="_sparse_feedforward_gate_dense",
    experts="expert_bank",
    weights=(
        Rule("_expert_feedforward_gate_dense", ("gate_kernel", "up_kernel")),
        Rule("_expert_feedforward_output_dense", ("down_kernel",)),
    ),
    make_router=lambda block: _renormalized(block, renormalize=block.norm_top_k_prob),
    balance="router_aux_loss_coefficient",
)

# By the class of the block.
FAMILIES = {
    "MixtralSparseMoeBlock": Family(
        router="_sparse_feedforward_gate_dense",
        experts="expert_bank",
        weights=(
            Rule("_expert_feedforward_gate_dense", ("gate_kernel",)),
            Rule("_expert_feedforward_intermediate_dense", ("up_kernel",)),
            Rule("_expert_feedforward_output_dense", ("down_kernel",)),
        ),
        make_router=lambda block: _renormalized(block, input_jitter=block.router_jitter_noise),
        balance="router_aux_loss_coef",
    ),
    "QwenSparseMoeBlock": _QWEN._replace(
        shared="shared_expert_dense", shared_gate="shared_expert_gate_dense"
    ),
    "Qwen3SparseMoeBlock": _QWEN,
    "Qwen3_5MoeSparseMoeBlock": _QWEN._replace(
        router="_router_gate",
        make_router=_renormalized,
        shared="shared_expert",
        shared_gate="_shared_expert_gate",
    ),
    "GptOssSparseMoeBlock": Family(
        router="router.router_dense",
        experts="experts",
        weights=(
            Rule("gate_up_proj", ("gate_kernel", "up_kernel"), interleaved=True),
            Rule("gate_up_proj_bias", ("gate_bias", "up_bias"), interleaved=True),
            Rule("down_proj", ("down_kernel",)),
            Rule("down_proj_bias", ("down_bias",)),
        ),
        make_router=lambda block: _renormalized(block, use_bias=True),
        gated=dict(activation=activations.quick_gelu, use_bias=True, clip=7.0, up_shift=1.0),
        returns_weights=True,
    ),
    "Gemma4TextDecoderBlock": Family(
        router="moe_router.proj",
        experts="moe_expert_bank",
        weights=(
            Rule("gate_proj", ("gate_kernel",)),
            Rule("up_proj", ("up_kernel",)),
            Rule("down_proj", ("down_kernel",)),
        ),
        make_router=lambda block: _renormalized(block, top_k=block.num_experts_per_token),
        gated={"activation": _tanh_gelu},
        is_decoder=True,
    ),
}


def family_of(layer) -> Family | None:
    cls = type(layer)
    own = isinstance(layer, keras.Layer) and cls.__module__.startswith("keras_hub.")
    # Of Gemma 4 there are dense models as well.
    has_experts = getattr(layer, "enable_moe_block", True)
    return FAMILIES.get(cls.__name__) if own and has_experts else None
