"""Classifies text with a sparse Mixture-of-Experts Transformer.

python studies/text_classification.py
python studies/text_classification.py --compare --seeds 3
"""

import colorsys
import functools
import os
import pathlib
import sys
import time
import typing

import datasets
import keras
import numpy as np
import plots
from command_line import parser_of, positive
from comparisons import (
    compile_classifier,
    count_parameters,
    dense_feedforward,
    interval,
    is_sparse,
    print_runs,
    shuffled_batches,
)
from files import claim, save_figure, write_json
from phrase_embedding import PhraseEmbedding
from resuming import StepTimer, say
from vocabulary import Vocabulary, split_words

import keras_moe
from keras_moe import callbacks, inspection, layers, metrics, routers, visualization


class Size(typing.NamedTuple):
    words: int
    bigrams: int
    length: int
    phrase_length: int
    features: int
    hidden_dim: int
    documents: int | None


FULL = Size(40_000, 50_021, 400, 16, features=64, hidden_dim=256, documents=None)
SMOKE = Size(500, 251, 32, 4, features=16, hidden_dim=16, documents=256)
HAS_COLOURS = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
HAS_COLOURS = HAS_COLOURS and os.environ.get("TERM") != "dumb"
TOP_K, BATCH_SIZE, LEARNING_RATE, LABEL_SMOOTHING = 2, 128, 3e-3, 0.3


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    data = load(options.dataset, options.data_dir, size)
    results: dict = {}
    histories, models = {}, {}
    for name in ("mixture of experts", "dense")[: 1 + options.compare]:
        experts = options.experts if name == "mixture of experts" else None
        feedforward = functools.partial(feedforward_of, experts, size)
        results[name] = []
        for seed in range(options.seeds):
            say(f"{name}, seed {seed}")
            keras.utils.set_random_seed(seed)
            model = build_model(feedforward, data.vocabulary, size, len(data.class_names))
            history, run = fit(model, data.arrays, options.epochs)
            histories.setdefault(name, []).append(history)
            models.setdefault(name, model)
            results[name].append(run)
    if options.compare:
        say("logistic regression")
        results["logistic regression"] = [logistic_regression(*data.splits)]

    report = {"dataset": options.dataset, "results": results}
    write_json(options.output / "results.json", report)
    path = options.output / "learning_curves.png"
    plots.courses({options.dataset: histories}, path, ["epochs"], "val_accuracy")
    page = show_experts(models["mixture of experts"], data, size, options.output)
    columns = {
        "test accuracy": (functools.partial(interval, form=".2%"), "test_accuracy"),
        "seconds": (lambda values: f"{np.mean(values):.0f}", "seconds"),
        "weights": ("{:,.0f}", "parameters"),
    }
    print_runs(options.dataset, results, columns)
    print("Seconds: CPU time of training. After +-: half-width of the 95% interval over seeds.")
    if options.compare:
        mixture, dense, _ = results.values()
        active = [f"{runs[0]['active_parameters']:,}" for runs in (mixture, dense)]
        print("For a phrase, {} weights of the mixture are used and {}".format(*active))
        print("of the dense model, besides the embeddings of its words.")
        print(verdict(mixture, dense, len(data.splits[0].texts)))
    print(f"\nA page about the experts: {page}\nPlots and results: {options.output}")
    return report


def parse_options(arguments):
    parser = parser_of(__doc__, None, datasets.TEXTS)
    parser.add_argument("--experts", type=positive, default=8)
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--compare", action="store_true", help="train dense models as well")
    options = parser.parse_args(arguments)
    options.output = options.output or pathlib.Path("text_classifier") / options.dataset
    return options


class Data(typing.NamedTuple):
    """Training, validation and test as texts, and as arrays of ids and one-hot classes."""

    vocabulary: Vocabulary
    splits: list
    arrays: list
    class_names: list


