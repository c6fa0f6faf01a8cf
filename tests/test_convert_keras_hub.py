"""Models of KerasHub compute the same with our layers in them, and can be saved and restored."""

import gc
import os
import pathlib
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
from backends import BACKEND, assert_close, unless_compiled
from keras import ops
from keras_hub_models import FAMILIES, causal_lm, prompts

from keras_moe import convert, inspection, surgery
from keras_moe._internal.parameters import parameters_of

pytestmark = [
    # `compile` of KerasHub's models is their own, which Keras does not call while it loads.
    pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called:UserWarning"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning"),
]
ROOT = pathlib.Path(__file__).parents[1]
LENGTH = 6
each_family = pytest.mark.parametrize("family", unless_compiled(FAMILIES, ["mixtral", "gpt_oss"]))


@pytest.fixture(autouse=True, scope="module")
def keras_hub():
    """It takes seconds to import, in each process that collects tests."""
    return pytest.importorskip("keras_hub")


def logits_of(model, inputs):
    """Logits at all positions that are no padding."""
    return model.predict_on_batch(inputs)[inputs["padding_mask"].astype(bool)]


def assert_same_parameters(model, other, tolerance=0):
    pairs = list(zip(parameters_of(model), parameters_of(other), strict=True))
    for variable, expected in pairs:
        assert_close(
            ops.convert_to_numpy(variable), ops.convert_to_numpy(expected), tolerance=tolerance
        )


@each_family
def test_a_sparse_model_computes_generates_and_learns_as_before(family):
    dense, sparse = causal_lm(family), convert.sparsify(causal_lm(family))
    assert inspection.moe_layers(sparse)
    sizes = [sum(np.prod(v.shape) for v in parameters_of(model)) for model in (sparse, dense)]
    assert sizes[0] == sizes[1]
    inputs = prompts(LENGTH, (6, 4), family)
    before = logits_of(dense, inputs)
    assert_close(logits_of(sparse, inputs), before)
    prompt = prompts(LENGTH, (3, 2), family)
    tokens, expected = (
        model.generate(prompt, stop_token_ids=None)["token_ids"] for model in (sparse, dense)
    )
    np.testing.assert_array_equal(tokens, expected)
    # Without padding: KerasHub counts some of it in its load-balancing loss.
    inputs = prompts(LENGTH, (LENGTH, LENGTH), family)
    for model in (dense, sparse):
        model.fit(inputs, inputs["token_ids"], verbose=0)
    assert_same_parameters(convert.restore(sparse), dense, tolerance=1e-5)
    assert not np.allclose(logits_of(dense, prompts(LENGTH, (6, 4), family)), before, atol=1e-3)


@each_family
def test_files_are_those_of_keras_hub_and_a_saved_model_is_sparse_again(
    family, keras_hub, tmp_path
):
    model, blank = convert.sparsify(causal_lm(family)), causal_lm(family)
    model.save_weights(tmp_path / "sparse.weights.h5")
    for variable in blank.trainable_variables:
        variable.assign(ops.zeros(variable.shape))
    blank.load_weights(tmp_path / "sparse.weights.h5")
    assert_same_parameters(blank, causal_lm(family))

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_parameters(loaded, model)
    assert list(inspection.moe_layers(loaded)) == list(inspection.moe_layers(model))

    model.backbone.save_to_preset(tmp_path / "preset")
    preset = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(preset) is type(blank.backbone)
    assert_same_parameters(preset, blank.backbone)


@pytest.mark.backends("torch")
def test_a_saved_model_is_sparse_in_a_process_of_its_own(tmp_path):
    model = convert.sparsify(causal_lm("gpt_oss"))
    model.save(tmp_path / "model.keras")
    inputs = prompts(LENGTH, (6, 4))
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = (
        "import keras, numpy, keras_moe\n"
        "model = keras.saving.load_model('model.keras')\n"
        "assert keras_moe.inspection.moe_layers(model)\n"
        "numpy.save('logits.npy', model.predict_on_batch(dict(numpy.load('inputs.npz'))))\n"
    )
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    logits = np.load(tmp_path / "logits.npy")[inputs["padding_mask"].astype(bool)]
    assert_close(logits, logits_of(model, inputs))


