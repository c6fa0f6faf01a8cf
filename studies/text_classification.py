"""Classifies text with a sparse Mixture-of-Experts Transformer.

python studies/text_classification.py
python studies/text_classification.py --compare --seeds 3
"""

import functools
import pathlib
import typing

import datasets
import keras
import numpy as np
import plots
from command_line import parser_of, positive
from comparisons import (
    PARAMETERS,
    compile_classifier,
    count_parameters,
    dense_feedforward,
    is_sparse,
    print_runs,
    shuffled_batches,
)
from files import claim, save_figure, write_json
from phrase_embedding import PhraseEmbedding
from resuming import StepTimer, say
from vocabulary import Vocabulary, split_words

import keras_moe
from keras_moe import callbacks, inspection, layers, routers, visualization


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
TOP_K, BATCH_SIZE, LEARNING_RATE, LABEL_SMOOTHING = 2, 128, 3e-3, 0.3


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    data = load(options.dataset, options.data_dir, size)
    results: dict = {}
    histories, models = {}, {}
    for name in ("mixture of experts", "dense twin")[: 1 + options.compare]:
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

    report = {"dataset": options.dataset, "results": results}
    if options.compare:
        say("logistic regression")
        report["logistic_regression"] = logistic_regression(*data.splits)
    print_runs(
        options.dataset, results, {"test accuracy": ("{:.2%}", "test_accuracy"), **PARAMETERS}
    )
    print("Active: weights that work on a token. Of the table of words it only reads its rows.")
    if options.compare:
        print(f"TF-IDF, logistic regression: {report['logistic_regression']:.2%}")
        print(verdict(*results.values(), len(data.splits[0].texts)))
    shown = models["mixture of experts"]
    show_experts(shown, data, options.output / "experts_by_class.png")
    write_json(options.output / "results.json", report)
    path = options.output / "learning_curves.png"
    plots.courses({options.dataset: histories}, path, ["epochs"], "val_accuracy")
    if options.report:
        write_report(shown, data, options.output / "report.html")
    print(f"\nPlots and results are in {options.output}.")
    return report


def parse_options(arguments):
    parser = parser_of(__doc__, None, datasets.TEXTS)
    parser.add_argument("--experts", type=positive, default=8)
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--compare", action="store_true", help="train dense models as well")
    parser.add_argument("--report", action="store_true", help="write a page about the experts")
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
    """A mixture; without a number of experts its dense twin."""
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
    timer, monitors = StepTimer(), []
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
    history["epochs"] = [*range(1, 1 + epochs)]
    _, accuracy = model.evaluate(*test, batch_size=BATCH_SIZE, verbose=0)
    counts = count_parameters(model)
    counts["active_parameters"] -= model.get_layer("phrases").count_params()
    run = {
        "test_accuracy": float(accuracy),
        "validation_accuracy": history["val_accuracy"][-1],
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
        return f"The mixture is {word} than its dense twin by {abs(gain):.1%}."
    return (
        f"Mixture and dense twin are about equal here: {documents:,} documents are few, and dense "
        "layers learn them as well. Experts gain where there is more to learn."
    )


def logistic_regression(train, validation, test):
    """Test accuracy of a linear model of TF-IDF, which has no use for a validation split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=300)
    )
    model.fit(train.texts + validation.texts, np.concatenate([train.labels, validation.labels]))
    return float(model.score(test.texts, test.labels))


def show_experts(model, data, path, per_class=64):
    """Print what share of all tokens each expert serves, and draw those of each class."""
    labels = data.splits[2].labels
    shown = np.concatenate(
        [np.flatnonzero(labels == label)[:per_class] for label in range(len(data.class_names))]
    )
    routings = inspection.record_routings(model, [data.arrays[2][0][shown]])
    ((routing,),) = routings.values()
    shares = routing.counts / routing.counts.sum()
    print("\nShare of the tokens that each expert serves:")
    print(*(f"{expert}: {share:.1%}" for expert, share in enumerate(shares)), sep="  ")
    save_figure(visualization.specialization(routings, labels[shown], data.class_names), path)


def write_report(model, data, path, documents=300):
    """A page about the experts, with the first documents coloured by expert."""
    texts, labels = (column[:documents] for column in data.splits[2])
    words = [split_words(text)[: data.vocabulary.length] for text in texts]
    labels = np.array(data.class_names)[labels]
    keras_moe.report(model, data.vocabulary.encode(texts), labels, words, path)


if __name__ == "__main__":
    main()
