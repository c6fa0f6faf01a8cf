"""Export of upcycled KerasHub models to Hugging Face."""

import json
import os
import pathlib

import keras
import numpy as np
from keras import ops

from keras_moe.convert.hugging_face import to_hugging_face
from keras_moe.inspection.summaries import find_layers


def save_as_mixtral(model: keras.Model, path: str | os.PathLike) -> None:
    """Save an upcycled Llama of KerasHub in a folder that Transformers loads as a Mixtral.

    Needs the package `safetensors`. LoRA is added to the kernels, which are multiplied by the
    scaling factor of the router (`granularity`). The dense model's tokenizer fits.

    Args:
        model: Keras model. A `LlamaCausalLM` or `LlamaBackbone`, or one of Llama 3, with a mixture
            in each block, all with the same sizes and the same K.
        path: Path. Folder for `config.json` and `model.safetensors`.

    Raises:
        ValueError: If the model is another one, is quantized or has dense blocks, its mixtures
            differ, or one computes something else than the blocks of Mixtral.

    Example:

    >>> keras_moe.convert.save_as_mixtral(model, "sparse")  # doctest: +SKIP
    >>> transformers.AutoModelForCausalLM.from_pretrained("sparse")  # doctest: +SKIP
    """
    import safetensors.numpy

    backbone = getattr(model, "backbone", model)
    config = _config(backbone)
    embedding = backbone.token_embedding
    arrays = {
        "model.embed_tokens.weight": ops.convert_to_numpy(embedding.embeddings),
        "model.norm.weight": ops.convert_to_numpy(backbone.layer_norm.scale),
    }
    if not embedding.tie_weights:
        arrays["lm_head.weight"] = ops.convert_to_numpy(embedding.reverse_embeddings).T
    for number, block in enumerate(backbone.transformer_layers):
        attention, prefix = block._self_attention_layer, f"model.layers.{number}."
        for name in ("query", "key", "value", "output"):
            kernel = ops.convert_to_numpy(getattr(attention, f"_{name}_dense").kernel)
            rows = (-1, kernel.shape[-1]) if name == "output" else (len(kernel), -1)
            arrays[f"{prefix}self_attn.{name[0]}_proj.weight"] = kernel.reshape(rows).T
        for theirs, ours in (("input", "self_attention"), ("post_attention", "feedforward")):
            norm = getattr(block, f"_{ours}_layernorm")
            arrays[f"{prefix}{theirs}_layernorm.weight"] = ops.convert_to_numpy(norm.scale)
        arrays |= to_hugging_face(find_layers(block)[0], number, "mixtral")
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _config(backbone):
    blocks = getattr(backbone, "transformer_layers", ())
    of_blocks = [find_layers(block) for block in blocks]
    mixtures: list = sum(of_blocks, [])
    sizes = {(m.experts.num_experts, m.router.max_top_k, m.experts.hidden_dim) for m in mixtures}
    is_llama = any(cls.__name__ == "LlamaBackbone" for cls in type(backbone).__mro__)
    if not is_llama or not all(of_blocks) or len(sizes) != 1:
        dense = [block.name for block, mixtures in zip(blocks, of_blocks) if not mixtures]
        raise ValueError(
            "`model` must be a Llama of KerasHub with mixtures of the same sizes in all blocks; "
            "`upcycle` gives them to the blocks that are still dense. "
            f"Received: {type(backbone).__name__} with sizes {sizes} and the dense blocks {dense}"
        )
    quantized = [layer.path for layer in backbone._flatten_layers() if layer.quantization_mode]
    if quantized:
        raise ValueError(f"`model` must not be quantized. Received: int8 or int4 in {quantized}")
    factor, rope = getattr(backbone, "rope_frequency_adjustment_factor", None), None
    if factor is not None:
        rope = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": backbone.rope_low_freq_factor,
            "high_freq_factor": backbone.rope_high_freq_factor,
            "original_max_position_embeddings": backbone.rope_pretraining_sequence_length,
        }
    num_experts, top_k, width = sizes.pop()
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": backbone.vocabulary_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": width,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "rope_theta": backbone.rope_max_wavelength,
        # KerasHub computes nothing with its `rope_position_scaling_factor`.
        "rope_scaling": rope,
        **dict.fromkeys(("sliding_window", "bos_token_id", "eos_token_id")),
        "tie_word_embeddings": backbone.token_embedding.tie_weights,
    }
