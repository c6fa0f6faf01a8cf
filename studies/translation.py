"""Translates with a sparse Mixture-of-Experts Transformer, from Spanish to English.

    KERAS_BACKEND=jax python studies/translation.py
    KERAS_BACKEND=jax python studies/translation.py --compare --seeds 3
    KERAS_BACKEND=jax python studies/translation.py --report --log-dir logs
    KERAS_BACKEND=jax python studies/translation.py --translate "Y el rey habló a su pueblo."

Runs on the backend that KERAS_BACKEND names; JAX is the fastest on a CPU. An interrupted run
resumes from the last finished epoch when the same command is given again. The data are read with
TensorFlow Datasets, which needs TensorFlow on every backend.
"""

import functools
import json
import pathlib
import typing

import clean_exit  # noqa: F401
import expert_heat_maps
import keras
import numpy as np
import resuming
import training
import training_curves
from bilingual_embedding import bilingual_embedding
from command_line import check_numbers, parser_of
from comparison_table import interval
from datasets import pairs
from output_folder import claim
from piece_kinds import KINDS, frequent_pieces, ids_by_layer, kind_of_each, usage_by_kind
from sentence_batches import SentenceBatches, Shapes
from subwords import Subwords
from translation_scores import scores, translation_memory
from translator import Translator
from twins import count_parameters, dense_feedforward, moe_every, spread
from usage_table import print_usage
from whole_files import saved_files, whole, write_json
from writing import write

import keras_moe
from keras_moe import layers, losses, routers


class Size(typing.NamedTuple):
    vocabulary: int
    features: int
    hidden_dim: int
    blocks: int
    shapes: Shapes
    pairs: int | None


FULL = Size(4000, 128, 256, blocks=2, shapes=Shapes((24, 32, 48), 1024), pairs=None)
SMOKE = Size(300, 8, 8, blocks=1, shapes=Shapes((64,), 512), pairs=256)
DROPOUT = 0.1
TWIN = "dense twin"
SIDES = ("encoder", "decoder")
MODEL_FILES = ("model.keras", "subwords.model", "shapes.json")


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "experts", "top_k", "moe_every", "epochs", "seeds", "beams")
    if options.translate is not None:
        return translate(options.translate, options.output, options.beams)
    claim(options.output)
    size = size_of(options)
    data = pairs.load(options.dataset, options.data_dir, options.reverse)
    data = pairs.ParallelDataset(*(cut(split, size.pairs) for split in data))
    subwords = Subwords.train(
        [*data.train.sources, *data.train.targets], size.vocabulary, options.output
    )
    train, validation = (batches_of(subwords, split, size) for split in data[:2])
    if not len(train) or not len(validation):
        raise ValueError(
            f"No pair of `--dataset {options.dataset}` is short enough to train with. Received: "
            f"all of more than {size.shapes.lengths[-1]} pieces. Take data of shorter texts."
        )
    if train.left_out:
        print(f"{train.left_out} pairs of more than {size.shapes.lengths[-1]} pieces are left out.")
    embedding = bilingual_embedding(train, len(subwords), size.features)
    feedforwards = {"mixture of experts": expert_feedforward}
    if options.compare:
        feedforwards[TWIN] = twin_feedforward
    unfinished = options.output / "unfinished" / settings_name(options)
    results, histories = {}, {}
    for name, feedforward in feedforwards.items():
        runs = []
        for seed in range(options.seeds):
            print(f"\n{name}, seed {seed}")
            keras.utils.set_random_seed(seed)
            model = build_model(feedforward, len(subwords), options, size)
            model.embedding.embeddings.assign(embedding)
            folder = unfinished / f"{name.replace(' ', '-')}-{seed}"
            # One run in TensorBoard: the curves of several would stand on top of each other.
            log_dir = options.log_dir if seed == 0 else None
            history = training.fit(model, train, validation, options.epochs, folder, log_dir)
            runs.append(test(model, subwords, data.test, size.shapes, options.beams, folder))
            if seed == 0:
                histories[name] = history
                if name == "mixture of experts":
                    shown = model
        results[name] = {"runs": runs, **count_parameters(model)}

    memory = scores(translation_memory(data.test.sources, data.train), data.test.targets)
    report = {
        "dataset": options.dataset,
        "reverse": options.reverse,
        "results": results,
        "translation memory": memory,
    }
    usage = usage_by_kind(shown, subwords, validation)
    print_report(report, usage)
    save(shown, subwords, size.shapes, options.output)
    write_json(options.output / "results.json", report)
    training_curves.learning_curves(histories, options.output / "learning_curves.png")
    expert_heat_maps.experts_by_class(usage, KINDS, options.output / "experts_by_kind.png")
    expert_heat_maps.experts_by_layer(usage, options.output / "experts_by_layer.png")
    if options.report:
        write_report(shown, subwords, validation, options.output / "report.html")
    resuming.forget(unfinished)
    print(f"\nModel, plots and results are in {options.output}.")
    return report


