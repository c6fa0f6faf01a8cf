"""A whole model of KerasHub before and after `convert.sparsify`: a training step, `generate`."""

import keras
import numpy as np

from benchmarks.measure import interleave, summarise
from keras_moe import convert

VOCABULARY, LENGTH, PROMPT, LAYERS = 1000, 64, 48, 2
DENSE, SPARSE = "KerasHub Mixtral model", "the same, sparsified"


def race(num_experts, num_tokens, options):
    """Rows for a step of training on about so many tokens, and for generating from them."""
    models = {DENSE: mixtral(num_experts, options), SPARSE: mixtral(num_experts, options)}
    models[SPARSE].set_weights(models[DENSE].get_weights())
    convert.sparsify(models[SPARSE])
    batch = prompts(max(1, num_tokens // LENGTH), LENGTH)
    logits = [model.predict_on_batch(batch) for model in models.values()]
    difference = float(np.max(np.abs(logits[0] - logits[1])))
    rows = []
    for what, run in (("fit step", train), ("generate", generate)):
        runs = {name: run(model, batch) for name, model in models.items()}
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
    has_xla = keras.backend.backend() != "torch" and not options.no_xla
    model.compile("sgd", sampler="greedy", jit_compile=has_xla)
    return model


def prompts(batch_size, real_length):
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (batch_size, LENGTH))
    mask = np.broadcast_to(np.arange(LENGTH) < real_length, ids.shape).astype("int32")
    return {"token_ids": ids * mask, "padding_mask": mask}


def train(model, batch):
    return lambda: model.train_on_batch(batch, batch["token_ids"])


def generate(model, batch):
    prompt = prompts(len(batch["token_ids"]), PROMPT)
    return lambda: model.generate(prompt, stop_token_ids=None)
