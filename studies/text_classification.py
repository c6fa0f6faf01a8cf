"""Classifies text with a sparse Mixture-of-Experts Transformer.

    python studies/text_classification.py
    python studies/text_classification.py --compare --seeds 3
    python studies/text_classification.py --report --log-dir logs
    python studies/text_classification.py --predict "the goalie stopped every shot"

Runs on the backend that KERAS_BACKEND names. The data are read with TensorFlow Datasets, which
needs TensorFlow on every backend.
"""

import json
import pathlib
import time
import typing

import clean_exit  # noqa: F401
import datasets
import expert_heat_maps
import keras
import numpy as np
import tensorflow as tf
import training_curves
from command_line import check_numbers, parser_of
from output_folder import claim
from phrase_embedding import PhraseEmbedding
from twins import count_parameters, dense_feedforward, spread
from usage_table import print_usage
from vocabulary import Vocabulary, split_words
from whole_files import saved_files, whole, write_json

import keras_moe
from keras_moe import callbacks, inspection, layers, routers


class Size(typing.NamedTuple):
    words: int
    bigrams: int
    length: int
    phrase_length: int
    features: int
    hidden_dim: int
    documents: int | None


FULL = Size(40_000, 50_021, 400, 8, features=128, hidden_dim=256, documents=None)
SMOKE = Size(500, 251, 32, 4, features=16, hidden_dim=16, documents=256)
LABEL_SMOOTHING = 0.3
MODEL_FILES = ("model.keras", "vocabulary.json", "classes.json")
LEARNING_RATE = 1e-3


def main(arguments=None):
    options = parse_options(arguments)
    check_numbers(options, "experts", "top_k", "epochs", "batch_size", "seeds")
    if options.predict is not None:
        return predict(options.predict, options.output)
    claim(options.output)
    if options.mixed_precision:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    size = SMOKE if options.smoke else FULL
    data = datasets.load(options.dataset, options.data_dir)
    train, validation, test = (cut(split, size.documents) for split in data[:3])
    vocabulary = Vocabulary.learn(train.texts, size.words, size.length)

    def encoded(split):
        labels = keras.utils.to_categorical(split.labels, len(data.class_names))
        return vocabulary.encode(split.texts), labels

    arrays = [encoded(split) for split in (train, validation, test)]
    feedforwards = {"mixture of experts": lambda: expert_feedforward(options, size)}
    if options.compare:
        feedforwards["dense twin"] = lambda: dense_feedforward(
            options.top_k, size.hidden_dim, size.features
        )
    results, histories = {}, {}
    for name, feedforward in feedforwards.items():
        runs = []
        for seed in range(options.seeds):
            print(f"\n{name}, seed {seed}")
            keras.utils.set_random_seed(seed)
            model = build_model(feedforward, vocabulary, size, len(data.class_names))
            # One run in TensorBoard: the curves of several would stand on top of each other.
            log_dir = options.log_dir if seed == 0 else None
            history, run = fit(model, arrays, options, log_dir)
            runs.append(run)
            if seed == 0:
                histories[name] = history
                if name == "mixture of experts":
                    shown = model
        results[name] = {"runs": runs, **count_parameters(model)}

    usage = expert_usage(shown, arrays[2][0], test.labels, len(data.class_names))
    report = {"dataset": options.dataset, "results": results}
    if options.compare:
        report["logistic_regression"] = logistic_regression(train, validation, test)
    print_report(report, usage)
    save(shown, vocabulary, data.class_names, options.output)
    write_json(options.output / "results.json", report)
    training_curves.learning_curves(histories, options.output / "learning_curves.png")
    expert_heat_maps.experts_by_class(
        usage, data.class_names, options.output / "experts_by_class.png"
    )
    if options.report:
        write_report(shown, vocabulary, test, data.class_names, options.output / "report.html")
    print(f"\nModel, plots and results are in {options.output}.")
    return report


def parse_options(arguments):
    parser = parser_of(__doc__, "twenty_newsgroups", datasets.HELP, experts=8)
    parser.add_argument("--top-k", type=int, default=2, help="experts that serve each token")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train a dense model of equal active size and a logistic regression as well",
    )
    parser.add_argument("--mixed-precision", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--output", type=pathlib.Path, help="default: text_classifier/ and the name of the data"
    )
    parser.add_argument("--log-dir", help="folder for TensorBoard")
    parser.add_argument(
        "--report", action="store_true", help="write a page about the experts to --output"
    )
    parser.add_argument("--predict", metavar="TEXT", help="classify with the model in --output")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = pathlib.Path("text_classifier") / options.dataset.replace("/", "_")
    return options


def cut(split, documents):
    return datasets.Split(split.texts[:documents], split.labels[:documents])


def expert_feedforward(options, size):
    return layers.MixtureOfExperts(
        layers.FeedForwardExperts(options.experts, size.hidden_dim),
        router=routers.TopKRouter(options.experts, top_k=options.top_k),
        name="experts",
    )


def build_model(feedforward, vocabulary, size, num_classes):
    embedding = PhraseEmbedding(
        len(vocabulary.words), size.bigrams, size.features, size.phrase_length, word_dropout=0.3
    )
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


