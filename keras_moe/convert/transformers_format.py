"""Export of whole KerasHub models to Transformers."""

import json
import os
import pathlib
import re

import keras
import numpy as np
from keras import ops

from keras_moe._internal.keras_internals import own_variables
from keras_moe.convert.families import FAMILIES
from keras_moe.convert.hugging_face import arrays_of, config_like
from keras_moe.inspection.summaries import find_layers

# By the class of a backbone, the family that computes the same with mixtures.
_FAMILY_OF = {cls: name for name, family in FAMILIES.items() for cls in family.backbones}

# Entries of `config.json`, and attributes of backbones that have one of them.
_ENTRIES = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rope_max_wavelength",
    "shared_expert_intermediate_size": "shared_expert_intermediate_dim",
}

# Entries that all mixtures of a model share.
_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")

# Names of layers outside blocks, and in blocks.
_OUTSIDE = {"token_embedding": "model.embed_tokens.", "sequence_output_layernorm": "model.norm."}
_IN_BLOCKS = {
    "self_attention_layernorm": "input_layernorm.",
    "input_layernorm": "input_layernorm.",
    "self_attention": "self_attn.",
    "query": "self_attn.q_proj.",
    "query_dense_layernorm": "self_attn.q_norm.",
    "key": "self_attn.k_proj.",
    "key_dense_layernorm": "self_attn.k_norm.",
    "value": "self_attn.v_proj.",
    "attention_output": "self_attn.o_proj.",
    "feedforward_layernorm": "post_attention_layernorm.",
    "post_attention_layernorm": "post_attention_layernorm.",
    "feedforward_gate_dense": "mlp.gate_proj.",
    "feedforward_intermediate_dense": "mlp.up_proj.",
    "feedforward_output_dense": "mlp.down_proj.",
    "shared_gate": "mlp.shared_expert_gate.",
}


def save_to_transformers(model: keras.Model, folder: str | os.PathLike) -> None:
    """Save a KerasHub model with mixtures in a folder that Transformers loads.

    Converted Mixtral, Qwen-MoE, Qwen3-MoE and gpt-oss models stay what they are. Upcycled Llama and
    Mistral models become a Mixtral, upcycled Qwen3 models a Qwen3-MoE. LoRA and the scaling factor
    of the router go into the kernels. Needs `safetensors`.

    Args:
        model: Keras model. A `CausalLM` or `Backbone` of KerasHub. Its mixtures have the same sizes
            and the same K. In a Mixtral or gpt-oss each block has one.
        folder: Path. For `config.json` and `model.safetensors`.

    A ValueError is raised if the model is another one or quantized, or a mixture differs.

    Example:

    >>> keras_moe.convert.save_to_transformers(model, "sparse")  # doctest: +SKIP
    >>> transformers.AutoModelForCausalLM.from_pretrained("sparse")  # doctest: +SKIP
    """
    import safetensors.numpy

    backbone = getattr(model, "backbone", model)
    mixtures = [find_layers(block) for block in getattr(backbone, "transformer_layers", ())]
    config = _config(backbone, mixtures)
    arrays: dict = {}
    in_mixtures: set = set()
    for number, own in enumerate(mixtures):
        for mixture in own:
            # The shared expert is KerasHub's, and one of the other layers.
            arrays |= arrays_of(mixture, number, config["model_type"], without=("shared_expert",))
            parts = [*mixture.router._flatten_layers(), *mixture.experts._flatten_layers()]
            in_mixtures |= {id(layer) for layer in [mixture, *parts]}
    for layer in backbone._flatten_layers():
        if id(layer) not in in_mixtures and own_variables(layer):
            arrays |= _arrays_outside(layer)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _arrays_outside(layer):
    """The weights of a layer outside mixtures, under the names and in the shapes of files."""
    folder, _, name = layer.path.rpartition("/")
    block = re.search(r"transformer_layer_(\d+)", layer.path)
    theirs = (_IN_BLOCKS if block else _OUTSIDE).get(name)
    if theirs is None:
        raise ValueError(f"`model` has weights without a place. Received: {layer.path!r}")
    if folder.endswith("shared_expert_dense"):
        theirs = theirs.replace("mlp.", "mlp.shared_expert.")
    start = f"model.layers.{block[1]}.{theirs}" if block else theirs
    suffixes = {"kernel": "weight", "embeddings": "weight", "scale": "weight"}
    arrays = {}
    for ours in ("kernel", "embeddings", "scale", "bias", "sinks"):
        if getattr(layer, ours, None) is not None:
            value = ops.convert_to_numpy(getattr(layer, ours))
            if ours == "kernel":  # of heads: (D, heads, size), or (heads, size, D) for outputs
                is_output = name == "attention_output"
                value = value.reshape((-1, value.shape[-1]) if is_output else (len(value), -1)).T
            elif ours == "bias":
                value = value.reshape(-1)
            arrays[start + suffixes.get(ours, ours)] = value
    if not getattr(layer, "tie_weights", True):
        arrays["lm_head.weight"] = ops.convert_to_numpy(layer.reverse_embeddings).T
    return arrays


