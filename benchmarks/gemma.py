"""Gemma 4 26B-A4B compiled ahead of time for eight chips: memory of a LoRA step.

    KERAS_BACKEND=jax python -m benchmarks.gemma --blocks keras_hub keras_moe

No TPU is needed, only the package `libtpu`. Nothing runs. The model has the layers of 26B-A4B, but
one or two of them: one with global attention, and one with local attention before it. Experts are
split over all chips, other weights are whole on each, and each chip has one sequence of `--tokens`
tokens. A step is a forward and backward pass in bfloat16 with LoRA on queries and values. The loss
over the vocabulary is compiled apart. The columns, of one chip:

- weights_gb: weights of all 30 layers and of the embedding.
- temp_gb: temporaries of a step of one layer.
- layer_gb: temporaries of a second layer.
- loss_gb: temporaries of the loss over the vocabulary and its gradient.
- plain_gb: estimate for 30 layers, weights + the larger of temp_gb and loss_gb + 29 layer_gb.
- remat_gb: the same where each layer is computed again in the backward pass and only its input is
  kept, 2 D bytes per token.
- longest, longest_remat: tokens per chip with which both estimates are 16 GB, between the lengths
  that were compiled, in steps of 64. 0 if the shortest needs more; at most the longest.

The sizes are an assumption: those of google/gemma-4-26B-A4B as publicly known, as the model's
`config.json` was not at hand. They sum to 25.2e9 parameters. `--remat` compiles the layers under
`keras.RematScope`, to check the estimate. XLA's own report of what did not fit is printed.
"""

import contextlib
import re
import time
from unittest import mock

import keras
import numpy as np

from benchmarks import chips
from benchmarks.measure import parse, parser, publish, say
from keras_moe import ops

