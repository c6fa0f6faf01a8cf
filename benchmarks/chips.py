"""Chips that steps are compiled for, whether or not one is there, and what they can do at most.

Peaks are those of what JAX calls a device: on TPU v4 and tpu7x one of the two cores of a chip, and
so half of what its data sheet says. Sources: Google's pages on each TPU; NVIDIA's data sheet of the
H100 SXM, whose 989 TFLOP/s no card holds at its power limit, and of which 800 are taken here.
"""

import importlib.util
import os
import pathlib
import time
from typing import NamedTuple

import keras

from benchmarks.measure import say
from benchmarks.steps import jax_pass
from keras_moe import ops

TARGETS = pathlib.Path(__file__).parent / "targets"


class Chip(NamedTuple):
    """What a chip does at most, per second: FLOP/s of products, bytes/s of main memory.

    Float32 is multiplied by default in one bfloat16 pass on TPUs, and as TF32 on NVIDIA cards; in
    full precision in six passes, and without tensor cores.
    """

    platform: str
    topology: str  # of a system of one chip or a few
    half: float
    float32_default: float
    float32_highest: float
    memory: float
    launch: float = 0.0  # seconds of the shortest kernel; 0 where one program holds them all
    wait: float = 0.0  # seconds that the device idles while the host reads a condition


def _tpu(topology, half, memory):
    return Chip("tpu", topology, half, half, half / 6, memory)


CHIPS = {
    "v4": _tpu("v4:2x2x1", 137.5e12, 614e9),
    "v5e": _tpu("v5e:2x2", 197e12, 819e9),
    "v5p": _tpu("v5p:2x2x1", 459e12, 2765e9),
    "v6e": _tpu("v6e:2x2", 918e12, 1640e9),
    "tpu7x": _tpu("tpu7x:2x2x1", 1154e12, 3690e9),
    "h100": Chip("cuda", "1x1x1", 800e12, 400e12, 54e12, 3.35e12, launch=3e-6, wait=10e-6),
}


def missing(name):
    """What must be installed to compile for a chip, or None."""
    if CHIPS[name].platform == "tpu":
        return None if _installed("libtpu") else "jax[tpu], the extra `ahead` of keras_moe"
    return None if _installed("jax_cuda13_plugin") else "jax[cuda13]"


def sharding(name):
    """The sharding of arrays on one chip that need not be there."""
    import jax

    chip, options = CHIPS[name], {}
    if chip.platform == "cuda":
        target = (TARGETS / f"{name}.txtpb").read_text()
        options = {"target_config": target, "topology": chip.topology}
    return jax.sharding.SingleDeviceSharding(devices(chip.topology, chip.platform, **options)[0])


def devices(topology, platform="tpu", /, **options):
    """The devices of a topology, such as "v5e:4x4", which need not be there."""
    import jax
    from jax.experimental import topologies

    # The CUDA plugin refuses to load where no driver is, unless JAX runs on the CPU.
    jax.config.update("jax_platforms", "cpu")
    # libtpu asks a metadata server what machine it is on, and lets one process in at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(topology, platform, **options).devices


def compile_step(build, options, sharding):
    """One forward and backward pass of the layer `build()`, compiled for a device that need not be
    there, and the seconds of tracing and compiling it. `sharding` is from `benchmarks.chips`.
    """
    with keras.StatelessScope(initialize_variables=False):
        layer = build()
    say(f"compiling {layer.name} for {sharding}")
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
    platform = next(iter(data_sharding.device_set)).platform
    with ops.platform("tpu" if platform == "tpu" else "gpu"):
        return jax_pass(layer).lower(trainable, x, fixed, x)


def _on_device_of(sharding):
    """A context that tells kernels which chip they are compiled for, as its own process would."""
    import jax

    (device,) = sharding.device_set
    platform = "tpu" if device.platform == "tpu" else "cuda"
    cores = device.num_cores if platform == "tpu" else None
    abstract = jax.sharding.AbstractDevice(device.device_kind, cores, platform)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), (), abstract_device=abstract)
    )


def _installed(module):
    return importlib.util.find_spec(module) is not None
