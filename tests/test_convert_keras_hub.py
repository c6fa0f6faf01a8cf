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
LENGTH, PROMPTS = 6, (6, 4)
each_family = pytest.mark.parametrize("family", FAMILIES)


def logits_of(model, inputs):
    """Logits at all positions that are no padding."""
    logits = ops.convert_to_numpy(model(inputs, training=False))
    return logits[inputs["padding_mask"].astype(bool)]


def generated(model):
    return model.generate(prompts(LENGTH, (3, 2)), stop_token_ids=None)["token_ids"]


def arrays(model):
    return [ops.convert_to_numpy(variable) for variable in parameters_of(model)]


@each_family
def test_a_sparse_model_computes_generates_and_learns_as_before(family):
    dense, sparse = causal_lm(family), convert.sparsify(causal_lm(family))
    inputs = prompts(LENGTH, PROMPTS)
    assert_close(logits_of(sparse, inputs), logits_of(dense, inputs))
    np.testing.assert_array_equal(generated(sparse), generated(dense))
    # Without padding: KerasHub counts some of it in its load-balancing loss.
    inputs = prompts(LENGTH, (LENGTH, LENGTH))
    for model in (dense, sparse):
        model.fit(inputs, inputs["token_ids"], verbose=0)
    convert.restore(sparse)
    assert sparse.count_params() == dense.count_params()
    for variable, expected, before in zip(arrays(sparse), arrays(dense), arrays(causal_lm(family))):
        assert_close(variable, expected)


@each_family
def test_a_saved_model_is_sparse_again_and_its_weights_are_those_of_keras_hub(family, tmp_path):
    model = convert.sparsify(causal_lm(family))
    inputs = prompts(LENGTH, PROMPTS)
    expected = logits_of(model, inputs)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(logits_of(loaded, inputs), expected)
    assert len(inspection.moe_layers(loaded)) == len(inspection.moe_layers(model))

    model.save_weights(tmp_path / "sparse.weights.h5")
    dense = causal_lm(family)
    for variable in dense.trainable_variables:
        variable.assign(ops.zeros(variable.shape))
    dense.load_weights(tmp_path / "sparse.weights.h5")
    assert_close(logits_of(dense, inputs), expected)
