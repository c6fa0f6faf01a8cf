"""What it costs a training step to watch the experts.

    KERAS_BACKEND=jax python -m benchmarks.monitoring

Epochs of `fit` of the classifier of `benchmarks.model`: with layers that count nothing, with the
layers as they are, and with callbacks besides. T is the tokens of a batch, E the number of experts;
give one of each. A row's time is that of one step, an epoch's end included.
"""

import keras
import numpy as np

from benchmarks.contestants import mixture
from benchmarks.measure import interleave, print_table, summarise, write_json
from benchmarks.model import CLASSES, WORDS, compiled_transformer
from benchmarks.options import describe, parse, parser
from keras_moe import callbacks, layers

BLIND = "no counters"


def main(arguments=None):
    options = parse(_parser(), arguments, length=8, steps=2)
    (num_experts,), (num_tokens,) = options.experts, options.tokens
    generator = np.random.default_rng(0)
    shape = options.steps, num_tokens // options.length, options.length
    ids = generator.integers(0, WORDS, shape)
    batches = list(zip(ids, generator.integers(0, CLASSES, shape[:2])))

    def watched():
        return mixture(num_experts, options)

    seeing = compiled_transformer(watched, options)
    epochs = {
        BLIND: epoch(compiled_transformer(lambda: _blind(watched()), options), batches),
        "counters": epoch(seeing, batches),
        "ExpertMonitor": epoch(seeing, batches, callbacks.ExpertMonitor),
        "with ExpertHealth": epoch(
            seeing, batches, callbacks.ExpertMonitor, callbacks.ExpertHealth
        ),
    }
    times, first = interleave(epochs, options.rounds)
    rows = summarise({name: ms / options.steps for name, ms in times.items()}, first, BLIND)
    print_table(rows, f"{describe(options)} E={num_experts}, step of fit, T={num_tokens}")
    write_json(f"monitoring-{keras.backend.backend()}{options.tag}", options, rows)
    return rows


def _parser():
    # Small batches: what a step costs beside them shows most.
    options = parser(__doc__, experts=[8], tokens=[2048])
    options.add_argument("--length", type=int, default=256, help="tokens of one text")
    options.add_argument("--steps", type=int, default=10, help="steps of an epoch")
    return options


class _Blind(layers.MixtureOfExperts):
    def _count(self, routing, loss_values, training):
        pass


def _blind(layer):
    layer.__class__ = _Blind
    return layer


def epoch(model, batches, *watchers):
    """A function that trains for one epoch, with new callbacks of the classes given."""

    def run():
        model.fit(Batches(batches), shuffle=False, verbose=0, callbacks=[new() for new in watchers])

    return run


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


if __name__ == "__main__":
    main()
