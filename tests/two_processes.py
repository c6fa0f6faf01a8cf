"""One of two processes of four devices each that train one model; or alone, with one device.

python two_processes.py PORT PROCESS
"""

import json
import os
import sys

port, process = map(int, sys.argv[1:])
alone = port == 0
if not alone:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"

# Keras would import it, which takes seconds, and do without.
sys.modules["tensorflow"] = None

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

from keras_moe import layers, routers  # noqa: E402
from keras_moe.distribution import expert_parallel  # noqa: E402

BATCH, STEPS, FEATURES = 16, 3, 8

if not alone:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    distribution = expert_parallel(4)
    distribution.auto_shard_dataset = False
    keras.distribution.set_distribution(distribution)
keras.utils.set_random_seed(0)
router = routers.TopKRouter(8, score="sigmoid", balancer="loss_free")
layer = layers.MixtureOfExperts(
    layers.GatedExperts(8, 16), router=router, router_losses=["load_balance"]
)
model = keras.Sequential([keras.Input((FEATURES,)), layer])
model.compile(keras.optimizers.SGD(0.1), "mse")
x = np.random.default_rng(0).normal(size=(STEPS, BATCH, FEATURES)).astype("float32")
if not alone:
    # Each process feeds the devices that it has.
    x = x[:, process * BATCH // 2 : (process + 1) * BATCH // 2]
x = x.reshape(-1, FEATURES)
history = model.fit(x, x, batch_size=len(x) // STEPS, epochs=2, shuffle=False, verbose=0).history
state = [layer.expert_counts, router.selection_bias, router.kernel]
values = [np.asarray(variable.value).tolist() for variable in state]
print(json.dumps({"loss": history["loss"], "state": values}), flush=True)
