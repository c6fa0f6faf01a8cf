"""Optimizers on stacked kernels: as if each expert had kernels of its own."""

import keras
import numpy as np
import pytest
from backends import (
    assert_close,
    on_each_backend,
    on_one_backend,
    saved_and_loaded,
    to_numpy,
    unless_compiled,
)
from layer_checks import D, model_of, normal

from keras_moe import layers, optimizers

pytestmark = on_one_backend

E, H, RANK = 3, 12, 2


def stepped(optimizer, variables, gradients):
    """The values of variables after a few steps."""
    for each in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in each], variables)
    return list(map(to_numpy, variables))


@on_each_backend
@pytest.mark.parametrize(
    "options", unless_compiled([{}, {"rms_rate": None, "nesterov": False}], [{}])
)
def test_a_stack_is_trained_as_single_kernels(options):
    bank = layers.GatedExperts(E, H)
    bank.build((None, D))
    stacks = bank.trainable_variables
    kernels = [keras.Variable(part, name="kernel") for each in stacks for part in to_numpy(each)]
    gradients = [[normal(*each.shape, seed=3 * n) for each in stacks] for n in range(3)]
    of_kernels = [[part for each in step for part in each] for step in gradients]
    ours = stepped(optimizers.Muon(0.02, **options), stacks, gradients)
    theirs = stepped(keras.optimizers.Muon(0.02, **options), kernels, of_kernels)
    assert_close(
        np.concatenate([part for each in ours for part in each], None),
        np.concatenate([each.ravel() for each in theirs]),
    )


class NamedExperts(layers.StackedExperts):
    def widths(self, features):
        return {"first": (features, H), "gain": (H,), "second": (H, features)}

    def network(self, rows, linear):
        return linear("second", linear("first", rows) * linear("gain"))


def test_maps_may_have_any_names():
    bank = NamedExperts(E)
    bank.build((None, D))
    optimizer = optimizers.Muon()
    optimizer.build(bank.trainable_variables)
    by_muon = [velocity is None for velocity in optimizer.adam_velocities]
    assert by_muon == [each.name.endswith("_kernel") for each in bank.trainable_variables]


def test_what_is_no_stack_is_trained_as_by_keras():
    """Attention's kernels of three axes, embeddings, norms, and what is excluded."""
    ids = keras.Input((4,), dtype="int32")
    tokens = keras.layers.Embedding(10, D)(ids)
    bank = layers.ZeroComputationExperts(layers.FeedForwardExperts(E, H), num_constant=2)
    block = layers.TransformerEncoderBlock(2, layers.MixtureOfExperts(bank))
    model = keras.Model(ids, keras.layers.Dense(1)(block(tokens)))
    bank.experts.enable_lora(RANK)
    used = {}
    for cls in (optimizers.Muon, keras.optimizers.Muon):
        optimizer = cls(exclude_layers=["down_lora_a"])
        optimizer.build(model.trainable_variables)
        used[cls] = [velocity is None for velocity in optimizer.adam_velocities]
    by_muon = set()
    for variable, ours, theirs in zip(model.trainable_variables, *used.values()):
        if any(variable is each for each in bank.trainable_variables):
            by_muon |= {variable.name} if ours else set()
        else:
            assert ours == theirs, variable.path
    assert by_muon == {"up_lora_a", "up_lora_b", "down_lora_b"}


def test_a_model_is_trained_and_resumed(tmp_path):
    bank = layers.GatedExperts(E, H)
    model = model_of(layers.MixtureOfExperts(bank), optimizer=optimizers.Muon(0.01))
    x, y = normal(16, D), normal(16, D)
    model.fit(x, y, epochs=2, verbose=0)
    loaded = saved_and_loaded(model, tmp_path)
    assert type(loaded.optimizer) is optimizers.Muon
    for each in (model, loaded):
        each.fit(x, y, verbose=0, shuffle=False)
    for ours, theirs in zip(model.trainable_variables, loaded.trainable_variables):
        assert_close(to_numpy(theirs), to_numpy(ours), scale=1.0)