@keras.saving.register_keras_serializable("examples")
class Detached(keras.layers.Layer):
    """Hands its inputs on without a gradient.

    Embeddings of rare words overfit to whatever the encoder says of their few documents; the plain
    mean teaches them better.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        return keras.ops.stop_gradient(inputs)


def fit(model, arrays, options, log_dir=None):
    """Train, then read the test accuracy once."""
    (ids, labels), validation, test = arrays
    batch_size = min(options.batch_size, len(ids))
    # Batches of one known size: a last partial one would be compiled for itself, and XLA uses all
    # cores only where sizes are known when TensorFlow traces the step.
    batches = tf.data.Dataset.from_tensor_slices((ids, labels)).shuffle(len(ids), seed=0)
    batches = batches.batch(batch_size, drop_remainder=True)
    steps = len(batches)
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, options.epochs * steps)
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=LABEL_SMOOTHING
        ),
        metrics=["accuracy"],
        # PyTorch has no XLA.
        jit_compile=keras.backend.backend() != "torch",
    )
    timer = StepTimer()
    monitors = []
    if moe_layers(model):
        monitors = [callbacks.ExpertMonitor(log_dir=log_dir), callbacks.ExpertHealth()]
    history = model.fit(
        batches,
        shuffle=False,  # they are shuffled already
        epochs=options.epochs,
        validation_data=validation,
        callbacks=[*monitors, timer],
    ).history
    _, accuracy = model.evaluate(*test, batch_size=batch_size, verbose=0)
    run = {
        "test_accuracy": float(accuracy),
        "validation_accuracy": history["val_accuracy"][-1],
        "ms_per_step": timer.ms_per_step,
    }
    return history, run


class StepTimer(keras.callbacks.Callback):
    """Time a training step took in the last epoch, when everything is compiled."""

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.ms_per_step = 1000 * (time.perf_counter() - self._begin) / (batch + 1)


def moe_layers(model):
    """The MoE layers by the name of their encoder block."""
    blocks = [layer for layer in model.layers if isinstance(layer, layers.TransformerEncoderBlock)]
    return {
        block.name: block.feedforward
        for block in blocks
        if isinstance(block.feedforward, layers.MixtureOfExperts)
    }


def expert_usage(model, ids, labels, num_classes, per_class=64):
    """(classes, experts) assignment counts of each MoE layer, over a few documents a class."""
    usage = {name: [] for name in moe_layers(model)}
    for label in range(num_classes):
        for layer in moe_layers(model).values():
            layer.reset_counts()
        documents = ids[labels == label][:per_class]
        if len(documents):
            with inspection.count_in_evaluation(model):
                model(documents, training=False)
        for name, layer in moe_layers(model).items():
            usage[name].append(keras.ops.convert_to_numpy(layer.expert_counts))
            layer.reset_counts()
    return {name: np.array(counts) for name, counts in usage.items()}


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


def print_report(report, usage):
    print(f"\n{report['dataset']}: {'test accuracy':>28} {'ms a step':>10}", end=" ")
    print(f"{'parameters':>12} {'active':>12}")
    for name, result in report["results"].items():
        accuracies = [run["test_accuracy"] for run in result["runs"]]
        accuracy = spread(accuracies, "{:.2%}")
        ms = np.mean([run["ms_per_step"] for run in result["runs"]])
        print(f"{name:<27} {accuracy:>20} {ms:>10.0f}", end=" ")
        print(f"{result['parameters']:>12,} {result['active_parameters']:>12,}")
    if "logistic_regression" in report:
        print(f"{'TF-IDF logistic regression':<27} {report['logistic_regression']:>9.2%}")
    print_usage(usage)


def save(model, vocabulary, class_names, output):
    with whole(*(output / name for name in MODEL_FILES)) as parts:
        model.save(parts[0])
        vocabulary.save(parts[1])
        write_json(parts[2], class_names)


def write_report(model, vocabulary, split, class_names, path, documents=300):
    """A page about the experts, with the first documents coloured by expert."""
    texts = split.texts[:documents]
    labels = np.array(class_names)[split.labels[:documents]]
    words = [split_words(text)[: vocabulary.length] for text in texts]
    keras_moe.report(model, vocabulary.encode(texts), labels, words, path)


def predict(text, output):
    """Print and return the most likely class, from a model saved under any backend."""
    paths = saved_files(output, *MODEL_FILES)
    if not split_words(text):
        raise ValueError(f"The text to classify must hold a word. Received: {text!r}.")
    model = keras.saving.load_model(paths[0], compile=False)
    vocabulary = Vocabulary.load(paths[1])
    class_names = json.loads(paths[2].read_text(encoding="utf-8"))
    logits = model(vocabulary.encode([text]), training=False)
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))[0]
    ranking = np.argsort(-probabilities)[:3]
    for index in ranking:
        print(f"{probabilities[index]:6.1%}  {class_names[index]}")
    return class_names[ranking[0]]


if __name__ == "__main__":
    main()
