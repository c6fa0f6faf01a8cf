"""Training in processes of `torch.distributed`, each of which runs this.

The environment is that of `torchrun`: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Prints one
JSON object as `replicas_tensorflow.py` does.
"""

import json
import os

import keras
import numpy as np
import torch
from replicas_models import EXPERTS, X, every_layer, global_layers, model_of

from keras_moe import callbacks, layers, routers


def idle_layers():
    """A layer for each bank, whose first expert gets all tokens."""
    for name, bank in (
        ("dense_bank", layers.FeedForwardExperts(EXPERTS, 8)),
        ("gated_bank", layers.GatedExperts(EXPERTS, 8)),
        ("layer_bank", layers.LayerExperts([keras.layers.Dense(4) for _ in range(EXPERTS)])),
        (
            "constant_bank",
            layers.ZeroComputationExperts(layers.FeedForwardExperts(2, 8), 0, 1, 1),
        ),
    ):
        router = routers.ForcedRouter(EXPERTS, top_k=1, pattern="one")
        yield layers.MixtureOfExperts(bank, router, name=name)


def steps(make_layers, x, number=2):
    model = model_of(make_layers)
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    module = model
    if torch.distributed.is_initialized():
        module = torch.nn.parallel.DistributedDataParallel(model)
    x = torch.tensor(x)
    for _ in range(number):
        model.zero_grad()
        loss = ((module(x, training=True) - x) ** 2).mean() + sum(model.losses)
        loss.backward()
        with torch.no_grad():
            gradients = [weight.value.grad for weight in model.trainable_weights]
            optimizer.apply(gradients, model.trainable_weights)
    return {"logs": {"loss": loss.item()}, "weights": weights_of(model)}, model


def weights_of(model):
    return {
        f"{layer.name}/{weight.name}/{index}": keras.ops.convert_to_numpy(weight).tolist()
        for layer in model.layers
        for index, weight in enumerate(layer.weights)
    }


def evaluated_alone(model, rank):
    """What the first process logs while the others do something else."""
    seen = {}
    if rank == 0:
        model.compile(loss="mse")
        record = keras.callbacks.LambdaCallback(on_test_end=seen.update)
        model.evaluate(X, X, verbose=0, callbacks=[callbacks.ExpertMonitor(), record])
    return {key: float(value) for key, value in seen.items()}


def main():
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        torch.distributed.init_process_group("gloo")
    results = {
        "all": steps(every_layer, X[:4])[0],
        "idle": steps(idle_layers, X[:4])[0],
    }
    results["split"], model = steps(global_layers, np.split(X, size)[rank], 1)
    results["alone"] = evaluated_alone(model, rank)
    print(json.dumps(results), flush=True)
    if size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
