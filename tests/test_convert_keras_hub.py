"""Models of KerasHub compute the same with our layers in them, and can be saved and restored."""

import sys
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    QUICK_JIT,
    assert_close,
    on_one_backend,
    saved_and_loaded,
    unless_compiled,
)
from keras import ops

from keras_moe import convert, inspection, surgery, upcycle
from keras_moe._internal.keras_internals import parameters_of
from keras_moe.surgery.cutting import merge
from keras_moe.surgery.measuring import importance

pytestmark = [
    # `compile` of KerasHub's models is their own, which Keras does not call while it loads.
    pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called:UserWarning"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning"),
]
LENGTH, VOCABULARY = 6, 40
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
_QWEN3 = dict(norm_top_k_prob=True, head_dim=4, decoder_sparse_step=2)  # One layer is dense.
_QWEN3_5 = dict(
    shared_expert_intermediate_size=5,
    head_dim=8,
    layer_types=["full_attention"],
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=4,
    linear_value_head_dim=4,
)
_GEMMA4 = dict(
    image_size=None,
    head_dim=4,
    enable_moe_block=True,
    expert_intermediate_dim=6,
    num_experts_per_token=2,
)

# Tiny models: the prefix of the classes, and arguments of the backbone.
FAMILIES = {
    "mixtral": ("Mixtral", dict(_SIZES, intermediate_dim=6)),
    "qwen_moe": ("QwenMoe", dict(_QWEN, intermediate_dim=10, shared_expert_intermediate_dim=5)),
    "qwen3_moe": ("Qwen3Moe", dict(_QWEN, **_QWEN3, num_layers=2, intermediate_dim=10)),
    "qwen3_5_moe": ("Qwen3_5Moe", dict(_QWEN, **_QWEN3_5)),
    "gpt_oss": ("GptOss", dict(_SIZES, intermediate_dim=6)),
    "gemma4": ("Gemma4", dict(_SIZES, **_GEMMA4, num_layers=2, intermediate_dim=10)),
}
del FAMILIES["gemma4"][1]["top_k"]


def causal_lm(family):
    """A model whose experts and routers are far from zero, so that a mistake shows."""
    import keras_hub  # where it is needed: for seconds

    keras.utils.set_random_seed(0)
    prefix, sizes = FAMILIES[family]
    backbone = getattr(keras_hub.models, f"{prefix}Backbone")(**sizes)
    generator = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        value = generator.normal(size=variable.shape)
        # Scales of norms are 1, or 0 where 1 is added to them.
        is_scale = len(variable.shape) == 1
        old = ops.convert_to_numpy(variable)
        variable.assign(old + 0.1 * value if is_scale else 0.5 * value)
    model = getattr(keras_hub.models, f"{prefix}CausalLM")(preprocessor=None, backbone=backbone)
    model.compile(optimizer="sgd", sampler="greedy", jit_compile=QUICK_JIT)
    return model


def prompts(prompt_lengths, family=None):
    """Token ids with padding on the right, as a model of the family takes them."""
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (len(prompt_lengths), LENGTH))
    mask = np.arange(LENGTH) < np.array(prompt_lengths)[:, None]
    inputs = {"token_ids": np.where(mask, ids, 0), "padding_mask": mask.astype("int32")}
    if family == "gemma4":
        inputs["position_ids"] = np.broadcast_to(np.arange(LENGTH), ids.shape)
    return inputs


def logits_of(model, inputs):
    """Logits at all positions that are no padding."""
    return model.predict_on_batch(inputs)[inputs["padding_mask"].astype(bool)]


def assert_same_parameters(model, other, tolerance=0):
    for pair in zip(parameters_of(model), parameters_of(other), strict=True):
        assert_close(*map(ops.convert_to_numpy, pair), tolerance=tolerance)


@pytest.mark.parametrize("family", unless_compiled(FAMILIES, ["mixtral"]))
def test_a_sparse_model_computes_generates_and_learns_as_before(family):
    dense, sparse = causal_lm(family), convert.use_sparse_experts(causal_lm(family))
    assert inspection.moe_layers(sparse)
    sizes = [sum(np.prod(v.shape) for v in parameters_of(model)) for model in (sparse, dense)]
    assert sizes[0] == sizes[1]
    inputs = prompts((6, 4), family)
    before = logits_of(dense, inputs)
    assert_close(logits_of(sparse, inputs), before)
    if BACKEND == "torch":  # Eager calls take long to compile.
        num_routed = 12 if family in ("gpt_oss", "gemma4") else 10  # These give it no mask.
        for routings in inspection.record_routings(sparse, [inputs]).values():
            assert routings[0].mask.sum() == num_routed
    prompt = prompts((3, 2), family)
    tokens, expected = (
        model.generate(prompt, stop_token_ids=None)["token_ids"] for model in (sparse, dense)
    )
    np.testing.assert_array_equal(tokens, expected)
    # Without padding: KerasHub counts some of it in its load-balancing loss.
    inputs = prompts((LENGTH, LENGTH), family)
    for model in (dense, sparse):
        model.fit(inputs, inputs["token_ids"], verbose=0)
    assert_same_parameters(convert.restore(sparse), dense, tolerance=1e-5)
    assert not np.allclose(logits_of(dense, prompts((6, 4), family)), before, atol=1e-3)


