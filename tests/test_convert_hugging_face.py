"""Layers from Hugging Face's models compute the same as their blocks, and go back unchanged."""

import json

import keras
import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy
import test_convert_keras_hub as keras_hub_models
from backends import ROOT, assert_close, on_one_backend
from keras import ops
from layer_checks import array

import keras_moe
from keras_moe import convert, inspection, layers, routers, surgery
from keras_moe.convert.families import IN_FILES as READ

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
_DEEPSEEK = dict(
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
)
_LFM2 = dict(num_experts=E, num_dense_layers=0, layer_types=["full_attention"])
_QWEN3_NEXT = dict(shared_expert_intermediate_size=5, layer_types=["full_attention"])

# By `model_type`: the prefix of the classes, and arguments of the config.
FAMILIES = {
    "mixtral": ("Mixtral", dict(num_local_experts=E)),
    "qwen2_moe": ("Qwen2Moe", dict(num_experts=E, shared_expert_intermediate_size=5)),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=E, norm_topk_prob=True)),
    "olmoe": ("Olmoe", dict(num_experts=E)),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "gpt_oss": ("GptOss", dict(num_local_experts=E, layer_types=["full_attention"])),
    "minimax_m2": ("MiniMaxM2", dict(num_local_experts=E)),
    "lfm2_moe": ("Lfm2Moe", _LFM2),
    "minimax": ("MiniMax", dict(num_local_experts=E, layer_types=["full_attention"])),
    "qwen3_next": ("Qwen3Next", dict(_QWEN3_NEXT, num_experts=E)),
    "mellum": ("Mellum", dict(num_experts=E, norm_topk_prob=True)),
    "flex_olmo": ("FlexOlmo", dict(num_experts=E)),
    "deepseek_v32": ("DeepseekV32", dict(_DEEPSEEK, index_n_heads=2, index_head_dim=8)),
    "dots1": ("Dots1", _DEEPSEEK),
    "glm4_moe": ("Glm4Moe", _DEEPSEEK),
    "glm4_moe_lite": ("Glm4MoeLite", dict(_DEEPSEEK, mlp_layer_types=["sparse"])),
    "glm_moe_dsa": ("GlmMoeDsa", dict(_DEEPSEEK, index_n_heads=2, index_head_dim=8)),
    "solar_open": ("SolarOpen", _DEEPSEEK),
}
TOKENS = np.random.default_rng(0).normal(size=(2, 5, D)).astype("float32")


def is_of_block(name):
    return any(part in name for part in (".mlp.", ".block_sparse_moe.", ".feed_forward."))


def model_of(family):
    """A model with weights far from zero."""
    import torch
    import transformers

    prefix, sizes = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **sizes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, tensor in model.state_dict().items():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            # Above zero: DeepSeek-V3 fills the scores of groups that are not chosen with zeros.
            tensor.copy_(torch.rand(tensor.shape))
        elif is_of_block(name):
            tensor.copy_(torch.randn(tensor.shape))
    return model.eval()


def outputs_of(model):
    import torch

    with torch.no_grad():
        layer = model.model.layers[0]
        outputs = getattr(layer, "feed_forward", None) or layer.mlp
        outputs = outputs(torch.tensor(TOKENS))
    return (outputs[0] if isinstance(outputs, tuple) else outputs).numpy()


