"""A language model whose experts are copied in the middle of training, against all from the start.

    KERAS_BACKEND=jax python studies/growing.py
    KERAS_BACKEND=jax python studies/growing.py --models "8 to 32 experts" --seeds 3 4

A mixture of 32 experts from the start, one of 8, and one of 8 whose experts are copied to 32 after
half of the training. There the optimizer starts again, but not its learning rate schedule. All
train for as much CPU time: steps times the time of a step, measured before training in turns
with the other models. Model, data and learning rate come from the study `sparsity.py`, in smaller
batches. Losses are of the test split. The report has the models and seeds of the last command.
"""

import functools
import pathlib
import time
import typing

import keras
import language_model
import numpy as np
import resuming
import sparsity
from command_line import parse_with_models, parser_of
from comparisons import count_parameters, each_run, print_ends, step_times
from files import claim
from id_batches import shifted

from keras_moe import surgery

# Of each half of "8 to 32 experts"; others have as many steps as take the same time.
FULL = sparsity.FULL._replace(steps=160, epochs=4, validation_rows=512)
SMOKE = sparsity.SMOKE._replace(steps=4)
BATCH_SIZE = 16
# The learning rate that the trials of `sparsity.py` choose. Noise: the best of 0.01, 0.1, 0.3 and 1
# in one run of 300 steps with another seed, by the validation split.
LEARNING_RATE, NOISE = 1e-2, 1.0
# Experts in the first and in the second half.
MODELS = {"32 experts": (32, 32), "8 to 32 experts": (8, 32), "8 experts": (8, 8)}


def main(arguments=None):
    parser = parser_of(__doc__, "output_growing", sparsity.DATASETS, seeds=[0, 1, 2])
    options = parse_with_models(parser, MODELS, arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    num_tokens, train, _, test = sparsity.load_data(options, size)
    settings = (size, options.dataset, BATCH_SIZE, LEARNING_RATE, NOISE)
    folder = options.output / "runs" / resuming.digest(*settings)
    study = Study(size, num_tokens, train[::2], train[1::2], test, folder)
    ms_per_step = step_times(
        study.make, ["8", "32"], shifted(train[:BATCH_SIZE]), study.folder, time.process_time
    )
    for results in each_run(options, options.models, study.run, ms_per_step):
        halves = {"after half": ("{:.4f}", "half"), "then": ("{:.4f}", "then")}
        print_ends(results, **halves)
    return results


class Study(typing.NamedTuple):
    """The data of both halves of training, and the folder that keeps what was computed."""

    size: language_model.Size
    num_tokens: int
    first: np.ndarray
    second: np.ndarray
    test: np.ndarray
    folder: pathlib.Path

    def make(self, num_experts, steps=1):
        blocks = range(self.size.blocks)
        feedforwards = [sparsity.mixture(int(num_experts), self.size) for _ in blocks]
        model = language_model.build_model(self.num_tokens, self.size, feedforwards)
        language_model.compile_for_training(model, steps, LEARNING_RATE)
        return model

    def run(self, name, seed, ms_per_step):
        """The losses at the end, after the first half, and then with other experts."""
        before, after = MODELS[name]
        ms = (ms_per_step[str(before)] + ms_per_step[str(after)]) / 2
        steps = max(1, round(self.size.steps * np.mean([*ms_per_step.values()]) / ms))
        size = self.size._replace(steps=steps)

        def train(progress):
            resuming.say(f"{name}, seed {seed}")
            keras.utils.set_random_seed(seed)
            model = self.make(before, 2 * steps * size.epochs)
            fit = functools.partial(
                language_model.fit_compiled, model, seed=seed, size=size, batch_size=BATCH_SIZE
            )
            half = fit(data=(self.first, self.test), folder=progress / "first")["val_loss"]
            then = half[-1]
            if after > before:
                done, schedule = steps * size.epochs, model.optimizer._learning_rate
                surgery.add_experts(model, factor=after // before, noise=NOISE, seed=seed)
                model.optimizer.learning_rate = Later(schedule, done)
                then = language_model.evaluate(model, self.test, BATCH_SIZE)
            rest = fit(data=(self.second, self.test), folder=progress / "second")["val_loss"]
            losses = {"losses": [*half, *rest], "half": half[-1], "then": then, "loss": rest[-1]}
            return {**losses, **count_parameters(model)}

        run = resuming.once(self.folder / f"{name}-{seed}".replace(" ", "_"), train)
        total = 2 * steps * size.epochs
        return {**run, "steps": total, "ms_per_step": ms, "seconds": total * ms / 1000}


class Later(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule from a later step on, for an optimizer that starts again."""

    def __init__(self, schedule, start):
        self.schedule, self.start = schedule, start

    def __call__(self, step):
        return self.schedule(step + self.start)


if __name__ == "__main__":
    main()
