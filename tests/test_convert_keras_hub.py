"""Models of KerasHub compute the same with our layers in them, and can be saved and restored."""

import keras
import numpy as np
import pytest
from conftest import assert_close
from keras import ops

from keras_moe import convert, inspection
from keras_moe.parameters import parameters_of

keras_hub = pytest.importorskip("keras_hub")

from keras_hub_models import FAMILIES, causal_lm, prompts  # noqa: E402

pytestmark = [
    # `compile` of KerasHub's models is their own, which Keras does not call while it loads.
    pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called:UserWarning"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning"),
]
LENGTH = 6
each_family = pytest.mark.parametrize("family", FAMILIES)


def logits_of(model, inputs):
    """Logits at all positions that are no padding."""
    return model.predict_on_batch(inputs)[inputs["padding_mask"].astype(bool)]


def arrays(model):
    return [ops.convert_to_numpy(variable) for variable in parameters_of(model)]


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
    assert sum(np.prod(v.shape) for v in parameters_of(sparse)) == dense.count_params()
    inputs = prompts(LENGTH, (6, 4))
    before = logits_of(dense, inputs)
    assert_close(logits_of(sparse, inputs), before)
    prompt = prompts(LENGTH, (3, 2))
    tokens, expected = (
        model.generate(prompt, stop_token_ids=None)["token_ids"] for model in (sparse, dense)
    )
    np.testing.assert_array_equal(tokens, expected)
    # Without padding: KerasHub counts some of it in its load-balancing loss.
    inputs = prompts(LENGTH, (LENGTH, LENGTH))
    for model in (dense, sparse):
        model.fit(inputs, inputs["token_ids"], verbose=0)
    assert_same_parameters(convert.restore(sparse), dense, tolerance=1e-5)
    assert not np.allclose(logits_of(dense, prompts(LENGTH, (6, 4))), before, atol=1e-3)


@each_family
def test_files_are_those_of_keras_hub_and_a_saved_model_is_sparse_again(family, tmp_path):
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
