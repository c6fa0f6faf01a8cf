"""Which engine computes a grouped operation.

An engine is a module of this folder with one interface:

- `supports(setting)`: whether it can compute there.
- `forward(setting, step, tokens, parameters, groups, keep) -> (outputs, saved)`: the outputs of
  all rows, (R', D') with R' >= R, and what the backward pass needs, any structure of tensors.
- `backward(setting, step, tokens, row_weights, parameters, groups, outputs, saved, gradient)`:
  the `Gradients`, from the gradient of each token, (T, D').

Rows behind the last group are padding. No engine promises what it returns for them.
"""

from keras_moe.ops.grouped import loop, padded, rows, slices, tiles

ENGINES = (rows, padded, tiles, loop, slices)


def choose(setting):
    """The first engine that supports a `Setting`.

    | backend | platform | engine |
    | --- | --- | --- |
    | JAX | TPU | `rows` by Pallas; float16, integer kernels, symbolic sizes: `padded` |
    | JAX | GPU | `rows` by Triton; before sm80, integer kernels, symbolic sizes: `padded` |
    | PyTorch | CUDA, sm90 or newer | `rows` for bfloat16 and widths that are multiples of 8 |
    | TensorFlow with XLA | GPU, TPU | `padded` |
    | JAX, TensorFlow with XLA | CPU | `tiles` |
    | PyTorch | CPU, and GPU otherwise | `slices` |
    | TensorFlow without XLA | all | `slices`; few rows on a CPU: `loop` |
    """
    return next(engine for engine in ENGINES if engine.supports(setting))


def name_of(engine):
    """The name of an engine: that of its module."""
    return engine.__name__.rpartition(".")[2]
