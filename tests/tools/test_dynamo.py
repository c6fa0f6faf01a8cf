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
