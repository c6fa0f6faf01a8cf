"""Exported programs: each runs without this package, for batches of any size."""

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    FAST_MODE,
    ROOT,
    assert_close,
    compiled,
    on_one_backend,
    run_python,
    to_numpy,
)
from layer_checks import OF_LAYERS
from test_own_experts import OWN_BANKS

from benchmarks.exported import PROGRAMS
from keras_moe import layers, routers, surgery

S, D, E = 3, 8, 3
BATCHES = (1, 9)

# What exporters and their runtimes warn of is not about this package.
pytestmark = pytest.mark.filterwarnings("ignore")


# Programs that PyTorch cannot make of Keras's own attention, and so of no block.
WITHOUT_BLOCKS = ("onnx",) if BACKEND == "torch" else ()
BLOCKS = {layers.TransformerDecoderBlock, layers.TransformerEncoderBlock}


def with_every_layer(blocks, own_banks):
    """A model of sequences that has each exported layer once, and user-defined experts."""
    inputs = keras.Input((S, D))
    router = routers.TopKRouter(E, 1, score="sigmoid", balancer="loss_free")
    gated = layers.GatedExperts(E, 16, "gelu", use_bias=True)
    x = layers.MixtureOfExperts(gated, router, shared_expert=layers.GatedFeedForward(4))(inputs)
    x = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 16))(x)
    corrected = layers.LowRankExperts(layers.GatedExperts(1, 16), E, 2, b_initializer="normal")
    x = layers.MixtureOfExperts(corrected)(x)
    for bank in own_banks:
        x = layers.MixtureOfExperts(bank())(x)
    for block in blocks:
        x = block(2, keras.layers.Dense(D))(x)
    small = keras.Sequential([keras.layers.Dense(4, "relu"), keras.layers.Dense(D)])
    different = layers.LayerExperts([keras.layers.Dense(D), small])
    bank = layers.ZeroComputationExperts(different, num_zero=1, num_identity=1, num_constant=1)
    x = layers.MixtureOfExperts(bank)(x)
    narrow = layers.GatedExperts(E, 16, output_dim=5)
    of_tasks = layers.MultiGateMixtureOfExperts(narrow, 2, ["dense", "top_k"])(x)
    linear = layers.MixtureOfExperts(layers.LinearExperts(E, 4))
    _, single = linear(x, router_inputs=of_tasks[0], return_expert_outputs=True)
    x = keras.layers.Concatenate()([x, *of_tasks, keras.layers.Reshape((S, 8))(single)])
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert {*map(type, model._flatten_layers())} >= {*OF_LAYERS} - BLOCKS | {*blocks}
    return model


def batch(size):
    return np.random.default_rng(size).normal(size=(size, S, D)).astype("float32")


# `tools/test_dynamo.py` has strict ones.
@pytest.mark.parametrize("name", sorted({*PROGRAMS} - {"torch.export strict"}))
def test_a_program_serves_batches_of_sizes_not_seen_at_export(name, tmp_path):
    # With others a normalization of small numbers may multiply what is rounded by twenty.
    keras.utils.set_random_seed(3)
    blocks = () if name in WITHOUT_BLOCKS else sorted(BLOCKS, key=str)
    assert_serves(with_every_layer(blocks, OWN_BANKS), PROGRAMS[name], tmp_path)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    ("name", "mode"), [("litert", "int8"), ("litert", "int4"), ("onnx", "int8")]
)
def test_experts_in_integers_are_exported(name, mode, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((S, D))
    outputs = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 16))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(outputs))
    model.layers[1].experts.quantize(mode)
    equal = np.broadcast_to(batch(1)[:, :1], (64, S, D))  # one expert has no rows
    assert_serves(model, PROGRAMS[name], tmp_path, more=[equal])


@pytest.mark.backends("tensorflow")
def test_a_capacity_computed_at_inference_is_exported_to_onnx(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((S, D))
    choosing = routers.ExpertChoiceRouter(capacity_factor=0.7)
    x = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 16), choosing)(inputs)
    capacity = layers.Capacity(1.0, evaluation_factor=0.7, multiple_of=2)
    x = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 16), capacity_factor=capacity)(x)
    assert_serves(keras.Model(inputs, x), PROGRAMS["onnx"], tmp_path, more=[batch(7)])


@pytest.mark.backends("tensorflow", "torch")
def test_a_compiled_model_of_a_class_is_exported_after_surgery(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.moe = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 16))

        def call(self, inputs):
            return self.moe(inputs)

    model = Net()
    model.compile("sgd", "mse")
    model(batch(1))
    surgery.prune_experts(model, keep=2, data=[batch(9)])
    if BACKEND == "torch":
        import torch

        x = torch.from_numpy(batch(2))
        program = torch.export.export(model.eval(), (x,), strict=False).module()
        assert_close(to_numpy(program(x)), to_numpy(model(x)))
    else:
        model.export(tmp_path / "program", verbose=False)
        assert (tmp_path / "program" / "saved_model.pb").exists()


def assert_serves(model, program, tmp_path, more=()):
    inputs = {str(len(each)): each for each in (*map(batch, BATCHES), *more)}
    if BACKEND == "jax":  # which compiles each size
        whole = compiled(model, FAST_MODE)(np.concatenate(list(inputs.values())))
        parts = np.split(whole, np.cumsum(list(map(len, inputs.values())))[:-1])
        expected = dict(zip(inputs, parts))
    else:
        expected = {size: to_numpy(model(value)) for size, value in inputs.items()}
    path = tmp_path / f"model{program.ending}"
    program.export(model, str(path))
    np.savez(tmp_path / "inputs.npz", **inputs)
    script, files = ROOT / "benchmarks" / "runtimes.py", ("inputs.npz", "outputs.npz")
    # Without the folders of this package.
    run_python(script, program.runtime, path, *(tmp_path / each for each in files), PYTHONPATH="")
    with np.load(tmp_path / "outputs.npz") as outputs:
        for size in inputs:
            assert_close(outputs[size], expected[size])


@on_one_backend
def test_a_program_serves_sequences_of_lengths_not_seen_at_export():
    import torch

    model = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 16))
    model.build((None, None, D))
    sizes = [({axis: torch.export.Dim(name, min=1) for axis, name in enumerate(("B", "S"))},)]
    inputs = (torch.ones(2, 5, D),)
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=sizes, strict=False).module()
    for length in (1, 5, 9):
        inputs = torch.randn(3, length, D)
        assert_close(to_numpy(program(inputs)), to_numpy(model(inputs)))


@pytest.mark.backends("jax")
def test_a_program_of_jax_serves_sequences_of_any_length():
    import jax
    from jax import export

    model = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 16))
    model.build((None, None, D))
    shape = (*export.symbolic_shape("batch, length"), D)
    program = export.export(jax.jit(model))(jax.ShapeDtypeStruct(shape, "float32"))
    for length in (1, 9):
        inputs = np.random.default_rng(0).normal(size=(3, length, D)).astype("float32")
        assert_close(to_numpy(program.call(inputs)), to_numpy(model(inputs)))
