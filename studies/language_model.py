"""Trains a decoder-only language model with a sparse mixture of experts.

    python studies/language_model.py
    python studies/language_model.py --compare --seeds 3
    python studies/language_model.py --router switch --moe-every 2
    python studies/language_model.py --generate "the space shuttle"
    KERAS_BACKEND=jax python studies/language_model.py --expert-parallel 4

Runs on the backend that KERAS_BACKEND names. An interrupted run resumes from the last finished
epoch when the same command is given again. The data are read with TensorFlow Datasets, which needs
TensorFlow on every backend.
"""

import itertools
import pathlib
import typing

import clean_exit  # noqa: F401
import datasets
import keras
import numpy as np
import resuming
import training_curves
from command_line import check_numbers, parser_of
from decoder_model import build_model, write
from id_batches import Batches, rows
from output_folder import claim
from subwords import END, Subwords
from twins import count_parameters, dense_feedforward, moe_every, spread
from whole_files import saved_files, whole, write_json

from keras_moe import callbacks, distribution, inspection, layers, routers


class Size(typing.NamedTuple):
    subwords: int
    length: int
    features: int
    hidden_dim: int
    blocks: int
    documents: int | None
    validation_rows: int
    steps: int
    epochs: int


FULL = Size(
    2000, 64, features=64, hidden_dim=128, blocks=2, documents=None, validation_rows=1024,
    steps=160, epochs=12,
)  # fmt: skip
SMOKE = Size(
    100, 16, features=16, hidden_dim=16, blocks=2, documents=64, validation_rows=32,
    steps=10, epochs=2,
)  # fmt: skip
LEARNING_RATE, WARM_UP, LAST_RATE = 5e-3, 0.08, 0.05
MODEL_FILES = ("model.keras", "subwords.model")
SPARSE, DENSE = "mixture of experts", "dense twin"
# Trained for as long as the mixture, in more steps if they are faster.
DENSE_EQUAL_TIME = "dense twin, equal time"


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "experts", "moe_every", "batch_size", "seeds")
    if options.generate is not None:
        return generate(options.generate, options.output, options.seed)
    check_causal(options)
    claim(options.output)
    if options.expert_parallel is not None:
        # Before any model is made: it decides where weights are.
        keras.distribution.set_distribution(distribution.expert_parallel(options.expert_parallel))
    size = SMOKE if options.smoke else FULL
    subwords, data = load_data(options, size)
    print(f"{data[0].size:,} subwords to learn from, {size.steps * size.epochs} steps")

    progress = options.output / "progress" / digest(options, size)
    names = (SPARSE, DENSE, DENSE_EQUAL_TIME) if options.compare else (SPARSE,)
    results, histories = {name: {"runs": []} for name in names}, {}
    for seed, name in itertools.product(range(options.seeds), names):
        print(f"\n{name}, seed {seed}")
        keras.utils.set_random_seed(seed)
        model = make_model(name, len(subwords), options, size)
        run_size = equal_time(size, results) if name == DENSE_EQUAL_TIME else size
        history = fit(model, data, seed, run_size, options, progress / f"{name}-{seed}")
        results[name]["runs"].append(summary(history))
        results[name].update(count_parameters(model))
        histories.setdefault(name, history)
        if (seed, name) == (0, SPARSE):
            save(model, subwords, options.output)
    report = {"dataset": options.dataset, "router": options.router, "results": results}
    print_report(report)
    write_json(options.output / "results.json", report)
    training_curves.learning_curves(histories, options.output / "learning_curves.png", "loss")
    resuming.forget(progress)
    print(f"\nModel, plot and results are in {options.output}.")
    return report


def load_data(options, size):
    """The subwords, and the rows of ids to learn from and to validate on."""
    texts = datasets.load(options.dataset, options.data_dir)
    train, validation = (split.texts[: size.documents] for split in texts[:2])
    subwords = Subwords.train(train, size.subwords, options.output / "cache")
    data = [rows(subwords.encode(split), size.length) for split in (train, validation)]
    return subwords, (data[0], data[1][: size.validation_rows])


def parse_options(arguments):
    parser = parser_of(__doc__, "twenty_newsgroups", datasets.HELP, experts=16)
    parser.add_argument("--router", default="top_k", help="name of a router of keras_moe")
    parser.add_argument("--moe-every", type=int, default=1, help="every n-th block has experts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--expert-parallel",
        type=int,
        metavar="DEVICES",
        help="devices that share the experts, on JAX; the batch is split over all devices",
    )
    parser.add_argument(
        "--compare", action="store_true", help="train a dense model of equal active size as well"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("language_model"))
    parser.add_argument(
        "--generate", metavar="TEXT", help="go on with a text, by the model in --output"
    )
    parser.add_argument("--seed", type=int, default=0, help="another one writes another text")
    return parser.parse_args(arguments)


