"""Translates with a sparse Mixture-of-Experts Transformer, from Spanish to English.

KERAS_BACKEND=jax python studies/translation.py
KERAS_BACKEND=jax python studies/translation.py --compare --seeds 3
KERAS_BACKEND=jax python studies/translation.py --sides decoder --experts 32
"""

import json
import typing

import datasets
import keras
import numpy as np
import plots
import resuming
import sacrebleu
from command_line import parser_of, positive
from comparisons import (
    PARAMETERS,
    count_parameters,
    dense_feedforward,
    interval,
    is_sparse,
    print_runs,
)
from decoding import write
from files import claim, write_json
from sentence_batches import SentenceBatches, Shapes
from subwords import Subwords
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
MIXTURE, TWIN = "mixture of experts", "dense twin"
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
    settings = (options.dataset, setting, options.epochs, options.beams, options.seeds)
    digest = resuming.digest(size, DROPOUT, options.compare, *settings)
    unfinished = options.output / "unfinished" / digest
    results: dict = {}
    histories: dict = {}
    for name in (MIXTURE, TWIN) if options.compare else (MIXTURE,):
        results[name] = []
        for seed in range(options.seeds):
            resuming.say(f"{name}, seed {seed}")
            keras.utils.set_random_seed(seed)
            model = build_model(setting, train, len(subwords), size, sparse=name == MIXTURE)
            folder = unfinished / f"{name.replace(' ', '-')}-{seed}"
            history = fit(model, train, validation, options.epochs, folder)
            histories.setdefault(name, []).append(history)
            scores = test(model, subwords, splits[2], size.shapes, options.beams, folder)
            ms = float(np.median(history["ms_per_step"]))
            run = {**scores, "ms_per_step": ms, **count_parameters(model)}
            results[name].append(run)

    report = {"dataset": options.dataset, "results": results}
    scored = {"BLEU": ("{:.2f}", "bleu"), "chrF": ("{:.2f}", "chrf")}
    print_runs(options.dataset, results, {**scored, **PARAMETERS})
    if options.compare:
        print_differences(results[MIXTURE], results[TWIN])
    write_json(options.output / "results.json", report)
    path = options.output / "learning_curves.png"
    plots.courses({options.dataset: histories}, path, ["epochs"], "val_accuracy")
    resuming.forget(unfinished)
    print(f"\nPlot and results are in {options.output}.")
    return report


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


def fit(model, train, validation, epochs, folder):
    """Train on `SentenceBatches`, or resume training, and return the whole history."""
    steps = epochs * len(train)
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
    monitors = [callbacks.ExpertMonitor()] if is_sparse(model) else []
    return resuming.fit(
        model,
        train.dataset(),
        epochs,
        folder,
        [*monitors, train],
        validation_data=validation.dataset(),
    )


def test(model, subwords, split, shapes, beams, folder):
    """BLEU and chrF on the test split, each from 0 to 100; kept in `folder`."""
    path = folder / "scores.json"
    if not path.exists():
        texts = write(model, subwords, split.sources, shapes, beams)
        bleu = sacrebleu.corpus_bleu(texts, [split.targets]).score
        write_json(
            path, {"bleu": bleu, "chrf": sacrebleu.corpus_chrf(texts, [split.targets]).score}
        )
    return json.loads(path.read_text(encoding="utf-8"))


def print_differences(runs, twins):
    """Of runs with one seed: the mean and half of its 95% interval."""
    for key in ("bleu", "chrf"):
        differences = [run[key] - twin[key] for run, twin in zip(runs, twins)]
        print(f"difference in {key}: {interval(differences)}")


if __name__ == "__main__":
    main()
