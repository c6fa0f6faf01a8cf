"""Generated text of a language model of SmolLM2's size, dense and upcycled, in floats and integers.

    KERAS_BACKEND=jax taskset -c 1 python -m benchmarks.generation

`generate` of KerasHub's Llama with drawn weights, in CPU time of a token. `MB` is the size of
the weights, `difference` the largest of the logits to the dense model's, by their standard
deviation. Two of "4 halves" are as wide as the dense layer, two of "4 copies" twice as wide.
"""

import functools
import itertools
import re
import time

import keras
import numpy as np
from keras import ops

import keras_moe
from benchmarks.measure import BACKEND, describe, interleave, parse, parser, publish, say, summarise

UPCYCLED = {
    "4 halves": {"num_experts": 4, "top_k": 2, "granularity": 2},
    "4 copies": {"num_experts": 4, "top_k": 2},
    "8 copies": {"num_experts": 8, "top_k": 2},
}
MODELS = ("dense", *UPCYCLED)
PROMPT, LENGTH = 8, 40


def main(arguments=None):
    options = parser(__doc__, features=576, hidden=1536, rounds=5)
    options.add_argument("--blocks", type=int, default=30)
    options.add_argument("--vocabulary", type=int, default=49152)
    options.add_argument("--prompts", type=int, nargs="+", default=[1, 8], help="in a batch")
    options.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options.add_argument("--modes", nargs="+", default=["float32", "int8", "int4"])
    smoke = {"features": 18, "hidden": 32, "blocks": 1, "vocabulary": 32, "prompts": [2]}
    options = parse(options, arguments, **smoke)
    rows = []
    for number, mode in itertools.product(options.prompts, options.modes):
        inputs = prompts(number, options.vocabulary)
        runs, about, expected = {}, {}, None
        for name in ("dense", *(name for name in options.models if name != "dense")):
            say(f"building {name}, {mode}")
            model = language_model(name, mode, options)
            logits = ops.convert_to_numpy(model(inputs))
            expected = logits if expected is None else expected
            about[name] = {
                "prompts": number,
                "mode": mode,
                "MB": float(sum(map(size, model.weights))) / 1e6,
                "difference": float(np.abs(logits - expected).max() / expected.std()),
            }
            runs[name] = functools.partial(model.generate, inputs, stop_token_ids=None)
        times, first = interleave(runs, options.rounds, time.process_time)
        times = {name: each / (LENGTH - PROMPT) for name, each in times.items()}
        rows += [{**row, **about[row["name"]]} for row in summarise(times, first, "dense")]
    return publish(f"generation-{BACKEND}", f"{describe(options)}, a token", options, rows)


def language_model(name, mode, options):
    from keras_hub.models import LlamaBackbone, LlamaCausalLM

    keras.utils.set_random_seed(0)
    backbone = LlamaBackbone(
        vocabulary_size=options.vocabulary,
        num_layers=options.blocks,
        num_query_heads=9,
        num_key_value_heads=3,
        hidden_dim=options.features,
        intermediate_dim=options.hidden,
        tie_word_embeddings=True,
    )
    model = LlamaCausalLM(backbone, preprocessor=None)
    if name != "dense":
        keras_moe.upcycle(model, seed=0, **UPCYCLED[name])
    if mode != "float32":
        model.quantize(mode)
    model.compile(sampler="greedy", jit_compile=options.xla)
    return model


def prompts(number, vocabulary):
    ids = np.random.default_rng(0).integers(1, vocabulary, (number, LENGTH))
    is_given = np.broadcast_to(np.arange(LENGTH) < PROMPT, ids.shape).astype("int32")
    return {"token_ids": ids * is_given, "padding_mask": is_given}


def size(weight):
    """Bytes of a weight."""
    bits = int(re.search(r"\d+", weight.dtype)[0]) if weight.dtype != "bool" else 8
    return np.prod(weight.shape) * bits / 8


if __name__ == "__main__":
    main()
