"""Our layer of gated experts against the MoE blocks of other packages, with the same weights.

    KERAS_BACKEND=torch python -m benchmarks.peers --experts 8 64
    KERAS_BACKEND=torch python -m benchmarks.peers --models --tokens 1024 --tag -models

With `--models`, a whole model of KerasHub is measured before and after
`convert.use_sparse_experts`.
The packages come with the extra `bench`. A peer whose outputs differ from ours by more than 1e-5,
that is not installed, or that does not run here is not timed; its row says why. The ratio is its
time by ours: above 1 it is slower.
"""

import functools
import itertools

import keras
import numpy as np

from benchmarks.contestants import mixture, tokens
from benchmarks.measure import BACKEND, describe, interleave, parse, parser, publish, summarise
from benchmarks.rivals import RIVALS
from benchmarks.steps import compiled_step, to_tensor
from keras_moe import convert

TOLERANCE = 1e-5
# Of the whole models.
VOCABULARY, LENGTH, PROMPT, LAYERS = 1000, 64, 48, 2
DENSE, SPARSE = "KerasHub Mixtral model", "the same, converted"


def main(arguments=None):
    # Blocks that run all experts take seconds per step.
    options = parser(__doc__, gated=True, experts=[8, 32], rounds=3)
    options.add_argument("--models", action="store_true", help="whole models of KerasHub")
    options.add_argument("--peers", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    options = parse(options, arguments)
    rows = []
    for num_experts, num_tokens in itertools.product(options.experts, options.tokens):
        table = (race_models if options.models else race)(num_experts, num_tokens, options)
        rows += [{**row, "experts": num_experts, "tokens": num_tokens} for row in table]
    what = "a whole model" if options.models else "forward+backward"
    return publish(f"peers-{BACKEND}", f"{describe(options)}, {what}", options, rows)


def race(num_experts, num_tokens, options):
    ours = mixture(num_experts, options)
    inputs = tokens(num_tokens, options)
    contestants, errors, reasons = {"keras_moe": ours}, {}, {}
    for name in options.peers:
        try:
            contestants[name], errors[name] = admit(RIVALS[name], ours, inputs)
        except Exception as error:
            # Whatever keeps a peer from running is reported, and the others run.
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    steps = {
        name: compiled_step(layer, inputs, jit=options.xla) for name, layer in contestants.items()
    }
    rows = summarise(*interleave(steps, options.rounds), "keras_moe")
    rows = [{**row, "max_difference": errors.get(row["name"])} for row in rows]
    return rows + [{"name": name, "not timed": reason} for name, reason in reasons.items()]


def admit(rival, ours, inputs):
    """The rival with our weights, and the largest difference of an output."""
    backends, make = rival
    if BACKEND not in backends:
        raise NotImplementedError(f"runs on {', '.join(backends)}, not on {BACKEND}")
    layer = make(ours)
    difference = float(np.max(np.abs(infer(layer, inputs) - infer(ours, inputs))))
    # Not `>`, which a NaN would pass.
    if not difference <= TOLERANCE:
        raise ValueError(f"its outputs differ from ours by {difference:.1e}")
    return layer, difference


def infer(layer, inputs):
    """Outputs in inference."""
    outputs = layer(to_tensor(layer, inputs), training=False)
    return keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))


def race_models(num_experts, num_tokens, options):
    """Rows for a step of training on about so many tokens, and for generating from them."""
    models = {DENSE: mixtral(num_experts, options), SPARSE: mixtral(num_experts, options)}
    models[SPARSE].set_weights(models[DENSE].get_weights())
    convert.use_sparse_experts(models[SPARSE])
    batch_size = max(1, num_tokens // LENGTH)
    batch, prompt = prompts(batch_size, LENGTH), prompts(batch_size, PROMPT)
    logits = [model.predict_on_batch(batch) for model in models.values()]
    difference = float(np.max(np.abs(logits[0] - logits[1])))
    rows = []
    for what in ("fit step", "generate"):
        runs = {}
        for name, model in models.items():
            if what == "fit step":
                runs[name] = functools.partial(model.train_on_batch, batch, batch["token_ids"])
            else:
                runs[name] = functools.partial(model.generate, prompt, stop_token_ids=None)
        table = summarise(*interleave(runs, options.rounds), SPARSE)
        rows += [{**row, "what": what, "max_difference": difference} for row in table]
    return rows


def mixtral(num_experts, options):
    from keras_hub.models import MixtralBackbone, MixtralCausalLM

    backbone = MixtralBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=LAYERS,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=options.features,
        intermediate_dim=options.hidden,
        num_experts=num_experts,
        top_k=options.top_k,
    )
    model = MixtralCausalLM(backbone, preprocessor=None)
    model.compile("sgd", sampler="greedy", jit_compile=options.xla)
    return model


def prompts(batch_size, real_length):
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (batch_size, LENGTH))
    mask = np.broadcast_to(np.arange(LENGTH) < real_length, ids.shape).astype("int32")
    return {"token_ids": ids * mask, "padding_mask": mask}


if __name__ == "__main__":
    main()