def check_causal(options):
    """Refuse routers by which a token would learn of later ones, which it is to predict."""
    router = routers.get(options.router, num_experts=options.experts)
    if not router.causal:
        raise ValueError(
            "The router of a language model must choose the experts of a token without later "
            f"tokens. Received: --router {options.router}. Take one such as top_k or switch."
        )


def digest(options, size):
    """A name for what decides the course of training."""
    names = ("dataset", "experts", "router", "moe_every", "batch_size", "seeds", "compare")
    return resuming.digest(size, *(getattr(options, name) for name in names))


def make_model(name, num_tokens, options, size):
    def sparse():
        bank = layers.FeedForwardExperts(options.experts, size.hidden_dim)
        return layers.MixtureOfExperts(bank, options.router, name="experts")

    # Of routers that give tokens more or fewer experts, the number they aim at.
    top_k = round(sparse().router.mean_top_k)

    def dense():
        return dense_feedforward(top_k, size.hidden_dim, size.features)

    with_experts = sparse if name == SPARSE else dense
    feedforwards = moe_every(options.moe_every, size.blocks, with_experts, dense)
    return build_model(num_tokens, size.length, size.features, feedforwards)


def equal_time(size, results):
    """So many epochs of the dense twin as take the time of the mixture.

    By the fastest epoch of each so far: whatever else a machine does only makes epochs slower.
    """
    sparse, dense = (
        min(run["fastest_ms_per_step"] for run in results[name]["runs"]) for name in (SPARSE, DENSE)
    )
    return size._replace(epochs=max(1, round(size.epochs * sparse / dense)))


def fit(model, data, seed, size, options, folder, learning_rate=LEARNING_RATE):
    """Train, or go on training, and return the history from the first epoch on."""
    train, validation = data
    compile_for_training(model, size.steps * size.epochs, learning_rate)
    monitors = [callbacks.ExpertMonitor()] if inspection.has_moe_layers(model) else []
    batches = Batches(train, options.batch_size, size.steps, seed)
    return resuming.fit(
        model,
        batches.dataset(),
        size.epochs,
        folder,
        [*monitors, batches],
        steps_per_epoch=size.steps,
        validation_data=(validation[:, :-1], validation[:, 1:]),
        validation_batch_size=options.batch_size,
    )


def compile_for_training(model, steps, learning_rate=LEARNING_RATE):
    warm_up = int(WARM_UP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, LAST_RATE, warmup_target=learning_rate, warmup_steps=warm_up
    )
    model.compile(
        optimizer=keras.optimizers.Adam(schedule, beta_2=0.99, clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # PyTorch has no XLA.
        jit_compile=keras.backend.backend() != "torch",
    )


def summary(history):
    return {
        "validation_perplexity": float(np.exp(history["val_loss"][-1])),
        "ms_per_step": float(np.median(history["ms_per_step"])),
        "fastest_ms_per_step": float(np.min(history["ms_per_step"])),
        "epochs": len(history["val_loss"]),
    }


def print_report(report):
    print(
        f"\n{report['dataset']}: {'validation perplexity':>28} {'epochs':>8} {'ms a step':>10}",
        end=" ",
    )
    print(f"{'parameters':>12} {'active':>12}")
    for name, result in report["results"].items():
        perplexities = [run["validation_perplexity"] for run in result["runs"]]
        perplexity = spread(perplexities, "{:.2f}")
        epochs, ms = (
            np.mean([run[key] for run in result["runs"]]) for key in ("epochs", "ms_per_step")
        )
        print(f"{name:<27} {perplexity:>20} {epochs:>8.1f} {ms:>10.0f}", end=" ")
        print(f"{result['parameters']:>12,} {result['active_parameters']:>12,}")


def save(model, subwords, output):
    with whole(*(output / name for name in MODEL_FILES)) as parts:
        model.save(parts[0])
        subwords.save(parts[1])


def generate(text, output, seed):
    """Print and return a text that goes on from `text`, by a model saved under any backend."""
    model_path, subwords_path = saved_files(output, *MODEL_FILES)
    model = keras.saving.load_model(model_path, compile=False)
    subwords = Subwords.load(subwords_path)
    ids = np.concatenate([[END], subwords.encode([text])[0][:-1]])
    if len(ids) >= model.input_shape[1]:
        raise ValueError(
            f"The text must leave room in the model's window of {model.input_shape[1]} subwords. "
            f"Received: a text of {len(ids)}. Pass a shorter one."
        )
    (written,) = subwords.decode([write(model, ids, seed=seed)[1:]])
    print(written)
    return written


if __name__ == "__main__":
    main()
