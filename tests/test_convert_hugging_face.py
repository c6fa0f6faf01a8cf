"""Layers from Hugging Face's models compute what their blocks compute, and go back unchanged."""

import json

import keras
import numpy as np
import pytest
from backends import assert_close
from keras import ops

from keras_moe import convert, layers, routers

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

D, E = 8, 8
_SIZES = dict(
    vocab_size=16,
    hidden_size=D,
    intermediate_size=6,
    moe_intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_experts_per_tok=2,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    experts_implementation="eager",
)

# By `model_type`: the prefix of the classes, and arguments of the config.
FAMILIES = {
    "mixtral": ("Mixtral", dict(num_local_experts=E)),
    "qwen2_moe": ("Qwen2Moe", dict(num_experts=E, shared_expert_intermediate_size=5)),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=E, norm_topk_prob=True)),
    "olmoe": ("Olmoe", dict(num_experts=E)),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            n_routed_experts=E,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            first_k_dense_replace=0,
            num_key_value_heads=2,
            q_lora_rank=4,
            kv_lora_rank=4,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        ),
    ),
    "gpt_oss": ("GptOss", dict(num_local_experts=E, layer_types=["full_attention"])),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family, dtype=torch.float32):
    """A model with weights far from zero."""
    prefix, sizes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, tensor in model.state_dict().items():
        if ".mlp." in name:
            tensor.copy_(torch.randn(tensor.shape))
    # Of DeepSeek-V3, above zero: it fills the scores of groups that are not chosen with zeros.
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.rand(tensor.shape))
    return model.to(dtype).eval()


def outputs_of(model, tokens):
    with torch.no_grad():
        outputs = model.model.layers[0].mlp(torch.tensor(tokens))
    return (outputs[0] if isinstance(outputs, tuple) else outputs).numpy()


TOKENS = np.random.default_rng(0).normal(size=(2, 5, D)).astype("float32")


@each_family
def test_a_layer_from_files_computes_what_the_block_does_and_goes_back(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    layer = convert.from_hugging_face(tmp_path, layer=0)
    assert_close(ops.convert_to_numpy(layer(TOKENS)), outputs_of(model, TOKENS))
    again = convert.to_hugging_face(layer, 0, family)
    files = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    expected = {name: files[name] for name in files if ".mlp." in name or "moe" in name}
    assert set(again) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].flags.c_contiguous  # as `save_file` needs it


@each_family
def test_a_layer_from_a_model_in_memory_is_that_of_its_files(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    layer = convert.from_hugging_face(tmp_path, layer=0)
    config = json.loads((tmp_path / "config.json").read_text())
    other = convert.from_hugging_face(model.state_dict(), 0, config)
    for weight, expected in zip(other.weights, layer.weights):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (weight, expected)))


def test_weights_in_half_precision_stay_so(tmp_path):
    model = model_of("mixtral", torch.bfloat16)
    model.save_pretrained(tmp_path)
    layer = convert.from_hugging_face(tmp_path, 0, dtype="bfloat16", name="moe")
    assert layer.experts.up_kernel.dtype == "bfloat16" and layer.name == "moe"
    kernels = model.state_dict()["model.layers.0.mlp.experts.down_proj"].float().numpy()
    ours = ops.convert_to_numpy(ops.cast(layer.experts.down_kernel, "float32"))
    np.testing.assert_array_equal(ours, kernels.transpose(0, 2, 1))


def test_a_layer_that_is_there_is_given_the_weights(tmp_path):
    model_of("qwen3_moe").save_pretrained(tmp_path)
    layer = convert.from_hugging_face(tmp_path, 0)
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert convert.from_hugging_face(tmp_path, 0, into=twin) is twin
    assert_close(ops.convert_to_numpy(twin(TOKENS)), ops.convert_to_numpy(layer(TOKENS)))


def with_lora(path):
    layer = convert.from_hugging_face(path, 0)
    layer.experts.enable_lora(2)
    return layer