NUM_LAYERS, CHIP_GB = 30, 16
SIZES = {
    "vocabulary_size": 262144,
    "num_query_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_dim": 2112,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 2,
    "sliding_window_size": 1024,
}
TINY = {
    **SIZES,
    "vocabulary_size": 64,
    "num_query_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_dim": 16,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
EXPERTS = r".*moe_expert_bank/(gate|up|down)_proj"


def main(arguments=None):
    options = parser(
        __doc__,
        tokens=[128, 1024, 4096],
        features=2816,
        hidden=704,
        experts=[128],
        top_k=8,
        dtype="bfloat16",
    )
    options.add_argument("--topology", default="v5e:2x4")
    options.add_argument("--blocks", nargs="+", default=["keras_hub", "keras_moe"])
    options.add_argument("--rank", type=int, default=8, help="of LoRA")
    options.add_argument("--lora-experts", action="store_true", help="LoRA on our experts as well")
    options.add_argument("--remat", action="store_true", help="recompute each layer")
    options = parse(options, arguments, topology="v5e:2x2", top_k=2)
    distribution = distribution_of(options)
    rows = [row for block in options.blocks for row in examine(block, distribution, options)]
    title = (
        f"Gemma 4 26B-A4B on {options.topology}, one sequence of `tokens` a chip, LoRA of rank "
        f"{options.rank}{' with remat' if options.remat else ''}"
    )
    return publish("gemma", title, options, rows)


def distribution_of(options):
    """Experts split over all chips, and one sequence on each."""
    from keras_moe.distribution import AXES, expert_parallel

    devices = chips.devices(options.topology)
    layouts = keras.distribution.LayoutMap(
        keras.distribution.DeviceMesh((1, len(devices)), AXES, devices)
    )
    layouts[EXPERTS] = ("expert", None, None)  # KerasHub's
    return expert_parallel(layout_map=layouts)


def examine(block, distribution, options):
    """Rows of KerasHub's block or ours, one for each number of tokens."""
    period = [*[LOCAL] * 5, GLOBAL]
    whole = build(block, distribution, NUM_LAYERS // len(period) * period, options)
    weights = sum(map(bytes_on_a_chip, whole.variables)) / 1e9
    rows = []
    for length in options.tokens:
        start = time.perf_counter()
        row = {"name": block, "tokens": length, "weights_gb": weights}
        try:
            one, two = (
                compile_step(block, distribution, types, length, options)
                for types in ([GLOBAL], [LOCAL, GLOBAL])
            )
            loss = compile_loss(whole.token_embedding, distribution, length, options)
            kept = 2 * length * options.features / 1e9
            fixed = weights + max(one, loss)
            row |= {"temp_gb": one, "layer_gb": two - one, "loss_gb": loss}
            row["plain_gb"] = fixed + (NUM_LAYERS - 1) * (two - one)
            row["remat_gb"] = fixed + (NUM_LAYERS - 1) * kept
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say(error)
            row["refused"] = "; ".join(re.findall(r"Used \S+ of \S+", str(error))) or "memory"
        rows.append({**row, "compile_s": time.perf_counter() - start})
    rows[-1] |= {"longest": longest(rows, "plain_gb"), "longest_remat": longest(rows, "remat_gb")}
    return rows


def longest(rows, column, step=64):
    """Tokens whose estimate is that of a chip, on straight lines between compiled lengths."""
    lengths, sizes = zip(*((row["tokens"], row[column]) for row in rows if column in row))
    if sizes[0] > CHIP_GB:
        return 0
    return int(np.interp(CHIP_GB, sizes, lengths)) // step * step


def build(block, distribution, layer_types, options):
    """A backbone with LoRA whose weights have shapes and layouts, but no values."""
    import keras_hub

    from keras_moe import convert
    from keras_moe.convert import keras_hub as conversion

    names = [f"decoder_block_{number}" for number in range(len(layer_types))]
    names += [f"{name}_mixture" for name in names]
    recomputed = keras.RematScope(mode="list_of_layers", layer_names=names)
    with (
        # There are none.
        mock.patch.object(conversion, "_give_weights"),
        keras.StatelessScope(initialize_variables=False),
        distribution.scope(),
        recomputed if options.remat else contextlib.nullcontext(),
    ):
        backbone = keras_hub.models.Gemma4Backbone(
            **(TINY if options.smoke else SIZES),
            image_size=896,
            num_layers=len(layer_types),
            layer_types=layer_types,
            hidden_dim=options.features,
            global_rope_partial_rotary_factor=0.25,
            final_logit_soft_cap=30.0,
            enable_moe_block=True,
            num_experts=options.experts[0],
            expert_intermediate_dim=options.hidden,
            num_experts_per_token=options.top_k,
            dtype=options.dtype,
        )
        if block == "keras_moe":
            convert.use_sparse_experts(backbone)
        names = backbone.default_lora_layer_names()
        backbone.enable_lora(options.rank, names + ["experts"] * options.lora_experts)
        for variable in backbone.variables:
            variable._layout = distribution.get_variable_layout(variable)
    return backbone


def compile_step(block, distribution, layer_types, length, options):
    """Gigabytes of temporaries of a step of a model with these layers."""
    import jax
    from keras_hub.src.models.gemma4 import gemma4_attention

    say(f"compiling {' and '.join(layer_types)} of {block}, {length} tokens per chip")
    backbone = build(block, distribution, layer_types, options)

    def loss(trainable, fixed, inputs):
        outputs, fixed, losses = backbone.stateless_call(
            trainable, fixed, inputs, training=True, return_losses=True
        )
        return outputs.astype("float32").sum() + sum(losses, 0.0), fixed

    tokens = data(distribution, (length,), "int32")
    inputs = dict.fromkeys(("token_ids", "padding_mask", "position_ids"), tokens)
    weights = (backbone.trainable_variables, backbone.non_trainable_variables)
    trainable, fixed = (list(map(described, each)) for each in weights)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), donate_argnums=1)
    # KerasHub's attention is another one where no TPU is.
    on_tpu = mock.patch.object(gemma4_attention, "running_on_tpu", return_value=True)
    with on_tpu, ops.platform("tpu"), distribution.scope():
        lowered = step.lower(trainable, fixed, inputs)
    return temporaries(lowered)


def compile_loss(embedding, distribution, length, options):
    """Gigabytes of temporaries of the loss and its gradient by the outputs of the layers."""
    import jax

    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss(outputs, fixed, labels):
        logits, _ = embedding.stateless_call([], fixed, outputs, reverse=True)
        return crossentropy(labels, logits)

    outputs = data(distribution, (length, options.features), options.dtype)
    labels = data(distribution, (length,), "int32")
    fixed = list(map(described, embedding.variables))
    with distribution.scope():
        return temporaries(jax.jit(jax.value_and_grad(loss)).lower(outputs, fixed, labels))


def temporaries(lowered):
    size = lowered.compile().memory_analysis().temp_size_in_bytes / 1e9
    say(f"{size:.3f} GB")
    return size


def described(variable):
    import jax

    layout = variable._layout.backend_layout
    return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=layout)


def data(distribution, shape, dtype):
    """One row for each chip."""
    import jax

    shape = (distribution.num_model_replicas, *shape)
    layout = distribution.get_data_layout(shape).backend_layout
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)


def bytes_on_a_chip(variable):
    weight = described(variable)
    return np.prod(weight.sharding.shard_shape(weight.shape)) * weight.dtype.itemsize


if __name__ == "__main__":
    main()
