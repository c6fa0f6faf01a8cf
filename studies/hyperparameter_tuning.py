"""Searches the MoE layer of a text classifier: the least loss that a budget of FLOPs buys.

    python studies/hyperparameter_tuning.py
    python studies/hyperparameter_tuning.py --trials 24

The first trial is the layer picked by hand, so the best is never worse. The second command above
adds trials.
"""

import pathlib

import keras
import keras_tuner
from command_line import parser_of, positive
from comparisons import compile_classifier, print_runs
from files import claim, write_json
from resuming import StepTimer, say
from text_classification import LEARNING_RATE, Size, build_model, load

from keras_moe import inspection, tuner

# Sizes of the model, and the space, which says how wide experts are.
FULL = (
    Size(10_000, 10_007, 128, 8, features=64, hidden_dim=None, documents=None),
    tuner.SearchSpace(
        active_width=(256, 64, 128, 512),
        num_experts=(8, 4, 16, 32),
        routers=("top_k", "noisy_top_k", "sinkhorn", "switch"),
        capacity_factors=(None, 1.25),
    ),
)
SMOKE = (
    Size(500, 251, 32, 4, features=16, hidden_dim=None, documents=128),
    tuner.SearchSpace(
        active_width=(16, 8, 32), num_experts=(4, 2), top_k=(2, 1), routers=("top_k", "switch")
    ),
)
BATCH_SIZE = 64
# Most active FLOPs per token, as a multiple of those of the layer picked by hand.
BUDGET = 1.1


class Oracle(keras_tuner.oracles.BayesianOptimizationOracle):
    """The first trial has the first value of everything."""

    def populate_space(self, trial_id):
        answer = super().populate_space(trial_id)
        if self.trials:
            return answer
        first = keras_tuner.HyperParameters()
        first.merge(self.get_space())
        return {**answer, "values": first.values}


class Search(keras_tuner.Tuner):
    """Each trial has draws of its own, so that an interrupted search resumes with the same ones."""

    def run_trial(self, trial, *args, **kwargs):
        say(f"trial {trial.trial_id}: {trial.hyperparameters.values}")
        keras.utils.set_random_seed(int(trial.trial_id))
        return super().run_trial(trial, *args, **kwargs)


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    size, space = SMOKE if options.smoke else FULL
    data = load("reuters_r8", options.data_dir, size)
    (ids, _), (validation_ids, _), (test_ids, _) = data.arrays
    train, validation, test = (split.labels for split in data.splits)
    batch_size = min(BATCH_SIZE, len(ids))
    steps = len(ids) // batch_size

    def build(hp):
        model = build_model(lambda: space.sample(hp), data.vocabulary, size, len(data.class_names))
        rate = hp.Float("learning_rate", 3e-4, 1e-2, sampling="log", default=LEARNING_RATE)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # A trial is too short to wait for TensorFlow's XLA.
        is_jax = keras.backend.backend() == "jax"
        compile_classifier(model, loss, rate, options.epochs * steps, jit_compile=is_jax)
        # KerasTuner keeps the state of the optimizer with the weights, and loads it again.
        model.optimizer.build(model.trainable_variables)
        return model

    by_hand = inspection.summarize(build(keras_tuner.HyperParameters()))[0]
    search = open_search(build, tuner.WithinBudget(BUDGET * by_hand.flops), options)
    search.search(
        # Batches of one size are compiled once.
        ids[: steps * batch_size],
        train[: steps * batch_size],
        batch_size=batch_size,
        epochs=options.epochs,
        validation_data=(validation_ids, validation),
        callbacks=[tuner.CostMonitor(), StepTimer()],
        verbose=0,
    )
    report = compare(search, test_ids, test)
    print_report(report)
    folder = pathlib.Path(search.project_dir)
    write_json(folder / "results.json", report)
    print(f"\nTrials and results are in {folder}.")
    return report


def parse_options(arguments):
    parser = parser_of(__doc__, "tuning", seeds=2)
    parser.add_argument("--trials", type=positive, default=12, help="earlier runs included")
    parser.add_argument("--epochs", type=positive, default=4, help="of each trial")
    return parser.parse_args(arguments)


def open_search(build, objective, options):
    """A new search, or the one that an earlier run with the same settings has begun."""
    # Four points at random, the default among them, before the oracle thinks.
    oracle = Oracle(objective, max_trials=options.trials, num_initial_points=4, seed=1)
    # Trials of other settings cannot be compared.
    project = f"{options.epochs}_epochs-{options.seeds}_seeds{'-smoke' * options.smoke}"
    where = {"directory": options.output, "project_name": project}
    search = Search(oracle, build, executions_per_trial=options.seeds, **where)
    done = len(oracle.end_order)
    if done:
        print(f"Resuming after {done} of {options.trials} trials.")
    return search


def compare(search, ids, labels):
    """All trials, and how the one picked by hand and the best do on test documents."""
    rows = {}
    for trial in search.oracle.trials.values():
        if trial.status == "COMPLETED":
            cost, loss = map(trial.metrics.get_best_value, ("active_flops", "val_loss"))
            row = {"trial": trial.trial_id, "cost": cost, "loss": loss}
            rows[trial.trial_id] = {**row, "values": trial.hyperparameters.values}
    default, budget = search.oracle.start_order[0], search.oracle.objective.budget
    # By their mean losses: the score of a trial is the mean of its runs' scores.
    within = [row for row in rows.values() if row["cost"] <= budget]
    best = min(within, key=lambda row: row["loss"])["trial"]
    results = {}
    for name, trial_id in {"picked by hand": default, "best within budget": best}.items():
        model = search.load_model(search.oracle.get_trial(trial_id))
        loss, accuracy = model.evaluate(ids, labels, batch_size=BATCH_SIZE, verbose=0)
        test = {"test_loss": float(loss), "test_accuracy": float(accuracy)}
        results[name] = {**rows[trial_id], **test}
    trials = sorted(rows.values(), key=lambda row: (row["cost"], row["loss"]))
    return {"budget": budget, "results": results, "trials": trials}


def print_report(report):
    print("\nTrials by active FLOPs per token, with their validation loss")
    for trial in report["trials"]:
        print(f"{trial['trial']}  {trial['cost']:,.0f}  {trial['loss']:.4f}  {trial['values']}")
    columns = {
        "active FLOPs": ("{:,.0f}", "cost"),
        "validation loss": ("{:.4f}", "loss"),
        "test loss": ("{:.4f}", "test_loss"),
        "accuracy": ("{:.2%}", "test_accuracy"),
    }
    print_runs("", {name: [result] for name, result in report["results"].items()}, columns)
    default, best = report["results"].values()
    change = {key: best[key] / default[key] - 1 for key in ("loss", "test_loss")}
    print(f"The best against the one picked by hand: validation loss {change['loss']:+.1%}")
    print(f"(by which it was chosen), test loss {change['test_loss']:+.1%}.")


if __name__ == "__main__":
    main()