@on_one_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_keras_hub_and_a_saved_model_is_sparse_again(family, tmp_path):
    model, blank = convert.use_sparse_experts(causal_lm(family)), causal_lm(family)
    model.save_weights(tmp_path / "sparse.weights.h5")
    for variable in blank.trainable_variables:
        variable.assign(ops.zeros(variable.shape))
    blank.load_weights(tmp_path / "sparse.weights.h5")
    assert_same_parameters(blank, causal_lm(family))

    loaded = saved_and_loaded(model, tmp_path)
    assert_same_parameters(loaded, model)
    assert list(inspection.moe_layers(loaded)) == list(inspection.moe_layers(model))

    model.backbone.save_to_preset(tmp_path / "preset")
    preset = sys.modules["keras_hub"].models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(preset) is type(blank.backbone)
    assert_same_parameters(preset, blank.backbone)


SAVED = Path(__file__).parent / "saved" / "keras_hub"


@on_one_backend
@pytest.mark.parametrize("change", ["converted", "upcycled"])
def test_models_that_version_0_2_has_changed_load_and_save(change, tmp_path):
    pytest.importorskip("keras_hub")
    model = keras.saving.load_model(SAVED / f"{change}.keras", compile=False)
    inputs = prompts((6, 4))
    if change == "upcycled":
        ids = np.random.default_rng(0).integers(1, 12, (4, 6))
        inputs = {"token_ids": ids, "padding_mask": (ids > 2).astype("int32")}
    for each in (model, saved_and_loaded(model, tmp_path)):
        outputs = each.predict_on_batch(inputs)
        if change == "converted":
            outputs = outputs[inputs["padding_mask"].astype(bool)]
        np.testing.assert_allclose(outputs, np.load(SAVED / "expected.npz")[change], atol=1e-5)
        assert inspection.moe_layers(each)


@on_one_backend
def test_a_converted_model_is_upcycled_and_loads_with_both_changes(tmp_path):
    model, inputs = causal_lm("qwen3_moe"), prompts((6, 4))
    expected = logits_of(model, inputs)
    upcycle(convert.use_sparse_experts(model), num_experts=4)
    for each in (model, saved_and_loaded(model, tmp_path)):
        assert_close(logits_of(each, inputs), expected)
        assert len(inspection.moe_layers(each)) == 2


@on_one_backend
def test_a_block_is_freed_before_the_next_is_converted(monkeypatch):
    from keras_moe.convert import keras_hub

    model, alive, convert_block = causal_lm("gemma4"), [], keras_hub.sparse_layers
    banks = [
        weakref.ref(block.moe_expert_bank.gate_proj) for block in model.backbone.transformer_layers
    ]

    def counting(*arguments):
        alive.append(sum(bank() is not None for bank in banks))
        return convert_block(*arguments)

    monkeypatch.setattr(keras_hub, "sparse_layers", counting)
    convert.use_sparse_experts(model)
    assert alive == [2, 1]


@on_one_backend
def test_layers_that_are_frozen_remain_so():
    model = causal_lm("qwen_moe")
    model.backbone.transformer_layers[0].trainable = False
    count = len(model.trainable_variables)
    assert len(convert.use_sparse_experts(model).trainable_variables) == count
    assert len(convert.restore(model).trainable_variables) == count
    model = convert.use_sparse_experts(causal_lm("mixtral"))
    model.backbone.enable_lora(2)
    names = {variable.name for variable in model.backbone.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}


@on_one_backend
def test_a_model_is_converted_once_before_it_is_quantized_and_keeps_its_numbers():
    model = convert.use_sparse_experts(causal_lm("mixtral"))
    (layer,) = inspection.moe_layers(model).values()
    assert list(inspection.moe_layers(convert.use_sparse_experts(model)).values()) == [layer]
    for change in (
        lambda: surgery.set_top_k(layer, 1),
        lambda: surgery.prune_experts(layer, np.ones(4), keep=2),
    ):
        with pytest.raises(ValueError, match="made by `convert.use_sparse_experts`"):
            change()
    model = causal_lm("mixtral")
    block = model.backbone.transformer_layers[0]._sparse_moe_block
    block._sparse_feedforward_gate_dense.quantize("int8")
    with pytest.raises(ValueError, match="before it is quantized or has LoRA"):
        convert.use_sparse_experts(model)


