"""Data parallelism on TensorFlow: what is balanced is the batch of all replicas."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="replicas of tf.distribute"
)

TRAIN = """
import json, sys
import numpy as np, tensorflow as tf
replicas = int(sys.argv[1])
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
import keras
from keras_moe import layers, losses, routers
strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(replicas)])
with strategy.scope():
    layer = layers.MixtureOfExperts(
        layers.FeedForwardExperts(4, 8),
        router=routers.TopKRouter(
            4, balancer="loss_free", kernel_initializer=keras.initializers.Identity()
        ),
        router_losses=[losses.GlobalLoadBalance()],
    )
    model = keras.Sequential([keras.Input((8, 4)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
x = np.random.default_rng(0).normal(size=(4, 8, 4)) + [2, 1, 0, 0]
model.fit(x, x, batch_size=4, epochs=3, verbose=0)
bias = keras.ops.convert_to_numpy(layer.router.selection_bias).tolist()
counts = next(w for w in layer.weights if w.name == "global_counts")
print(json.dumps({"bias": bias, "counts": keras.ops.convert_to_numpy(counts).tolist()}))
"""


def trained_on(replicas):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(replicas)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_replicas_balance_the_batch_that_one_would_see():
    one, two = trained_on(1), trained_on(2)
    assert sum(one["counts"]) == 4 * 8 * 2
    assert max(map(abs, one["bias"])) > 1e-3
    np.testing.assert_allclose(two["counts"], one["counts"])
    np.testing.assert_allclose(two["bias"], one["bias"], atol=1e-7)