def _config(backbone, mixtures):
    bases = [cls.__name__ for cls in type(backbone).__mro__]
    family = next((_FAMILY_OF[name] for name in bases if name in _FAMILY_OF), None)
    blocks = [config_like(mixture, family) for own in mixtures for mixture in own]
    sizes = {tuple(block[name] for name in _SIZES) for block in blocks}
    dense = [number for number, own in enumerate(mixtures) if not own]
    may_be_dense = family in ("qwen2_moe", "qwen3_moe")
    if family is None or len(sizes) != 1 or (dense and not may_be_dense):
        names = [backbone.transformer_layers[number].name for number in dense]
        raise ValueError(
            f"`model` must be of KerasHub, with a backbone of {', '.join(_FAMILY_OF)}, and have "
            "mixtures of one size, in all blocks if Transformers needs that: see `upcycle`. "
            f"Received: {type(backbone).__name__} with sizes {sizes} and dense blocks {names}"
        )
    quantized = [layer.path for layer in backbone._flatten_layers() if layer.quantization_mode]
    if quantized:
        raise ValueError(f"`model` must not be quantized. Received: int8 or int4 in {quantized}")
    of_mixtures = dict(zip(_SIZES, sizes.pop()))
    width = of_mixtures["moe_intermediate_size"]

    def of(name, default=None):
        return getattr(backbone, name, default)

    window = of("sliding_window_size", of("sliding_window"))
    config = {
        "architectures": [f"{FAMILIES[family].model}ForCausalLM"],
        "model_type": family,
        **{name: of(ours) for name, ours in _ENTRIES.items()},
        "head_dim": of("head_dim") or backbone.hidden_dim // backbone.num_query_heads,
        **of_mixtures,
        "intermediate_size": backbone.intermediate_dim if may_be_dense else width,
        "num_local_experts": of_mixtures["num_experts"],
        "mlp_only_layers": dense,
        "sliding_window": window,
        "use_sliding_window": of("use_sliding_window_attention", bool(window)),
        "rope_scaling": _rope_scaling(of, family),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
        "tie_word_embeddings": backbone.token_embedding.tie_weights,
    }
    if family in ("gpt_oss", "qwen2_moe"):
        name = "sliding_window" if family == "gpt_oss" else "use_sliding_window_attention"
        slides = [bool(getattr(block, name)) for block in backbone.transformer_layers]
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[each] for each in slides]
    if family == "gpt_oss" and window:
        config["sliding_window"] = window + 1  # KerasHub does not count the token itself.
    return config


def _rope_scaling(of, family):
    factor = of("rope_scaling_factor", 1.0)
    if family == "gpt_oss":
        yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "factor": factor}
        return {"rope_type": "yarn", "original_max_position_embeddings": 4096, **yarn}
    if of("rope_frequency_adjustment_factor") is not None:
        return {
            "rope_type": "llama3",
            "factor": of("rope_frequency_adjustment_factor"),
            "low_freq_factor": of("rope_low_freq_factor"),
            "high_freq_factor": of("rope_high_freq_factor"),
            "original_max_position_embeddings": of("rope_pretraining_sequence_length"),
        }
    # KerasHub computes nothing with the `rope_position_scaling_factor` of a Llama.
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
