"""Data parallelism on TensorFlow: what is balanced is the batch of all replicas."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import reference
import reference_routers as oracle

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="replicas of tf.distribute"
)

TRAIN = """
import json, sys
import numpy as np, tensorflow as tf
replicas, router_name = int(sys.argv[1]), sys.argv[2]
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
import keras
from keras_moe import layers, losses, routers
strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(replicas)])
with strategy.scope():
    kernel = {"kernel_initializer": keras.initializers.Identity()}
    router = {
        "loss_free": lambda: routers.TopKRouter(4, balancer="loss_free", **kernel),
        "quantile": lambda: routers.TopKRouter(4, balancer="quantile", **kernel),
        "relu": lambda: routers.ReLURouter(4, initial_strength=0.1, growth=2.0, **kernel),
    }[router_name]()
    layer = layers.MixtureOfExperts(
        layers.FeedForwardExperts(4, 8), router=router, router_losses=[losses.GlobalLoadBalance()]
    )
    model = keras.Sequential([keras.Input((8, 4)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
x = np.array(json.loads(sys.argv[3]))
model.fit(x, x, batch_size=4, verbose=0, shuffle=False)
state = {w.name: keras.ops.convert_to_numpy(w).tolist() for w in layer.non_trainable_weights}
print(json.dumps(state))
"""
TOKENS = np.random.default_rng(0).normal(size=(4, 8, 4)) + [2, 1, 0, 0]


def trained_on(replicas, router, x=TOKENS):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(replicas), router, json.dumps(x.tolist())],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def scores_of(tokens):
    return np.array([reference.softmax(token) for token in tokens.reshape(-1, 4)])


def test_two_replicas_balance_the_batch_that_one_would_see():
    one, two = trained_on(1, "loss_free"), trained_on(2, "loss_free")
    assert sum(one["global_counts"]) == 4 * 8 * 2
    assert max(map(abs, one["selection_bias"])) > 1e-4
    np.testing.assert_allclose(two["global_counts"], one["global_counts"])
    np.testing.assert_allclose(two["selection_bias"], one["selection_bias"], atol=1e-7)


def test_what_two_replicas_measure_is_averaged():
    measured = [
        oracle.quantile_bias(scores_of(half), 0.0, 2, np.ones(len(half) * 8))
        for half in np.split(TOKENS, 2)
    ]
    mean = np.mean(measured, axis=0)
    bias = trained_on(2, "quantile")["selection_bias"]
    np.testing.assert_allclose(bias, mean - mean.mean(), atol=1e-6)


def test_the_strength_of_relu_routing_follows_the_batch_of_all_replicas():
    # Half the tokens have all four experts above zero, half have none: two on average, as wanted.
    # Each replica alone would see something else.
    signs = np.array([1, 1, -1, -1]).reshape(4, 1, 1)
    x = signs * np.abs(TOKENS)
    assert trained_on(2, "relu", x)["strength"] == pytest.approx(0.1)