def parse_options(arguments):
    data = (
        f"{', '.join(pairs.BUILT_IN)}, or any data set of TFDS from text to text, such as "
        "ted_hrlr_translate/pt_to_en"
    )
    parser = parser_of(__doc__, "bible_es_en", data, experts=8, units="sentences")
    parser.add_argument("--reverse", action="store_true", help=pairs.REVERSE)
    parser.add_argument("--top-k", type=int, default=2, help="experts that serve each piece")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--moe-every", type=int, default=1, help="every n-th block has experts")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[*SIDES], help="which sides have experts"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--beams", type=int, default=4, help="1 writes greedily")
    parser.add_argument(
        "--compare", action="store_true", help="train a dense model of equal active size as well"
    )
    parser.add_argument("--log-dir", help="folder for TensorBoard")
    parser.add_argument(
        "--report", action="store_true", help="write a page about the experts to --output"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("translator"))
    parser.add_argument("--translate", metavar="TEXT", help="use the model in --output")
    return parser.parse_args(arguments)


def size_of(options):
    return SMOKE if options.smoke else FULL


def settings_name(options):
    """A name for all that a run depends on: another command does not go on with this one's."""
    names = ["dataset", "reverse", "experts", "top_k", "balance", "moe_every", "sides"]
    settings = [getattr(options, name) for name in (*names, "epochs", "beams", "seeds", "compare")]
    return resuming.digest(size_of(options), DROPOUT, *settings)


def cut(split, number):
    return pairs.Pairs(split.sources[:number], split.targets[:number])


def batches_of(subwords, split, size):
    return SentenceBatches(
        subwords.encode(split.sources), subwords.encode(split.targets), size.shapes
    )


def expert_feedforward(options, size):
    return layers.MixtureOfExperts(
        layers.FeedForwardExperts(options.experts, size.hidden_dim),
        routers.TopKRouter(top_k=options.top_k),
        [losses.LoadBalance(options.balance), "router_z"],
        name="experts",
    )


def twin_feedforward(options, size):
    return dense_feedforward(options.top_k, size.hidden_dim, size.features)


def build_model(feedforward, vocabulary_size, options, size):
    encoder, decoder = (
        moe_every(
            options.moe_every,
            size.blocks,
            functools.partial(
                feedforward if side in options.sides else twin_feedforward, options, size
            ),
            functools.partial(twin_feedforward, options, size),
        )
        for side in SIDES
    )
    model = Translator(vocabulary_size, size.features, encoder, decoder, dropout=DROPOUT)
    model.build({"source": (None, None), "target": (None, None)})
    return model


