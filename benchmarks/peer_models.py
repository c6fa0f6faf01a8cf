"""A whole model of KerasHub before and after `convert.sparsify`: a training step, `generate`."""

import functools

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