@on_one_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_pruned_saved_loaded_and_restored(family, tmp_path):
    model, inputs = convert.use_sparse_experts(causal_lm(family)), prompts((6, 4), family)
    frozen = next(iter(inspection.moe_layers(model).values())).router
    frozen.trainable = False
    report = surgery.prune_experts(model, by=np.arange(4), keep=3)
    assert all(experts == [[1], [2], [3]] for experts in report.experts.values())
    surgery.set_top_k(model, 3)
    routers = [each.router for each in inspection.moe_layers(model).values()]
    assert [each.trainable for each in routers] == [False, *[True] * (len(routers) - 1)]
    expected = logits_of(model, inputs)
    loaded = saved_and_loaded(model, tmp_path)
    for each in inspection.moe_layers(loaded).values():
        assert (each.experts.num_experts, each.router.top_k) == (3, 3)
    np.testing.assert_array_equal(logits_of(loaded, inputs), expected)
    # The order of restored experts may differ in rounding alone.
    assert_close(logits_of(convert.restore(model), inputs), expected)


@on_one_backend
def test_a_converted_model_grows(tmp_path):
    model, inputs = convert.use_sparse_experts(causal_lm("mixtral")), prompts((6, 4), "mixtral")
    expected = logits_of(model, inputs)
    surgery.add_experts(model, factor=2, noise=0.0)
    surgery.set_top_k(model, 4)
    for each in (saved_and_loaded(model, tmp_path), convert.restore(model)):
        assert_close(logits_of(each, inputs), expected)


@on_one_backend
@pytest.mark.parametrize("family", ["mixtral", "gemma4"])
def test_equal_experts_of_a_converted_model_merge_without_loss(family):
    model, inputs = convert.use_sparse_experts(causal_lm(family)), prompts((6, 4), family)
    for layer in inspection.moe_layers(model).values():
        layer.router.kernel.assign(ops.convert_to_numpy(layer.router.kernel)[:, [0, 0, 2, 2]])
        for weight in layer.experts.weights:
            value = ops.convert_to_numpy(weight)[[0, 0, 2, 2]]
            if weight.name == "output_scale":
                value *= [1, 2, 1, 2]
            if weight.name == "down_kernel" and family == "gemma4":
                value[1::2] /= 2
            weight.assign(value)
    whole = logits_of(model, inputs)
    for layer in inspection.moe_layers(model).values():
        merge(layer.experts, [[0, 1], [2, 3]], np.ones(4))
    assert_close(logits_of(model, inputs), whole)
    surgery.merge_experts(model, keep=3, data=[inputs])
    assert np.isfinite(logits_of(model, inputs)).all()


@on_one_backend
def test_measures_of_converted_experts_include_the_scale_of_their_outputs():
    model, data = convert.use_sparse_experts(causal_lm("gemma4")), [prompts((6, 4), "gemma4")]
    mixtures = inspection.moe_layers(model)
    name, layer = list(mixtures.items())[-1]
    before = importance("contribution", model, mixtures, data)[name]
    layer.experts.output_scale.assign(2 * layer.experts.output_scale)
    assert_close(importance("contribution", model, mixtures, data)[name], 2 * before)


@on_one_backend
def test_converted_layers_keep_one_number_of_experts():
    model = convert.use_sparse_experts(causal_lm("gemma4"))
    first = next(iter(inspection.moe_layers(model)))
    before = model.count_params()
    with pytest.raises(ValueError, match="must keep one number"):
        surgery.prune_experts(model, np.ones(4), keep={first: 2})
    assert model.count_params() == before


@on_one_backend
@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
@pytest.mark.parametrize("change", ["quantize", "lora"])
def test_files_and_restored_models_compute_as_the_experts(change, tmp_path):
    model = convert.use_sparse_experts(causal_lm("mixtral"))
    inputs = prompts((LENGTH, LENGTH))
    for layer in inspection.moe_layers(model).values():
        if change == "quantize":
            layer.experts.quantize("int8")
        else:
            layer.experts.enable_lora(2, b_initializer="glorot_uniform")
    expected = logits_of(model, inputs)
    model.save_weights(tmp_path / "sparse.weights.h5")
    dense = causal_lm("mixtral")
    dense.load_weights(tmp_path / "sparse.weights.h5")
    np.testing.assert_allclose(logits_of(dense, inputs), expected, atol=1e-5)
    np.testing.assert_allclose(logits_of(convert.restore(model), inputs), expected, atol=1e-5)
