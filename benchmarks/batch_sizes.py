"""Batches of 1 to 64 tokens in random order: how often is compiled, and how much memory grows.

    KERAS_BACKEND=jax python -m benchmarks.batch_sizes

A text of each length from 1 to T is one batch, once in a pass, and passes follow in other orders.
In every second row texts are padded, with a mask, to the next of a few lengths. Each row is a fresh
process that calls the model of `benchmarks.tagger`, with one mixture, by `train_on_batch` or
`predict_on_batch`, or the mixture by itself, eagerly. The columns:

- traces: how often Python ran the mixture; eager calls have none.
- compiled, compiled_later: programs of XLA in the first pass, and after it.
- first_mb: by how much the resident memory grows in the first pass.
- kb_per_1000: by how much it grows in 1,000 calls after the first two passes, a line through all.
- ms: the median call after the first pass.
"""

import functools
import itertools

import keras
import numpy as np

from benchmarks.measure import BACKEND, milliseconds, parse, parser, publish, say
from benchmarks.observed import compilations, growth_kb, in_observed_process, resident_mb
from benchmarks.tagger import MIXTURE, compiled_tagger, feedforwards, texts
from keras_moe.inspection.recording import listening

CALLS = ("train", "predict", "layer")
PADDED = (False, True)


def main(arguments=None):
    options = parser(__doc__, tokens=[64], features=16, hidden=32, experts=[8])
    options.add_argument("--calls", nargs="+", default=CALLS, choices=CALLS)
    options.add_argument("--passes", type=int, default=20)
    options.add_argument("--buckets", type=int, nargs="+", default=[8, 16, 32, 64])
    options = parse(options, arguments, tokens=[4], buckets=[2, 4], passes=4)
    title = (
        f"{BACKEND}{' without XLA' * options.no_xla}, batches of 1 to {options.tokens[0]} tokens"
    )
    rows = []
    for call, padded in itertools.product(options.calls, PADDED):
        rows.append(in_observed_process(examine, options, call, padded))
        # Compilation takes long: what is measured is kept, should a later row be interrupted.
        publish(f"batch_sizes-{BACKEND}", title, options, rows)
    return rows


def examine(options, call, padded, dump):
    """The row of one call."""
    (num_tokens,) = options.tokens
    mixture, _ = feedforwards(MIXTURE, options)
    model = compiled_tagger([mixture], options)
    run = {
        "train": model.train_on_batch,
        "predict": lambda ids, classes: model.predict_on_batch(ids),
        "layer": functools.partial(call_layer, mixture, model.layers[1]),
    }[call]
    compiled, resident, times, traces = [compilations(dump)], [resident_mb()], [], []
    with listening({mixture: lambda *_: traces.append(call)}):
        for number in range(options.passes):
            say(".", end="" if number + 1 < options.passes else "\n")
            batches = batches_of(number, padded, options)
            times += [milliseconds(functools.partial(run, *batch)) for batch in batches]
            compiled.append(compilations(dump))
            resident.append(resident_mb())
    row = {
        "name": call,
        "lengths": "buckets" if padded else "all",
        "compiled": compiled[1] - compiled[0],
        "compiled_later": compiled[-1] - compiled[1],
        "first_mb": resident[1] - resident[0],
        "kb_per_1000": growth_kb(resident[2:], num_tokens),
        "ms": float(np.median(times[num_tokens:])),
    }
    if call != "layer" and BACKEND != "torch":
        row["traces"] = len(traces)
    return row


def batches_of(number, padded, options):
    """For one pass a list of batches: texts and their classes, (1, length) each."""
    (longest,) = options.tokens
    lengths = np.random.default_rng(number).permutation(longest) + 1
    batches = [texts(1, length, seed=number) for length in lengths]
    if padded:
        batches = [[pad(each, options.buckets) for each in batch] for batch in batches]
    return batches


def pad(ids, buckets):
    """Ids (batch, length) with zeros after them, up to the next length in `buckets`."""
    length = min(bucket for bucket in buckets if bucket >= ids.shape[1])
    return np.pad(ids, ((0, 0), (0, length - ids.shape[1])))


def call_layer(layer, embedding, ids, classes):
    """Call a layer with the model's own embedding and mask, as it would meet them."""
    # By NumPy, so that nothing but the layer is compiled.
    tokens = keras.ops.convert_to_numpy(embedding.embeddings)[ids]
    mask = keras.ops.convert_to_tensor(ids != 0)
    keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(tokens), mask=mask))


if __name__ == "__main__":
    main()
