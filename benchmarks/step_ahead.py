"""A training step compiled from shapes alone: no weight is made and nothing runs."""

import contextlib
import time

import keras

from benchmarks.steps import jax_pass


def compile_step(build, options, sharding):
    """One forward and backward pass of the layer `build()`, compiled for a device that need not be
    there, and the seconds of tracing and compiling it. `sharding` is from `benchmarks.chips`.
    """
    with keras.StatelessScope(initialize_variables=False):
        layer = build()
    start = time.perf_counter()
    with _on_device_of(sharding):
        lowered = lowered_step(
            layer, options.tokens[0], options, lambda variable: sharding, sharding
        )
        return lowered.compile(), time.perf_counter() - start


def lowered_step(layer, num_tokens, options, sharding_of, data_sharding):
    """The pass of a layer whose variables have no values."""
    import jax

    trainable, fixed = (
        [
            jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding_of(variable))
            for variable in variables
        ]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    )
    shape = (num_tokens, options.features)
    x = jax.ShapeDtypeStruct(shape, layer.compute_dtype, sharding=data_sharding)
    return jax_pass(layer).lower(trainable, x, fixed, x)


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
