"""What Dynamo traces, which takes long: strict exported programs, and `torch.compile`."""

import keras
import pytest
from backends import assert_close, on_one_backend, to_numpy
from test_export import BATCHES, D, E, S, assert_serves, batch, with_every_layer

from benchmarks.exported import PROGRAMS
from keras_moe import layers

# What exporters warn of is not about this package.
pytestmark = [on_one_backend, pytest.mark.filterwarnings("ignore")]


def test_a_strict_program_serves_batches_of_sizes_not_seen_at_export(tmp_path):
    keras.utils.set_random_seed(3)
    assert_serves(with_every_layer((), ()), PROGRAMS["torch.export strict"], tmp_path)


def test_torch_compile_computes_the_same():
    import torch

    keras.utils.set_random_seed(0)
    model = layers.MixtureOfExperts(layers.GatedExperts(E, 16))
    model.build((None, S, D))
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for size in BATCHES:
        outputs = compiled(torch.tensor(batch(size)))
        assert_close(to_numpy(outputs), to_numpy(model(batch(size))))


def test_inductor_computes_the_same_gradients(monkeypatch, tmp_path):
    import torch

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Processes for so little would take longer to start.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch.compiler.reset()
    keras.utils.set_random_seed(0)
    mixture = layers.MixtureOfExperts(layers.GatedExperts(E, 16))
    model = keras.Sequential([keras.Input((S, D)), mixture, keras.layers.Dense(D, "gelu")])
    inputs = torch.tensor(batch(9))

    def gradients(call):
        loss = (call(inputs, training=True) ** 2).mean() + sum(model.losses)
        return torch.autograd.grad(loss, [each.value for each in model.trainable_variables])

    for compiled, eager in zip(gradients(torch.compile(model)), gradients(model), strict=True):
        assert_close(to_numpy(compiled), to_numpy(eager))
