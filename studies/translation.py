"""Translates with a sparse Mixture-of-Experts Transformer, from Spanish to English.

KERAS_BACKEND=jax python studies/translation.py
KERAS_BACKEND=jax python studies/translation.py --compare --seeds 3
KERAS_BACKEND=jax python studies/translation.py --compare --seeds 3 \\
    --epochs 4 --sides decoder --experts 32
"""

import time
import typing

import datasets
import keras
import plots
import resuming
from command_line import parser_of, positive
from comparisons import (
    count_parameters,
    course,
    dense_feedforward,
    each_run,
    is_sparse,
    print_comparison,
    step_times,
)
from decoding import write
from files import claim
from sentence_batches import SentenceBatches, Shapes
from subwords import Subwords
from translations import (
    METRICS,
    print_differences,
    print_drawn,
    print_words,
    score,
    words_by_expert,
)
from translator import SmoothedCrossentropy, Translator, bilingual_embedding

from keras_moe import callbacks, layers, losses, routers


class Size(typing.NamedTuple):
    vocabulary: int
    features: int
    hidden_dim: int
    blocks: int
    shapes: Shapes
    pairs: int | None


FULL = Size(4000, 128, 256, blocks=2, shapes=Shapes((24, 32, 48), 1024), pairs=None)
SMOKE = Size(300, 8, 8, blocks=1, shapes=Shapes((64,), 512), pairs=256)
DROPOUT, LABEL_SMOOTHING, LEARNING_RATE, WARM_UP = 0.1, 0.1, 2e-3, 400
MIXTURE, DENSE = "mixture of experts", "dense"
SIDES = ("encoder", "decoder")


class Setting(typing.NamedTuple):
    """A translator and its training. The width of the active experts is the same in all."""

    experts: int = 8
    top_k: int = 2
    balance: float = 0.01
    sides: tuple[str, ...] = SIDES


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    subwords, splits = load_data(options.dataset, options, size)
    train, validation = (batches_of(subwords, split, size) for split in splits[:2])
    print(f"{train.left_out} pairs of more than {size.shapes.lengths[-1]} pieces are left out.")
    setting = Setting(experts=options.experts, sides=tuple(options.sides))
    settings = (options.dataset, setting, options.epochs, options.beams)
    folder = options.output / "runs" / resuming.digest(size, DROPOUT, *settings)

    def make(name):
        model = build_model(setting, train, len(subwords), size, sparse=name == MIXTURE)
        compile_for_training(model, options.epochs * len(train))
        return model

    def run(name, seed, ms_per_step):
        def train_and_translate(progress):
            resuming.say(f"{name}, seed {seed}")
            keras.utils.set_random_seed(seed)
            model = make(name)
            losses = fit(model, train, validation, options.epochs, progress)["val_loss"]
            texts = write(model, subwords, splits[2].sources, size.shapes, options.beams)
            words = words_by_expert(model, validation, subwords) if is_sparse(model) else []
            return {"losses": losses, "texts": texts, "words": words, **count_parameters(model)}

        kept = resuming.once(folder / f"{name.replace(' ', '-')}-{seed}", train_and_translate)
        steps = [len(train) * epoch for epoch in range(1, 1 + options.epochs)]
        scores = score(kept["texts"], splits[2].targets)
        return {**kept, **scores, **course(kept["losses"], steps, ms_per_step[name])}

    names = (DENSE, MIXTURE) if options.compare else (MIXTURE,)
    options.seeds = range(options.seeds)
    ms_per_step = step_times(make, names, next(iter(train)), folder, time.process_time)
    *_, results = each_run(options, names, run, ms_per_step)
    print_comparison(results, **{name: ("{:.2f}", name) for name in METRICS})
    runs = {name: [*by_seed.values()] for name, by_seed in results.items()}
    if options.compare:
        print_differences(runs[MIXTURE], runs[DENSE], splits[2].targets)
    print_words(runs[MIXTURE][0]["words"])
    texts = {name: each[0]["texts"] for name, each in runs.items()}
    print_drawn({"source": splits[2].sources, "reference": splits[2].targets, **texts})
    path = options.output / "learning_curves.png"
    plots.at_equal_cost(runs, path, "validation loss", begin=0)
    print(f"\nPlot and results are in {options.output}.")
    return results


def parse_options(arguments):
    parser = parser_of(__doc__, "translator", datasets.PAIRS)
    parser.add_argument("--experts", type=positive, default=8)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[*SIDES], help="which sides have experts"
    )
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--beams", type=positive, default=4)
    parser.add_argument("--compare", action="store_true", help="train dense models as well")
    return parser.parse_args(arguments)


def load_data(name, options, size, reverse=False):
    """Subwords of both languages, and `Pairs` for training, validation and test."""
    splits = datasets.load_pairs(name, options.data_dir, reverse)
    splits = [cut(split, size.pairs) for split in splits]
    texts = [*splits[0].sources, *splits[0].targets]
    return Subwords.train(texts, size.vocabulary, options.output / "cache"), splits


def cut(split, number):
    return datasets.Pairs(split.sources[:number], split.targets[:number])


def batches_of(subwords, split, size):
    return SentenceBatches(
        subwords.encode(split.sources), subwords.encode(split.targets), size.shapes
    )


def build_model(setting, train, vocabulary_size, size, sparse):
    width = 2 * size.hidden_dim // setting.top_k

    def feedforward(side):
        if not sparse or side not in setting.sides:
            return dense_feedforward(setting.top_k, width, size.features)
        return layers.MixtureOfExperts(
            layers.FeedForwardExperts(setting.experts, width),
            routers.TopKRouter(top_k=setting.top_k),
            [losses.LoadBalance(setting.balance), "router_z"],
            name="experts",
        )

    encoder, decoder = ([feedforward(side) for _ in range(size.blocks)] for side in SIDES)
    model = Translator(vocabulary_size, size.features, encoder, decoder, dropout=DROPOUT)
    embedding = bilingual_embedding(train, vocabulary_size, size.features)
    model.embedding.embeddings.assign(embedding)
    return model


def compile_for_training(model, steps):
    warm_up = min(WARM_UP, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=LEARNING_RATE, warmup_steps=warm_up
    )
    model.compile(
        optimizer=keras.optimizers.Adam(schedule, beta_2=0.98, global_clipnorm=1.0),
        loss=SmoothedCrossentropy(LABEL_SMOOTHING),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=resuming.HAS_XLA,
    )


def fit(model, train, validation, epochs, folder):
    """Train on `SentenceBatches`, or resume training, and return the whole history."""
    monitors = [callbacks.ExpertMonitor()] if is_sparse(model) else []
    return resuming.fit(
        model,
        train.dataset(),
        epochs,
        folder,
        [*monitors, train],
        validation_data=validation.dataset(),
    )


if __name__ == "__main__":
    main()