def test_what_lora_has_learned_is_converted(tmp_path):
    model_of("qwen3_moe").save_pretrained(tmp_path)
    layer = convert.from_hugging_face(tmp_path, 0)
    layer.experts.enable_lora(2, b_initializer="glorot_uniform")
    arrays = convert.to_hugging_face(layer, 0, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    again = convert.from_hugging_face(arrays, 0, config)
    assert_close(ops.convert_to_numpy(again(TOKENS)), ops.convert_to_numpy(layer(TOKENS)))


def deepseek(**kwargs):
    model = model_of("deepseek_v3")
    config = model.config.to_dict()
    return convert.from_hugging_face(model.state_dict(), 0, config, **kwargs)


def with_selection_bias(path):
    router = routers.TopKRouter(renormalize=True, balancer="loss_free")
    layer = convert.from_hugging_face(path, 0, router=router)
    layer.router.selection_bias.assign(np.arange(E))
    return layer


def in_integers(folder):
    weights = safetensors_numpy.load_file(folder / "model.safetensors")
    return {name: value.astype("int8") for name, value in weights.items()}


def in_torch(folder, dtype):
    import torch

    weights = safetensors_numpy.load_file(folder / "model.safetensors")
    dtype = getattr(torch, dtype)
    return {name: torch.from_numpy(value).to(dtype) for name, value in weights.items()}


def without_expert(folder):
    weights = safetensors_numpy.load_file(folder / "model.safetensors")
    return {name: value for name, value in weights.items() if "experts.1.up" not in name}


def test_what_cannot_be_converted_is_refused_with_a_reason(tmp_path):
    model_of("qwen3_moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    cases = [
        (lambda: convert.from_hugging_face(tmp_path, 1), "without 'model.layers.1.mlp"),
        (lambda: convert.from_hugging_face(tmp_path / "none", 0), "on this machine"),
        (lambda: convert.from_hugging_face(tmp_path / "none", 0, config), "safetensors"),
        (
            lambda: convert.from_hugging_face(tmp_path, 0, {**config, "model_type": "llama"}),
            "must be one of",
        ),
        (
            lambda: convert.from_hugging_face(tmp_path, 0, {**config, "moe_intermediate_size": 5}),
            "of shape",
        ),
        (
            lambda: convert.from_hugging_face(tmp_path, 0, {**config, "quantization_config": {}}),
            "of a model that is not quantized",
        ),
        (lambda: convert.from_hugging_face(in_integers(tmp_path), 0, config), "of int8"),
        (lambda: convert.from_hugging_face(in_torch(tmp_path, "int8"), 0, config), "of int8"),
        (lambda: convert.from_hugging_face(in_torch(tmp_path, "bool"), 0, config), "of bool"),
        (
            lambda: convert.from_hugging_face(in_torch(tmp_path, "float8_e4m3fn"), 0, config),
            "scales of its own",
        ),
        (lambda: convert.from_hugging_face(without_expert(tmp_path), 0, config), "without 'model"),
        (
            lambda: convert.to_hugging_face(convert.from_hugging_face(tmp_path, 0), 0, "gpt_oss"),
            "without `router.bias`",
        ),
        (
            lambda: convert.from_hugging_face(tmp_path, 0, into=with_lora(tmp_path)),
            "neither quantized nor with LoRA",
        ),
        (lambda: deepseek(gated_shared_expert=True), "shared_gate"),
        (
            lambda: deepseek(capacity_factor=layers.Capacity(2.0, evaluation_factor=2.0)),
            "evaluation_factor=2.0, not None",
        ),
        (
            lambda: convert.from_hugging_face(tmp_path, 0, into=with_selection_bias(tmp_path)),
            "selection_bias",
        ),
        (
            lambda: convert.to_hugging_face(with_selection_bias(tmp_path), 0, "qwen3_moe"),
            "selection_bias",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
