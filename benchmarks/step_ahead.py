"""A training step compiled from shapes alone: no weight is made and nothing runs."""

import contextlib
import time

import keras
import numpy as np

from benchmarks.steps import jax_function
from keras_moe import layers, routers


def compile_step(build, options, sharding):
    """Compile one forward and backward pass of a layer for a device that need not be there.

    Args:
        build: function without arguments that returns a built layer.
        options: of the command line; `tokens` and `features` count here.
        sharding: from `benchmarks.chips.sharding`.

    Returns:
        The `jax.stages.Compiled` step, and the seconds of tracing and compiling it.
    """
    import jax

    # Here weights are not initialised, and below values have shapes only.
    with keras.StatelessScope(initialize_variables=False):
        layer = build()
    functions = []

    def arguments():
        inputs = np.zeros((*options.tokens, options.features), "float32")
        function, arguments = jax_function(layer, inputs, backward=True, training=True)
        functions.append(function)
        return arguments

    abstract = jax.tree.map(
        lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding),
        jax.eval_shape(arguments),
    )
    start = time.perf_counter()
    with _on_device_of(sharding):
        compiled = functions[0].lower(*abstract).compile()
    return compiled, time.perf_counter() - start


def _on_device_of(sharding):
    """A context that tells kernels which TPU they are compiled for, as its own process would."""
    import jax

    (device,) = sharding.device_set
    if device.platform != "tpu":
        return contextlib.nullcontext()
    abstract = jax.sharding.AbstractDevice(device.device_kind, device.num_cores, "tpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), (), abstract_device=abstract)
    )


def mixture(num_experts, options):
    """The layer of `contestants.mixture`, with the capacity of the command line."""
    bank = layers.GatedExperts if options.gated else layers.FeedForwardExperts
    layer = layers.MixtureOfExperts(
        bank(num_experts, options.hidden, activation=options.activation),
        router=routers.TopKRouter(num_experts, options.top_k),
        capacity_factor=options.capacity_factor,
    )
    layer.build((None, options.features))
    return layer
