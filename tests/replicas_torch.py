"""Training in processes of `torch.distributed`, each of which runs this.

The environment is that of `torchrun`: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`python replicas_torch.py FOLDER` saves weights in a folder, and prints one JSON object as
`replicas_tensorflow.py` does.
"""

import json
import os
import sys

# Keras would import it, which takes seconds, and do without.
sys.modules["tensorflow"] = None

import keras  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from forced_router import ForcedRouter  # noqa: E402
from replicas_models import EXPERTS, X, every_layer, global_layers, model_of  # noqa: E402

from keras_moe import callbacks, layers, losses, routers  # noqa: E402
from keras_moe.distribution import expert_parallel  # noqa: E402
from keras_moe.ops import any_derivative  # noqa: E402


def idle_layers():
    """A layer for each bank, whose first expert gets all tokens."""
    for name, bank in (
        ("dense_bank", layers.FeedForwardExperts(EXPERTS, 8)),
        ("gated_bank", layers.GatedExperts(EXPERTS, 8)),
        ("layer_bank", layers.LayerExperts([keras.layers.Dense(4) for _ in range(EXPERTS)])),
        ("constant_bank", with_constants(layers.FeedForwardExperts(2, 8))),
    ):
        router = ForcedRouter(EXPERTS, top_k=1, to_one=True)
        yield layers.MixtureOfExperts(bank, router, name=name)


def with_constants(bank):
    return layers.ZeroComputationExperts(bank, num_identity=1, num_constant=1)


def spread_layers():
    """Layers whose experts may be spread over up to four processes.

    Their losses are those that treat the batch of all processes as one.
    """
    sums = [losses.LoadBalance(0.5, scope="global"), losses.RouterZ(0.5)]
    bank = layers.FeedForwardExperts(8, 8)
    yield layers.MixtureOfExperts(bank, router_losses=sums, name="plain")
    router = routers.TopKRouter(8, top_k=3, score="sigmoid", balancer="loss_free")
    bank = layers.GatedExperts(8, 8, kernel_regularizer="l2", bias_initializer="ones")
    shared = keras.layers.Dense(4)
    yield layers.MixtureOfExperts(bank, router, shared_expert=shared, name="gated")
    router = ForcedRouter(8, top_k=1, to_one=True)
    yield layers.MixtureOfExperts(layers.FeedForwardExperts(8, 8), router, name="idle")
    yield layers.MixtureOfExperts(layers.FeedForwardExperts(8, 8), "top_p", sums, name="threshold")
    bank = with_constants(layers.FeedForwardExperts(8, 8))
    yield layers.MixtureOfExperts(bank, router_losses=sums, name="constant")


def itself(model):
    return model


def train(make_layers, x, data_parallel, number=2):
    model = model_of(make_layers)
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    module = data_parallel(model)
    x = torch.tensor(x)
    for _ in range(number):
        model.zero_grad()
        loss = ((module(x, training=True) - x) ** 2).mean() + sum(model.losses)
        loss.backward()
        with torch.no_grad():
            gradients = [weight.value.grad for weight in model.trainable_weights]
            optimizer.apply(gradients, model.trainable_weights)
    return model


def weights_of(model):
    return {
        "weights": {
            f"{layer.name}/{weight.name}/{index}": keras.ops.convert_to_numpy(weight).tolist()
            for layer in model.layers
            for index, weight in enumerate(layer.weights)
        }
    }


def evaluated_alone(model, rank):
    """Logs of the first process while the others do something else.

    Keras 3.16 sums metrics over the processes: one alone would wait forever.
    """
    seen = {}
    if rank == 0 and not hasattr(model, "ddp_model"):
        model.compile(loss="mse")
        record = keras.callbacks.LambdaCallback(on_test_end=seen.update)
        monitor = callbacks.ExpertMonitor(per_layer=True)
        model.evaluate(X, X, verbose=0, callbacks=[monitor, record])
    return {key: float(value) for key, value in seen.items()}


def data_parallelism(rank, size):
    data_parallel = torch.nn.parallel.DistributedDataParallel if size > 1 else itself
    results = {
        "all": weights_of(train(every_layer, X[:4], data_parallel)),
        "idle": weights_of(train(idle_layers, X[:4], data_parallel)),
    }
    model = train(global_layers, np.split(X, size)[rank], data_parallel, 1)
    results["split"] = weights_of(model)
    results["alone"] = evaluated_alone(model, rank)
    return results


def expert_parallelism(rank, size, folder, experts=None):
    """Outputs of experts that were trained in several processes, and their number."""
    data_parallel = itself
    if size > 1:
        distribution = expert_parallel(experts)
        keras.distribution.set_distribution(distribution)

        def data_parallel(model):
            if rank >= distribution.num_processes:
                # Whatever these begin with, they take the weights of the first processes.
                for weight in model.trainable_weights:
                    weight.assign(weight + 1.0)
            return distribution.data_parallel(model)

    x = np.split(X, size)[rank]
    model = train(spread_layers, x, data_parallel)
    model.save_weights(os.path.join(folder, f"{size}_{rank}.weights.h5"))
    loaded = model_of(spread_layers)
    loaded.load_weights(os.path.join(folder, f"{size}_{rank}.weights.h5"))
    banks = [layer for layer in model._flatten_layers() if hasattr(layer, "down_kernel")]
    return {
        "outputs": keras.ops.convert_to_numpy(model(x)).tolist(),
        "loaded": keras.ops.convert_to_numpy(loaded(x)).tolist(),
        "num_parameters": sum(bank.count_params() for bank in banks),
        "second": second_derivative(model.get_layer("plain"), x).tolist(),
    }


def second_derivative(layer, x):
    """The gradient, by the kernels of this process, of the squares of their own gradient."""
    kernel = layer.experts.up_kernel.value
    with any_derivative():
        loss = (layer(torch.tensor(x)) ** 2).mean()
    (gradient,) = torch.autograd.grad(loss, kernel, create_graph=True)
    return torch.autograd.grad((gradient**2).sum(), kernel)[0]


def draws_alike():
    """Whether equal experts in two processes of one seed drop the same numbers of a token."""
    keras.utils.set_random_seed(0)
    bank = layers.FeedForwardExperts(2, 64, dropout=0.5, kernel_initializer="ones")
    layer = layers.MixtureOfExperts(bank, top_k=2)
    _, outputs = layer(torch.ones(3, 4), training=True, return_expert_outputs=True)
    return torch.equal(outputs[:, 0], outputs[:, 1])


def errors():
    """Errors where numbers and processes do not fit."""
    yield error_of(lambda: expert_parallel(3))
    yield error_of(lambda: expert_parallel(2, data=4))
    yield error_of(lambda: layers.FeedForwardExperts(7, 8).build((None, 4)))


def error_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)


def main(folder):
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    results = {"errors": [error_of(expert_parallel)]}
    if size > 1:
        torch.distributed.init_process_group("gloo")
    if size <= 2:
        results |= data_parallelism(rank, size)
    results["experts"] = expert_parallelism(rank, size, folder)
    if size == 2:
        results["draws_alike"] = draws_alike()
        results["copies"] = expert_parallelism(rank, size, folder, experts=1)
    if size == 4:
        results["grid"] = expert_parallelism(rank, size, folder, experts=2)
        results["errors"] += errors()
    print(json.dumps(results), flush=True)
    if size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