def test_old_weights_do_not_stay_behind():
    model = causal_lm("mixtral")
    (block,) = (layer.expert_bank for layer in model._flatten_layers() if _has_bank(layer))
    kernels = [weakref.ref(weight) for weight in block.weights]
    if BACKEND == "torch":  # whose tensors are copied
        kernels += [weakref.ref(weight.value) for weight in block.weights]
    del block
    convert.sparsify(model)
    gc.collect()
    assert all(kernel() is None for kernel in kernels)
    (mixture,) = inspection.moe_layers(model).values()
    kernels = [weakref.ref(weight) for weight in mixture.weights]
    del mixture
    convert.restore(model)
    gc.collect()
    assert all(kernel() is None for kernel in kernels)


def _has_bank(layer):
    return hasattr(layer, "expert_bank")


@pytest.mark.parametrize(
    "family, is_told", [("mixtral", True), ("qwen3_moe", True), ("gpt_oss", False)]
)
def test_padding_is_not_routed_where_the_block_is_given_a_mask(family, is_told):
    model = convert.sparsify(causal_lm(family))
    inputs = prompts(LENGTH, (6, 2))
    (routings,) = inspection.record_routings(model, [inputs]).values()
    real = np.ones((2, LENGTH), bool) if not is_told else inputs["padding_mask"].astype(bool)
    np.testing.assert_array_equal(np.concatenate([r.mask for r in routings]), real.reshape(-1))


def test_lora_of_keras_hub_trains_its_factors_alone():
    model = convert.sparsify(causal_lm("mixtral"))
    model.backbone.enable_lora(2)
    names = {variable.name for variable in model.backbone.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}
    before = [ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    inputs = prompts(LENGTH, (LENGTH, LENGTH))
    model.compile("sgd")
    model.fit(inputs, inputs["token_ids"], verbose=0)
    changed = [
        not np.array_equal(ops.convert_to_numpy(variable), old)
        for variable, old in zip(model.trainable_variables, before)
    ]
    assert sum(changed) == len(changed) / 2  # the factors that begin at zero


def test_layers_that_are_frozen_remain_so():
    model = causal_lm("qwen_moe")
    model.backbone.transformer_layers[0].trainable = False
    count = len(model.trainable_variables)
    assert len(convert.sparsify(model).trainable_variables) == count
    assert len(convert.restore(model).trainable_variables) == count


def test_other_models_are_refused_and_converting_twice_changes_nothing():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="must have a MoE block of KerasHub"):
        convert.sparsify(model)
    with pytest.raises(ValueError, match="must have been converted by `sparsify`"):
        convert.restore(model)
    model = causal_lm("mixtral")
    (layer,) = inspection.moe_layers(convert.sparsify(model)).values()
    assert list(inspection.moe_layers(convert.sparsify(model)).values()) == [layer]
    model = causal_lm("mixtral")
    block = model.backbone.transformer_layers[0]._sparse_moe_block
    block._sparse_feedforward_gate_dense.quantize("int8")
    with pytest.raises(ValueError, match="before it is quantized"):
        convert.sparsify(model)


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
@pytest.mark.parametrize("change", ["quantize", "lora"])
def test_files_and_the_way_back_have_what_the_experts_compute(change, tmp_path):
    model = convert.sparsify(causal_lm("mixtral"))
    inputs = prompts(LENGTH, (LENGTH, LENGTH))
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


def test_the_numbers_of_a_converted_model_are_those_of_its_config():
    model = convert.sparsify(causal_lm("mixtral"))
    for operate in (
        lambda: surgery.set_top_k(model, 1),
        lambda: surgery.prune_experts(model, np.ones(4), keep=2),
    ):
        with pytest.raises(ValueError, match="made by `convert.sparsify`"):
            operate()
