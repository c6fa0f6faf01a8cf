"""Tiny models of KerasHub with random weights, one of each family with MoE blocks."""

import keras
import numpy as np
from keras import ops

VOCABULARY = 40
_SIZES = dict(
    vocabulary_size=VOCABULARY,
    num_layers=1,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=8,
    num_experts=4,
    top_k=2,
)
_QWEN = dict(_SIZES, moe_intermediate_dim=6)

# The prefix of the classes, and arguments of the backbone.
FAMILIES = {
    "mixtral": ("Mixtral", dict(_SIZES, intermediate_dim=6)),
    "qwen_moe": (
        "QwenMoe",
        dict(_QWEN, intermediate_dim=10, shared_expert_intermediate_dim=5),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        # One layer is dense.
        dict(
            _QWEN,
            num_layers=2,
            intermediate_dim=10,
            norm_top_k_prob=True,
            head_dim=4,
            decoder_sparse_step=2,
        ),
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        dict(
            _QWEN,
            shared_expert_intermediate_size=5,
            head_dim=8,
            layer_types=["full_attention"],
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
        ),
    ),
    "gpt_oss": ("GptOss", dict(_SIZES, intermediate_dim=6)),
    "gemma4": (
        "Gemma4",
        dict(
            vocabulary_size=VOCABULARY,
            image_size=None,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            hidden_dim=8,
            intermediate_dim=10,
            head_dim=4,
            enable_moe_block=True,
            num_experts=4,
            expert_intermediate_dim=6,
            num_experts_per_token=2,
        ),
    ),
}


def causal_lm(family, **kwargs):
    """A model whose experts and routers are far from zero, so that a mistake shows."""
    import keras_hub  # where it is needed: for seconds

    keras.utils.set_random_seed(0)
    prefix, sizes = FAMILIES[family]
    backbone = getattr(keras_hub.models, f"{prefix}Backbone")(**sizes, **kwargs)
    generator = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        value = generator.normal(size=variable.shape)
        # Scales of norms are 1, or 0 where 1 is added to them.
        is_scale = len(variable.shape) == 1
        old = ops.convert_to_numpy(variable)
        variable.assign(old + 0.1 * value if is_scale else 0.5 * value)
    model = getattr(keras_hub.models, f"{prefix}CausalLM")(preprocessor=None, backbone=backbone)
    model.compile(optimizer="sgd", sampler="greedy")
    return model


def prompts(length, prompt_lengths, family=None):
    """Token ids with padding on the right, as a model of the family takes them."""
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (len(prompt_lengths), length))
    mask = np.arange(length) < np.array(prompt_lengths)[:, None]
    inputs = {"token_ids": np.where(mask, ids, 0), "padding_mask": mask.astype("int32")}
    if family == "gemma4":
        inputs["position_ids"] = np.broadcast_to(np.arange(length), ids.shape)
    return inputs