@on_one_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_computes_as_the_block_and_goes_back(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    layer = convert.from_hugging_face(tmp_path, layer=0)
    assert_close(array(layer(TOKENS)), outputs_of(model))
    again = convert.to_hugging_face(layer, 0, family)
    files = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    expected = {name: files[name] for name in files if is_of_block(name)}
    assert set(again) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(again[name], value)
        assert again[name].flags.c_contiguous  # as `save_file` needs it
    # A model in memory has other names and shapes.
    config = json.loads((tmp_path / "config.json").read_text())
    other = convert.from_hugging_face(model.state_dict(), 0, config)
    for weight, expected in zip(other.weights, layer.weights):
        np.testing.assert_array_equal(array(weight), array(expected))


@on_one_backend
def test_the_weight_of_the_balance_loss_is_a_share_of_the_models():
    model = model_of("mixtral")
    config = {**model.config.to_dict(), "num_hidden_layers": 4, "router_aux_loss_coef": 0.1}
    layer = convert.from_hugging_face(model.state_dict(), 0, config)
    assert [loss.weight for loss in layer.router_losses] == [0.1 * 2 / 4]


@on_one_backend
def test_the_guide_names_every_family_that_is_read():
    guide = (ROOT / "docs" / "existing_models.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in guide for name in READ)


MIXTRAL = dict(
    model_type="mixtral",
    hidden_size=D,
    intermediate_size=6,
    num_local_experts=E,
    num_experts_per_tok=2,
    router_jitter_noise=None,
)
GATE = "model.layers.0.block_sparse_moe.gate.weight"


def mixtral(folder=None, dtype="float32", router=None, experts=None, **kwargs):
    """A layer of the sizes of Mixtral, and its weights; a model of that layer in a folder."""
    experts = layers.GatedExperts(E, 6, dtype=dtype, **(experts or {}))
    router = routers.TopKRouter(**{"renormalize": True, **(router or {})})
    layer = layers.MixtureOfExperts(experts, router, dtype=dtype, **kwargs)
    layer.build((None, D))
    if folder is None:
        return layer
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    arrays = convert.to_hugging_face(layer, np.int64(0), "mixtral")
    safetensors_numpy.save_file(arrays, folder / "model.safetensors")
    return layer, arrays


def assert_same_weights(layer, other):
    for part, wanted in ((layer.router, other.router), (layer.experts, other.experts)):
        for weight, expected in zip(part.weights, wanted.weights, strict=True):
            assert weight.dtype == expected.dtype
            np.testing.assert_array_equal(array(weight), array(expected))


def test_weights_go_through_files_unchanged_also_in_half_precision(tmp_path):
    layer, arrays = mixtral(tmp_path, "bfloat16")
    again = convert.from_hugging_face(tmp_path, 0, dtype="bfloat16", name="moe")
    assert again.name == "moe"
    assert_same_weights(again, layer)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(again))
    assert convert.from_hugging_face(str(tmp_path / "model.safetensors"), 0, into=copy) is copy
    assert_same_weights(copy, layer)
    if keras.backend.backend() == "torch":
        import torch

        values = {name: torch.tensor(value.astype("float32")) for name, value in arrays.items()}
        tensors = {name: value.bfloat16() for name, value in values.items()}
        again = convert.from_hugging_face(tensors, 0, MIXTRAL, dtype="bfloat16")
        kernels = (each.experts.down_kernel for each in (again, layer))
        np.testing.assert_array_equal(*map(array, kernels))


@on_one_backend
def test_lora_is_converted(tmp_path):
    layer, _ = mixtral(tmp_path)
    layer.experts.enable_lora(2, b_initializer="glorot_uniform")
    again = convert.from_hugging_face(convert.to_hugging_face(layer, 0, "mixtral"), 0, MIXTRAL)
    assert_close(array(again(TOKENS)), array(layer(TOKENS)))
    with pytest.raises(ValueError, match="before it is quantized or has LoRA"):
        convert.from_hugging_face(tmp_path, 0, into=layer)


OTHERS = [
    dict(experts={"activation": "gelu"}),
    dict(experts={"clip": 7.0}),
    dict(experts={"up_shift": 1.0}),
    dict(experts={"use_bias": True}),
    dict(router={"score": "sigmoid"}),
    dict(router={"renormalize": False}),
    dict(router={"scaling_factor": 2.0}),
    dict(router={"balancer": "loss_free"}),
    dict(router={"use_bias": True}),
    dict(shared_expert=keras.layers.Dense(D)),
    dict(capacity_factor=layers.Capacity(2.0, evaluation_factor=2.0)),
]


@on_one_backend
def test_layers_that_compute_something_else_are_refused(tmp_path):
    mixtral(tmp_path)
    for arguments in OTHERS:
        layer = mixtral(**arguments)
        if layer.router.selection_bias is not None:
            layer.router.selection_bias.assign(np.arange(E))
        before = [array(weight) for weight in layer.weights]
        if "scaling_factor" not in arguments.get("router", {}):  # Goes into the kernels.
            with pytest.raises(ValueError, match="must be a block of 'mixtral'"):
                convert.to_hugging_face(layer, 0, "mixtral")
        with pytest.raises(ValueError, match="must be a block of 'mixtral'"):
            convert.from_hugging_face(tmp_path, 0, into=layer)
        for weight, value in zip(layer.weights, before):
            np.testing.assert_array_equal(array(weight), value)
    with pytest.raises(ValueError, match="must be a block of 'gpt_oss'"):
        convert.to_hugging_face(mixtral(), 0, "gpt_oss")
    same = {"num_groups": 1, "top_groups": 1, "score": "softmax", "renormalize": True}
    for experts, router in (
        (layers.GatedExperts(E, 6), routers.GroupLimitedRouter(**same)),
        (layers.FeedForwardExperts(E, 6), routers.TopKRouter(renormalize=True)),
        (layers.LinearExperts(E, D), routers.TopKRouter(renormalize=True)),
    ):
        layer = layers.MixtureOfExperts(experts, router, ())
        layer.build((None, D))
        with pytest.raises(ValueError, match="must be a block of 'mixtral'"):
            convert.to_hugging_face(layer, 0, "mixtral")
    experts, shared = layers.GatedExperts(E, 6), layers.GatedFeedForward(6)
    unbiased = routers.GroupLimitedRouter()
    grouped = layers.MixtureOfExperts(experts, unbiased, shared_expert=shared)
    grouped.build((None, D))
    with pytest.raises(ValueError, match="no weight `router.selection_bias`"):
        convert.to_hugging_face(grouped, 0, "deepseek_v3")


@on_one_backend
def test_weights_of_another_model_are_refused(tmp_path):
    import torch

    _, arrays = mixtral(tmp_path)
    tensors = {name: torch.tensor(value) for name, value in arrays.items()}
    weights = [
        {name: value for name, value in arrays.items() if "experts.1.w3" not in name},
        {**arrays, GATE: arrays[GATE][:-1]},
        {**arrays, GATE: arrays[GATE].astype("int8")},
        {**arrays, GATE: arrays[GATE].astype("str")},
        {**tensors, GATE: tensors[GATE].to(torch.bool)},
        {**tensors, GATE: tensors[GATE].to(torch.float8_e4m3fn)},
    ]
    cases = [(each, MIXTRAL) for each in weights]
    changes = [{"hidden_act": "leaky_relu"}, {"num_experts_per_tok": None}]
    cases += [(arrays, {**MIXTRAL, **change}) for change in changes]
    for source, config in cases:
        with pytest.raises(ValueError, match="must|Received"):
            convert.from_hugging_face(source, 0, config)


def assert_equal_in_transformers(backbone, folder, name):
    import transformers

    ids = np.random.default_rng(0).integers(0, 16, (3, 7))
    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    expected = array(backbone.token_embedding(hidden, reverse=True))
    convert.save_to_transformers(backbone, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager"
    )
    assert type(model).__name__ == f"{name}ForCausalLM"
    assert_close(model(ops.convert_to_tensor(ids)).logits.detach().numpy(), expected)


UPCYCLED = {
    "copies": ("Llama3", "Mixtral", {"rope_max_wavelength": 500}, 1),
    "parts": ("Llama3", "Mixtral", {"tie_word_embeddings": True}, 2),
    "window": ("Mistral", "Mixtral", {"sliding_window": 3, "head_dim": 6}, 1),
    # KerasHub has this number in the norms of queries and keys.
    "norms": ("Qwen3", "Qwen3Moe", {"head_dim": 6, "layer_norm_epsilon": 1e-5}, 1),
}


@on_one_backend
@pytest.mark.parametrize("case", UPCYCLED)
def test_an_upcycled_model_is_a_mixture_of_transformers(case, tmp_path):
    import keras_hub

    cls, name, more, granularity = UPCYCLED[case]
    backbone = getattr(keras_hub.models, f"{cls}Backbone")(
        vocabulary_size=16,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=D,
        intermediate_dim=12,
        **more,
    )
    kwargs = {"num_experts": 4, "top_k": 2, "granularity": granularity, "seed": 0}
    keras_moe.upcycle(backbone, every=2, **kwargs)
    if name == "Mixtral":
        with pytest.raises(ValueError, match="transformer_layer_0"):
            convert.save_to_transformers(backbone, tmp_path)
        keras_moe.upcycle(backbone, **kwargs)
    backbone.enable_lora(2, target_layer_names=["experts", "query"])
    for weight in backbone.trainable_weights:
        weight.assign_add(keras.random.normal(weight.shape, seed=0))
    assert_equal_in_transformers(backbone, tmp_path, name)


CONVERTED = {
    "mixtral": ("Mixtral", {"rope_scaling_factor": 2.0}),
    "qwen_moe": ("Qwen2Moe", {}),
    "qwen3_moe": ("Qwen3Moe", {}),
    "gpt_oss": ("GptOss", {"num_layers": 2, "sliding_window": 3, "rope_scaling_factor": 4.0}),
}


@on_one_backend
@pytest.mark.parametrize("family", CONVERTED)
def test_a_pruned_model_is_one_of_transformers(family, tmp_path, monkeypatch):
    name, more = CONVERTED[family]
    cls, sizes = keras_hub_models.FAMILIES[family]
    monkeypatch.setitem(keras_hub_models.FAMILIES, family, (cls, {**sizes, **more}))
    model = convert.use_sparse_experts(keras_hub_models.causal_lm(family))
    surgery.prune_experts(model, by=np.arange(4), keep=3)
    assert_equal_in_transformers(model.backbone, tmp_path, name)


@on_one_backend
def test_models_without_a_format_are_refused(tmp_path):
    for family in ("gemma4", "qwen3_5_moe"):
        model = convert.use_sparse_experts(keras_hub_models.causal_lm(family))
        with pytest.raises(ValueError, match="must be of KerasHub"):
            convert.save_to_transformers(model, tmp_path)
    model = convert.use_sparse_experts(keras_hub_models.causal_lm("mixtral"))
    next(iter(inspection.moe_layers(model).values())).experts.quantize("int8")
    with pytest.raises(ValueError, match="must not be quantized"):
        convert.save_to_transformers(model, tmp_path)
