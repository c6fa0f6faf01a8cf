"""Training on replicas of `tf.distribute`, in a process that sets up its devices first.

It prints one JSON object: by the number of replicas, for each part, the loss, the logs of a monitor
and all weights of a model that was trained so. As a worker of several, which the environment
variable TF_CONFIG describes, a process trains by a loop of its own.
"""

import json
import os

import keras
import numpy as np
import tensorflow as tf
from replicas_models import (
    X,
    every_layer,
    global_layers,
    merged_layers,
    model_of,
    plain_layers,
    some_layers,
)

from keras_moe import callbacks


def fit(make_layers, x, batch_size):
    model = model_of(make_layers)
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    history = model.fit(
        x,
        x,
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        validation_data=(x, x),
        callbacks=[callbacks.ExpertMonitor(per_layer=True), callbacks.ExpertHealth(every=1)],
    )
    return {"logs": history.history, "weights": weights_of(model)}


def step(strategy, make_layers, parts, run_step):
    """A step of a user's loop, with one of the `parts` on each replica."""
    model = model_of(make_layers)
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    replicas = strategy.num_replicas_in_sync

    def gradients(x):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = (tf.reduce_mean((outputs - x) ** 2) + sum(model.losses)) / replicas
        return loss, tape.gradient(loss, model.trainable_weights)

    def on_each(gradients):
        part = tf.gather(
            np.stack(parts), tf.distribute.get_replica_context().replica_id_in_sync_group
        )
        loss, values = gradients(part)
        optimizer.apply_gradients(zip(values, model.trainable_weights))
        return loss

    loss = strategy.reduce("SUM", run_step(strategy, on_each, gradients), axis=None)
    return {"logs": {"loss": float(loss)}, "weights": weights_of(model)}


def weights_of(model):
    """The values of all weights, which are equal on all replicas, but for counters."""
    values = {}
    for layer in model.layers:
        for index, weight in enumerate(layer.weights):
            copies = tf.distribute.get_strategy().experimental_local_results(weight.value)
            if weight.synchronization != "on_read":
                for copy in copies:
                    np.testing.assert_array_equal(copy, copies[0], err_msg=weight.path)
            values[f"{layer.name}/{weight.name}/{index}"] = np.asarray(weight).tolist()
    return values


def run(strategy, on_each, gradients):
    return strategy.run(on_each, (gradients,))


def run_traced(strategy, on_each, gradients):
    return tf.function(lambda: run(strategy, on_each, gradients), autograph=False)()


def run_compiled(strategy, on_each, gradients):
    # XLA compiles nothing that spans several CPUs, but what each of them does.
    return run_traced(strategy, on_each, tf.function(gradients, jit_compile=True, autograph=False))


def error_of(function, *args):
    try:
        function(*args)
    except RuntimeError as error:
        return str(error)
    return None


def worker():
    """A step on one of several workers, each with one replica."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        results = {"split": step(strategy, global_layers, np.split(X, 2), run_traced)}
    return results


def two_devices():
    """The results on one device, and on both of this process."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return {replicas: mirrored(replicas) for replicas in (1, 2)}


def mirrored(replicas):
    """All parts."""
    strategy = tf.distribute.get_strategy()
    if replicas > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    same = [X[:4]] * replicas
    with strategy.scope():
        results = {
            "split": step(strategy, global_layers, np.split(X, replicas), run),
            "merged": step(strategy, merged_layers, same, run),
            "fit": fit(some_layers, np.concatenate(same), 4 * replicas),
            "all": step(strategy, every_layer, same, run),
            "xla": step(strategy, plain_layers, same, run_compiled),
        }
        if replicas == 2:
            results["error"] = error_of(step, strategy, global_layers, same, run_compiled)
    return results


if __name__ == "__main__":
    print(json.dumps(worker() if "TF_CONFIG" in os.environ else two_devices()))
