"""Models that are trained on several replicas, in processes that tests start."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import keras
import numpy as np

import keras_moe
from keras_moe import layers, losses, routers
from keras_moe.routers import balancers

EXPERTS, FEATURES, LENGTH = 4, 4, 6
# Skewed, so that balancing has something to do.
X = np.random.default_rng(0).normal(size=(8, LENGTH, FEATURES)) + [2, 1, 0, 0]
X = X.astype("float32")


def moe(name, router, router_losses=None):
    bank = layers.FeedForwardExperts(EXPERTS, 8)
    return layers.MixtureOfExperts(bank, router, router_losses, name=name)


def balancer_layers():
    """A layer for each registered balancer."""
    for name in balancers.IDENTIFIERS:
        router = routers.TopKRouter(EXPERTS, balancer=name)
        yield moe(f"balancer_{name}", router, [losses.RouterZ(0.5)])


def every_layer():
    """A layer for each registered loss and balancer, and for each kind of router."""
    for name, loss in losses.IDENTIFIERS.items():
        # Of a noisy router each has a gradient.
        router = routers.NoisyTopKRouter(EXPERTS, seed=3)
        yield moe(f"loss_{name}", router, [loss(weight=0.5)])
    yield from balancer_layers()
    for name in ROUTERS:
        yield moe(f"router_{name}", routers.get(name, EXPERTS))


# Those with draws, with a strength, with counts of places, with slots; others keep no state.
ROUTERS = ("expert_choice", "gshard", "noisy_top_k", "relu", "soft", "top_k")


def global_layers():
    """Layers that treat the batch of all replicas as one."""
    yield from balancer_layers()
    yield moe("strength", routers.ReLURouter(EXPERTS, initial_strength=0.1, growth=2.0))
    yield moe("global", routers.TopKRouter(EXPERTS), [losses.LoadBalance(0.5, scope="global")])


def plain_layers():
    """Layers that wait for no other replica."""
    yield moe("plain", routers.TopKRouter(EXPERTS), [losses.LoadBalance(0.5), losses.RouterZ(0.5)])


def merged_layers():
    """A layer between others of Keras's own that wait for other replicas."""
    yield from plain_layers()
    yield keras.layers.BatchNormalization(synchronized=True, name="norm")


def some_layers():
    return [*plain_layers(), *global_layers()]


# Names without layers: those would start TensorFlow before a process can set up its devices.
GLOBAL_LAYERS = [*(f"balancer_{name}" for name in balancers.IDENTIFIERS), "strength", "global"]
EVERY_LAYER = [
    *(f"loss_{name}" for name in losses.IDENTIFIERS),
    *(f"balancer_{name}" for name in balancers.IDENTIFIERS),
    *(f"router_{name}" for name in ROUTERS),
]


def model_of(make_layers):
    keras.utils.set_random_seed(0)
    # The losses of layers that are not ours must be right as well.
    first = keras.layers.Dense(
        FEATURES, kernel_initializer="identity", activity_regularizer="l2", name="dense"
    )
    inputs = keras.Input((LENGTH, FEATURES))
    outputs = first(inputs)
    for layer in make_layers():
        outputs = outputs + 0.1 * layer(outputs)
    return keras.Model(inputs, outputs)


PACKAGE = pathlib.Path(keras_moe.__file__).parent
# They add up over replicas, so for the same batch on each there is so many times as much.
COUNTED = ("expert_counts", "dropped_count", "value_totals")
COUNTERS = {"global_counts", *COUNTED, *(f"evaluation_{name}" for name in COUNTED)}


def start(script, *args, **variables):
    """A process that runs a script of this folder, and its output and errors."""
    # Files: a full pipe would stop a process that another one waits for.
    printed = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).with_name(script)), *map(str, args)],
        # The package that is tested, wherever that was imported from.
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "PYTHONPATH": str(PACKAGE.parent),
            **variables,
        },
        stdout=printed[0],
        stderr=printed[1],
    )
    return process, *printed


def results_of(started):
    """The object that each of some processes prints in the end."""
    results = []
    try:
        for process, output, errors in started:
            process.wait(timeout=600)
            output.seek(0)
            errors.seek(0)
            assert process.returncode == 0, errors.read()[-3000:]
            results.append(json.loads(output.read().splitlines()[-1]))
    finally:
        for process, *files in started:
            process.kill()
            process.wait()
            for file in files:
                file.close()
    return results


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def assert_equal(actual, expected, layer, replicas, same_batch):
    """The weights of a layer, trained on several replicas and on one."""
    names = [name for name in expected["weights"] if name.startswith(f"{layer}/")]
    assert names
    for name in names:
        weight = name.split("/")[1]
        factor = replicas if same_batch and weight in COUNTERS else 1
        if not same_batch and weight in COUNTERS and not weight.endswith("_counts"):
            continue  # Means of several batches are not those of one.
        np.testing.assert_allclose(
            actual["weights"][name],
            np.multiply(expected["weights"][name], factor),
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )
