"""Trains a decoder-only language model with a sparse mixture of experts.

python studies/language_model.py
python studies/language_model.py --compare --seeds 3
KERAS_BACKEND=jax python studies/language_model.py --expert-parallel 4
"""

import itertools
import typing

import datasets
import keras
import numpy as np
import plots
import resuming
from command_line import parser_of, positive
from comparisons import PARAMETERS, count_parameters, dense_feedforward, is_sparse, print_runs
from files import claim, write_json
from id_batches import Batches, rows
from subwords import Subwords

from keras_moe import callbacks, distribution, layers


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
NUM_HEADS, BATCH_SIZE = 4, 32
LEARNING_RATE, WARM_UP, LAST_RATE = 5e-3, 0.08, 0.05
SPARSE, DENSE = "mixture of experts", "dense twin"
# Trained for as long as the mixture, in more steps if they are faster.
DENSE_EQUAL_TIME = "dense twin, equal time"


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    if options.expert_parallel is not None:
        # Before any model is made: it decides where weights are.
        keras.distribution.set_distribution(distribution.expert_parallel(options.expert_parallel))
    size = SMOKE if options.smoke else FULL
    num_tokens, data = load_data(options.dataset, options, size)
    print(f"{data[0].size:,} subwords to learn from, {size.steps * size.epochs} steps")

    settings = (options.dataset, options.experts, options.seeds, options.compare)
    progress = options.output / "progress" / resuming.digest(size, *settings)
    names = (SPARSE, DENSE, DENSE_EQUAL_TIME) if options.compare else (SPARSE,)
    results: dict = {name: [] for name in names}
    histories: dict = {}
    for seed, name in itertools.product(range(options.seeds), names):
        resuming.say(f"{name}, seed {seed}")
        keras.utils.set_random_seed(seed)
        model = make_model(num_tokens, size, options.experts, sparse=name == SPARSE)
        run_size = equal_time(size, results) if name == DENSE_EQUAL_TIME else size
        history = fit(model, data, seed, run_size, progress / f"{name}-{seed}")
        results[name].append({**summary(history), **count_parameters(model)})
        histories.setdefault(name, [history])
    report = {"dataset": options.dataset, "results": results}
    perplexity = {"validation perplexity": ("{:.2f}", "validation_perplexity")}
    print_runs(
        options.dataset, results, {**perplexity, "epochs": ("{:.1f}", "epochs"), **PARAMETERS}
    )
    write_json(options.output / "results.json", report)
    path = options.output / "learning_curves.png"
    plots.courses({options.dataset: histories}, path, ["epochs"], "val_loss")
    resuming.forget(progress)
    print(f"\nPlot and results are in {options.output}.")
    return report


def parse_options(arguments):
    parser = parser_of(__doc__, "language_model", datasets.TEXTS)
    parser.add_argument("--experts", type=positive, default=16)
    parser.add_argument("--compare", action="store_true", help="train dense models as well")
    parser.add_argument(
        "--expert-parallel", type=int, metavar="N", help="so many devices share the experts, on JAX"
    )
    return parser.parse_args(arguments)


def load_data(dataset, options, size):
    """The number of subwords, and the rows of ids to learn from and to validate on."""
    texts = datasets.load(dataset, options.data_dir)
    train, validation = (split.texts[: size.documents] for split in texts[:2])
    subwords = Subwords.train(train, size.subwords, options.output / "cache")
    data = [rows(subwords.encode(split), size.length) for split in (train, validation)]
    return len(subwords), (data[0], data[1][: size.validation_rows])


def make_model(num_tokens, size, experts, sparse):
    def mixture():
        bank = layers.FeedForwardExperts(experts, size.hidden_dim)
        return layers.MixtureOfExperts(bank, name="experts")

    top_k = mixture().router.max_top_k

    def dense():
        return dense_feedforward(top_k, size.hidden_dim, size.features)

    feedforwards = [mixture() if sparse else dense() for _ in range(size.blocks)]
    return build_model(num_tokens, size, feedforwards)


def build_model(num_tokens, size, feedforwards):
    """A model from ids (batch, length) to the logits of the next ids, one block a feed-forward."""
    ids = keras.Input((size.length,), dtype="int32")
    hidden = keras.layers.Embedding(num_tokens, size.features, name="embedding")(ids)
    for feedforward in feedforwards:
        hidden = layers.TransformerDecoderBlock(NUM_HEADS, feedforward)(hidden)
    hidden = keras.layers.LayerNormalization()(hidden)
    return keras.Model(ids, keras.layers.Dense(num_tokens, dtype="float32")(hidden))


def equal_time(size, results):
    """So many epochs of the dense twin as take the time of the mixture.

    By the fastest epoch of each so far: whatever else a machine does only makes epochs slower.
    """
    sparse, dense = (
        min(run["fastest_ms_per_step"] for run in results[name]) for name in (SPARSE, DENSE)
    )
    return size._replace(epochs=max(1, round(size.epochs * sparse / dense)))


def fit(model, data, seed, size, folder, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE):
    """Train on rows of ids, or resume training, and return the whole history."""
    compile_for_training(model, size.steps * size.epochs, learning_rate)
    return fit_compiled(model, data, seed, size, folder, batch_size)


def fit_compiled(model, data, seed, size, folder, batch_size=BATCH_SIZE):
    """As `fit`, with the model's own optimizer."""
    train, held_out = data
    monitors = [callbacks.ExpertMonitor()] if is_sparse(model) else []
    batches = Batches(train, batch_size, size.steps, seed)
    return resuming.fit(
        model,
        batches.dataset(),
        size.epochs,
        folder,
        [*monitors, batches],
        steps_per_epoch=size.steps,
        validation_data=(held_out[:, :-1], held_out[:, 1:]),
        validation_batch_size=batch_size,
    )


def evaluate(model, held_out, batch_size=BATCH_SIZE):
    """The loss of a compiled model on rows of ids."""
    ids, following = held_out[:, :-1], held_out[:, 1:]
    return float(model.evaluate(ids, following, batch_size=batch_size, verbose=0))


def compile_for_training(model, steps, learning_rate=LEARNING_RATE):
    warm_up = int(WARM_UP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, LAST_RATE, warmup_target=learning_rate, warmup_steps=warm_up
    )
    model.compile(
        optimizer=keras.optimizers.Adam(schedule, beta_2=0.99, clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=resuming.HAS_XLA,
    )


def summary(history):
    return {
        "validation_perplexity": float(np.exp(history["val_loss"][-1])),
        "ms_per_step": float(np.median(history["ms_per_step"])),
        "fastest_ms_per_step": float(np.min(history["ms_per_step"])),
        "epochs": len(history["val_loss"]),
    }


if __name__ == "__main__":
    main()
