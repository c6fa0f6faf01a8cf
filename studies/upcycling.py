"""A dense language model trains on, as it is and as mixtures of experts that are made from it.

    KERAS_BACKEND=jax python studies/upcycling.py
    KERAS_BACKEND=jax python studies/upcycling.py --models dense "32 halves" --seeds 3 4

All train on from the same weights, on the same data in the same order, with the same learning
rates. The second half of training reads text that the first has not seen. Model, data and learning
rate come from the study `sparsity.py`; batches are smaller, and the balance loss is weaker. Losses
are of the test split. Times are steps times the CPU time of a step, measured before training
in turns with the other models. The report has the models and seeds of the last command.
"""

import pathlib
import time
import typing

import keras
import language_model
import numpy as np
import resuming
import sparsity
from command_line import parse_with_models, parser_of
from comparisons import (
    count_parameters,
    course,
    dense_feedforward,
    each_run,
    print_comparison,
    step_times,
)
from files import claim, whole
from id_batches import shifted

import keras_moe
from keras_moe import losses

# Of each half.
FULL = sparsity.FULL._replace(steps=150, epochs=4, validation_rows=512)
SMOKE = sparsity.SMOKE._replace(steps=10)
BATCH_SIZE = 16
# The learning rate that the trials of `sparsity.py` choose, and a weak balance loss.
LEARNING_RATE, BALANCE_WEIGHT = 1e-2, 1e-3

# Arguments of `upcycle`. Two of 32 halves cost a token what the dense layer costs, and the router.
HALVES = {"num_experts": 32, "granularity": 2}
MODELS = {
    "dense": None,
    "32 halves, half new": {**HALVES, "reinitialized": 0.5},
    "32 halves": HALVES,
}


def main(arguments=None):
    parser = parser_of(__doc__, "output_upcycling", sparsity.DATASETS, seeds=[0, 1, 2])
    options = parse_with_models(parser, MODELS, arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    num_tokens, train, _, test = sparsity.load_data(options, size)
    print(f"{train[:, 1:].size:,} subwords, {size.steps * size.epochs} steps each half")
    settings = (size, options.dataset, BATCH_SIZE, LEARNING_RATE, BALANCE_WEIGHT)
    folder = options.output / "runs" / resuming.digest(*settings)
    study = Study(size, num_tokens, train[::2], train[1::2], test, folder)
    batch = shifted(study.first[:BATCH_SIZE])
    ms_per_step = step_times(study.compiled, options.models, batch, study.folder, time.process_time)
    for results in each_run(options, options.models, study.run, ms_per_step):
        before = np.mean([run["before"] for run in results["dense"].values()])
        print(f"\nloss of the dense model after the first half: {before:.4f}")
        print_comparison(results)
    return results


class Study(typing.NamedTuple):
    """The data of both halves of training, and the folder that keeps what was computed."""

    size: language_model.Size
    num_tokens: int
    first: np.ndarray
    second: np.ndarray
    test: np.ndarray
    folder: pathlib.Path

    def compiled(self, name):
        model = upcycled(dense_model(self.num_tokens, self.size), name, seed=0)
        language_model.compile_for_training(model, 1)
        return model

    def run(self, name, seed, ms_per_step):
        """The course of the losses in the second half, with the loss before it."""

        def train(progress):
            dense, before = self.half_trained(seed)
            model = upcycled(dense, name, seed)
            after = self.fit(name, model, seed, self.second, progress)
            return {"before": before, "after": after, **count_parameters(model)}

        run = resuming.once(self.folder / f"{name}-{seed}", train)
        after = run.pop("after")
        steps = [self.size.steps * (1 + epoch) for epoch in range(len(after))]
        return {**run, **course(after, steps, ms_per_step[name])}

    def half_trained(self, seed):
        """The dense model after the first half, and its loss."""
        keras.utils.set_random_seed(seed)
        model = dense_model(self.num_tokens, self.size)
        folder = self.folder / f"half-{seed}"
        weights = folder / "model.weights.h5"

        def train(progress):
            loss = self.fit("first half", model, seed, self.first, progress)[-1]
            with whole(weights) as part:
                model.save_weights(part)
            return loss

        loss = resuming.once(folder, train)
        model.load_weights(weights)
        return model, loss

    def fit(self, name, model, seed, data, progress):
        """Losses by epoch."""
        resuming.say(f"{name}, seed {seed}")
        return language_model.fit(
            model, (data, self.test), seed, self.size, progress, BATCH_SIZE, LEARNING_RATE
        )["val_loss"]


def dense_model(num_tokens, size):
    feedforwards = [
        dense_feedforward(sparsity.TOP_K, size.hidden_dim, size.features)
        for _ in range(size.blocks)
    ]
    return language_model.build_model(num_tokens, size, feedforwards)


def upcycled(model, name, seed):
    """The dense model, or the mixture of `MODELS` that is made from it."""
    arguments = MODELS[name]
    if arguments is None:
        return model
    router_losses = [losses.LoadBalance(BALANCE_WEIGHT), "router_z"]
    return keras_moe.upcycle(model, router_losses=router_losses, seed=seed, **arguments)


if __name__ == "__main__":
    main()
