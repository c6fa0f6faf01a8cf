"""One training step of a whole Transformer against its dense twin.

    KERAS_BACKEND=jax python -m benchmarks.model

A text classifier of two encoder blocks, trained by Adam through `train_on_batch`: attention,
embedding, loss, optimizer and the data's way in count on both sides. The twin has a dense
feed-forward layer of width K * H in each block. T is the tokens of a batch; give one.
"""

import functools

import keras
import numpy as np

from benchmarks.contestants import contest
from benchmarks.measure import BACKEND, describe, interleave, parse, parser, publish, summarise
from keras_moe import layers

BLOCKS, HEADS, WORDS, CLASSES = 2, 4, 1000, 20


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=256, help="tokens of one text")
    options = parse(options, arguments, length=8)
    batch, steps = batch_of(options), {}
    for name, feedforward in contest(options).items():
        model = compiled_transformer(feedforward, options, BLOCKS)
        steps[name] = functools.partial(model.train_on_batch, *batch)
    rows = summarise(*interleave(steps, options.rounds), "dense twin")
    title = f"{describe(options)}, training step of {BLOCKS} blocks, batch {batch[0].shape}"
    return publish(f"model-{BACKEND}", title, options, rows)


def batch_of(options):
    """Texts and their classes."""
    generator = np.random.default_rng(0)
    (num_tokens,) = options.tokens
    ids = generator.integers(0, WORDS, (num_tokens // options.length, options.length))
    return ids, generator.integers(0, CLASSES, len(ids))


def compiled_transformer(feedforward, options, blocks):
    """A classifier of texts with `feedforward()` in each of its blocks."""
    ids = keras.Input((options.length,), dtype="int32")
    x = keras.layers.Embedding(WORDS, options.features)(ids)
    for _ in range(blocks):
        x = layers.TransformerEncoderBlock(HEADS, feedforward())(x)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    model = keras.Model(ids, keras.layers.Dense(CLASSES, dtype="float32")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, jit_compile=options.xla)
    return model


if __name__ == "__main__":
    main()