def test(model, subwords, split, shapes, beams, folder):
    """BLEU and chrF on the test split, greedily and with beams; kept in `folder`."""
    path = folder / "scores.json"
    if not path.exists():
        by_width = {}
        for width in {1, beams}:
            texts, speed = write(model, subwords, split.sources, shapes, width)
            by_width[width] = {**scores(texts, split.targets), "pieces_per_second": speed}
        result = {"greedy": by_width[1], "beams": by_width[beams]}
        write_json(path, result)
    return json.loads(path.read_text(encoding="utf-8"))


def print_report(report, usage):
    print(f"\n{report['dataset']}, test: {'BLEU':>22} {'chrF':>6} {'greedy BLEU':>12}", end=" ")
    print(f"{'pieces/s':>9} {'parameters':>12} {'active':>12}")
    for name, result in report["results"].items():
        bleu, chrf, greedy, speed = (
            # Nothing was written, so there is no speed: None, which becomes NaN.
            np.array([run[search][key] for run in result["runs"]], "float64")
            for search, key in (
                ("beams", "bleu"),
                ("beams", "chrf"),
                ("greedy", "bleu"),
                ("greedy", "pieces_per_second"),
            )
        )
        shown = spread(bleu, "{:.2f}")
        print(f"{name:<25} {shown:>15} {chrf.mean():>6.2f} {greedy.mean():>12.2f}", end=" ")
        print(f"{speed.mean():>9.0f} {result['parameters']:>12,}", end=" ")
        print(f"{result['active_parameters']:>12,}")
    if TWIN in report["results"]:
        print_differences(*(result["runs"] for result in report["results"].values()))
    memory = report["translation memory"]
    print(f"{'translation memory':<25} {memory['bleu']:>15.2f} {memory['chrf']:>6.2f}")
    print_usage(usage)


def print_differences(runs, twin_runs):
    """Of runs with one seed: the mean and half of its 95% interval."""
    differences = {
        key: [run["beams"][key] - twin["beams"][key] for run, twin in zip(runs, twin_runs)]
        for key in ("bleu", "chrf")
    }
    bleu, chrf = (interval(values) for values in differences.values())
    print(f"{'difference':<25} BLEU {bleu}, chrF {chrf}")


def save(model, subwords, shapes, output):
    with whole(*(output / name for name in MODEL_FILES)) as parts:
        model.save(parts[0])
        subwords.save(parts[1])
        write_json(parts[2], shapes._asdict())


def write_report(model, subwords, split, path, sentences=200):
    """A page about the experts, with the pieces of sentences coloured by expert.

    Each layer shows the side it works on; the labels are the kinds of the pieces.
    """
    longest = split.shapes.lengths[-1]
    batches = SentenceBatches(split.sources, split.targets, Shapes((longest,), sentences * longest))
    inputs, _, _ = next(iter(batches))
    pieces = np.array([subwords.piece(n) for n in range(len(subwords))])
    kinds = np.array(KINDS)[kind_of_each(subwords, frequent_pieces(batches))]
    seen = ids_by_layer(model, inputs)
    labels, tokens = ({name: of[ids] for name, ids in seen.items()} for of in (kinds, pieces))
    keras_moe.report(model, inputs, labels, tokens, path)


def translate(text, output, beams):
    """Print and return the translation of a text, with a model saved under any backend."""
    paths = saved_files(output, *MODEL_FILES)
    if not text.strip():
        raise ValueError(f"The text to translate must hold a word. Received: {text!r}.")
    subwords = Subwords.load(paths[1])
    shapes = Shapes(**json.loads(paths[2].read_text(encoding="utf-8")))
    (row,), longest = subwords.encode([text]), shapes.lengths[-1]
    if len(row) > longest:
        raise ValueError(
            f"The text must have at most {longest} pieces of words, which is what the model was "
            f"trained on. Received: {len(row)} pieces. Translate one sentence at a time."
        )
    model = keras.saving.load_model(paths[0], compile=False)
    (translation,), _ = write(model, subwords, [text], shapes, beams)
    print(translation)
    return translation


if __name__ == "__main__":
    main()