def load(name, data_dir, size):
    data = datasets.load(name, data_dir)
    splits = [
        datasets.Split(split.texts[: size.documents], split.labels[: size.documents])
        for split in data[:3]
    ]
    vocabulary = Vocabulary.learn(splits[0].texts, size.words, size.length)
    labels = (keras.utils.to_categorical(each.labels, len(data.class_names)) for each in splits)
    arrays = [*zip((vocabulary.encode(split.texts) for split in splits), labels)]
    return Data(vocabulary, splits, arrays, data.class_names)


def feedforward_of(experts, size):
    """A mixture; without a number of experts a dense layer as wide as those of a token."""
    if experts is None:
        return dense_feedforward(TOP_K, size.hidden_dim, size.features)
    return layers.MixtureOfExperts(
        layers.FeedForwardExperts(experts, size.hidden_dim),
        router=routers.TopKRouter(experts, top_k=TOP_K),
        name="experts",
    )


def build_model(feedforward, vocabulary, size, num_classes):
    sizes = len(vocabulary.words), size.bigrams, size.features, size.phrase_length
    embedding = PhraseEmbedding(*sizes, word_dropout=0.3, name="phrases")
    block = layers.TransformerEncoderBlock(num_heads=4, feedforward=feedforward(), dropout=0.5)
    ids = keras.Input((vocabulary.length,), dtype="int32")
    phrases = embedding(ids)
    embedding.salience.assign([0.0, 0.0, *vocabulary.salience])
    contexts = keras.layers.LayerNormalization()(block(Detached()(phrases)))
    # The plain mean of the phrases stays next to that of the encoder, which alone overfits.
    document = [
        keras.layers.LayerNormalization()(keras.layers.GlobalAveragePooling1D()(sequence))
        for sequence in (phrases, contexts)
    ]
    document = keras.layers.Dropout(0.6)(keras.layers.Concatenate()(document))
    logits = keras.layers.Dense(num_classes, dtype="float32")(document)
    return keras.Model(ids, logits)


class Detached(keras.layers.Layer):
    """Identity without a gradient.

    Embeddings of rare words overfit to whatever the encoder says of their few documents; the plain
    mean teaches them better.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        return keras.ops.stop_gradient(inputs)


def fit(model, arrays, epochs):
    """Train, then read the test accuracy once."""
    train, validation, test = arrays
    batches = shuffled_batches(*train, BATCH_SIZE)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=LABEL_SMOOTHING)
    compile_classifier(model, loss, LEARNING_RATE, epochs * len(batches))
    timer, monitors, start = StepTimer(), [], time.process_time()
    if is_sparse(model):
        monitors = [callbacks.ExpertMonitor(), callbacks.ExpertHealth()]
    history = model.fit(
        batches,
        shuffle=False,  # they are shuffled already
        epochs=epochs,
        validation_data=whole_batches(*validation),
        validation_batch_size=BATCH_SIZE,
        callbacks=[*monitors, timer],
        verbose=0,
    ).history
    seconds = time.process_time() - start
    history["epochs"] = [*range(1, 1 + epochs)]
    _, accuracy = model.evaluate(*test, batch_size=BATCH_SIZE, verbose=0)
    counts = count_parameters(model)
    counts["active_parameters"] -= model.get_layer("phrases").count_params()
    run = {
        "test_accuracy": float(accuracy),
        "validation_accuracy": history["val_accuracy"][-1],
        "seconds": seconds,
        "ms_per_step": timer.ms_per_step[-1],
        **counts,
    }
    return history, run


def whole_batches(*arrays):
    """The rows that fill batches: XLA would compile a last, smaller batch for itself."""
    number = max(1, len(arrays[0]) // BATCH_SIZE) * BATCH_SIZE
    return [each[:number] for each in arrays]


def verdict(mixture, dense, documents):
    """A sentence about what the comparison shows."""
    means = (np.mean([run["test_accuracy"] for run in runs]) for runs in (mixture, dense))
    gain = float(np.subtract(*means))
    if abs(gain) > 0.01:
        word = "better" if gain > 0 else "worse"
        return f"The mixture is {word} than the dense model by {abs(gain):.1%}."
    return (
        f"Mixture and dense model are about equal: {documents:,} documents are few, and dense "
        "layers\nlearn them as well. Experts gain where there is more to learn."
    )


def logistic_regression(train, validation, test):
    """A linear model of TF-IDF, which has no use for a validation split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=300)
    )
    start = time.process_time()
    model.fit(train.texts + validation.texts, np.concatenate([train.labels, validation.labels]))
    seconds = time.process_time() - start
    accuracy = float(model.score(test.texts, test.labels))
    return {"test_accuracy": accuracy, "seconds": seconds, "parameters": model[-1].coef_.size}


def show_experts(model, data, size, folder, per_class=64, documents=300):
    """Print what experts do, draw it, and return the path of a page about them.

    A token is a phrase: each word is served by the experts of its phrase.
    """
    texts, labels = data.splits[2]
    shown = np.concatenate(
        [np.flatnonzero(labels == label)[:per_class] for label in range(len(data.class_names))]
    )
    classes = np.array(data.class_names)[labels]
    phrases = [phrases_of(texts[row], size) for row in shown]
    routings = inspection.record_routings(model, [data.arrays[2][0][shown]])
    ((routing,),) = routings.values()
    shares = routing.counts / routing.counts.sum()
    print(
        "\nThe most typical words of each expert, and its share of all phrases of "
        f"{size.phrase_length} words:"
    )
    for expert, words in enumerate(metrics.typical_words(routing, sum(phrases, []))):
        print(painted(f" {expert} ", expert), f"{shares[expert]:4.0%} ", *words)
    number, each = len(data.class_names), len(phrases[0])
    bits = []
    for given in (labels[shown], np.random.default_rng(0).permutation(labels[shown])):
        table = metrics.count_table(routing, np.repeat(given, each), number)
        bits.append(float(metrics.mutual_information(table)) / np.log(2))
    print(f"\nThe expert of a phrase tells {bits[0]:.2f} bits about the class of its document.")
    print(f"If classes are shuffled, it tells {bits[1]:.2f} bits.")
    figure = visualization.specialization(routings, classes[shown])
    save_figure(figure, folder / "experts_by_class.png")

    first = next((n for n, text in enumerate(phrases) if all(text[:10])), 0)
    print(f"\nA test document of {classes[shown[first]]}, with the first expert of each phrase:")
    print(in_colours(phrases[first][:10], routing.indices[first * each :, 0]))
    words = [split_words(text)[: size.length] for text in texts[:documents]]
    page = folder / "report.html"
    arrays = data.arrays[2][0][:documents]
    return keras_moe.report(model, arrays, classes[:documents], words, page)


def phrases_of(text, size):
    """The text of each phrase of a document, empty after its end."""
    words = split_words(text)
    starts = range(0, size.length, size.phrase_length)
    return [" ".join(words[start : start + size.phrase_length]) for start in starts]


def in_colours(phrases, experts, width=92):
    """Lines of text: words in the colours of their experts, or after the number of an expert."""
    lines, used, before = [""], 0, None
    for phrase, expert in zip(phrases, experts):
        words = phrase.split()
        if words and not HAS_COLOURS and expert != before:
            words = [f"[{expert}]", *words]
        before = expert
        for word in words:
            if used + len(word) >= width:
                lines.append("")
                used = 0
            lines[-1] += painted(f"{word} ", expert)
            used += len(word) + 1
    return "\n".join(lines)


def painted(text, expert):
    """Text on the colour that an expert has in the report, in a terminal that has colours."""
    if not HAS_COLOURS:
        return text
    rgb = colorsys.hls_to_rgb(expert * 137.508 / 360 % 1, 0.7, 1)
    red, green, blue = (round(5 * part) for part in rgb)
    return f"\x1b[48;5;{16 + 36 * red + 6 * green + blue};38;5;16m{text}\x1b[0m"


if __name__ == "__main__":
    main()
