"""Recommending: two tasks that share experts

Learns from MovieLens-100k whether a user likes a film, with a rating of 4 or 5, and the rating
itself. Compares a model for each task, layers that both tasks share, MMoE (Ma et al. 2018), MMoE
with the sparse gate DSelect-k (Hazimeh et al. 2021), and PLE (Tang et al. 2020). All have about
equally many parameters and are trained with several seeds. Then shows which task uses which expert.

    pip install ".[jax,visualization]" && pip install --no-deps recbole==1.2.1

Run it in a clone of keras_moe; with `tensorflow` or `torch` in place of `jax`, set `KERAS_BACKEND`
to that name. Only recbole's data files are read. A run on JAX, four minutes of CPU time, found the
same AUC of 0.80 for MMoE, PLE and shared layers, because the two tasks are similar. DSelect-k was
slightly worse.
"""

import csv
import importlib.metadata
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_moe import inspection, layers

FEATURES = 16
NUM_OUTPUTS = 32
NUM_SEEDS = 3
EPOCHS = 15
BATCH_SIZE = 256
TASKS = ["like", "rating"]

"""
## The data

100,000 ratings, one in ten for validation and one for testing. A user has an ID, age, gender and
occupation; a film has an ID, year and genres. Each of these has a row in one table.
"""


def read(name):
    package = importlib.metadata.distribution("recbole")
    path = package.locate_file(f"recbole/dataset_example/ml-100k/ml-100k.{name}")
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))[1:]


users = {user: (str(int(age) // 5), *others) for user, age, *others, _ in read("user")}
films = {film: (year[:4], genres.split()) for film, _, year, genres in read("item")}
ratings = read("inter")
rows = [(user, film, *users[user], films[film][0]) for user, film, _, _ in ratings]
pairs = sorted({pair for row in rows for pair in enumerate(row)})
table = {pair: number for number, pair in enumerate(pairs)}
ids = np.array([[table[pair] for pair in enumerate(row)] for row in rows], "int32")
names = sorted({genre for _, genres in films.values() for genre in genres})
genres = [[name in films[film][1] for name in names] for _, film, *_ in ratings]
genres = np.array(genres, "float32")
rating = np.array([float(rating) for _, _, rating, _ in ratings], "float32")
targets = {"like": (rating >= 4).astype("float32"), "rating": rating - 3.5}

order = np.random.default_rng(0).permutation(len(rating))
test, validation, train = np.split(order, [len(order) // 10, len(order) // 5])


def select(rows, tasks=TASKS):
    return [ids[rows], genres[rows]], {task: targets[task][rows] for task in tasks}


"""
## The models

Each model has a table of features, a middle part, and a tower for each task. In MMoE each task has
a gate over eight experts. PLE has two blocks, in which each task also has its own experts. The
gates of the first block make an input for each task and one for the shared experts of the second
block. The hidden widths are chosen so that all models have about equally many parameters.
"""


def experts(number, hidden_dim):
    return layers.FeedForwardExperts(number, hidden_dim, "relu", output_dim=NUM_OUTPUTS)


def dense(hidden_dim):
    first = keras.layers.Dense(hidden_dim, "relu")
    return keras.Sequential([first, keras.layers.Dense(NUM_OUTPUTS)])


def ple_block(hidden_dim, name, shared_output=False):
    own = [experts(2, hidden_dim) for _ in TASKS]
    arguments = {"task_experts": own, "shared_output": shared_output, "task_names": TASKS}
    return layers.MultiGateMixtureOfExperts(experts(4, hidden_dim), 2, name=name, **arguments)


def mmoe(hidden, router="dense"):
    bank = experts(8, 16)
    return layers.MultiGateMixtureOfExperts(bank, 2, router, task_names=TASKS, name="mmoe")(hidden)


def ple(hidden):
    return ple_block(10, "ple")(ple_block(10, "ple_first", shared_output=True)(hidden))


models = {  # the tasks, and what makes a list of inputs of their towers
    "single, like": (["like"], lambda hidden: [dense(150)(hidden)]),
    "single, rating": (["rating"], lambda hidden: [dense(150)(hidden)]),
    "shared bottom": (TASKS, lambda hidden: 2 * [dense(142)(hidden)]),
    "MMoE": (TASKS, mmoe),
    "MMoE, DSelect-k": (TASKS, lambda hidden: mmoe(hidden, "dselect_k")),
    "PLE": (TASKS, ple),
}


def build(tasks, middle):
    inputs = [keras.Input(ids.shape[1:], dtype="int32"), keras.Input(genres.shape[1:])]
    embedded = keras.layers.Embedding(len(table), FEATURES)(inputs[0])
    of_genres = keras.layers.Dense(FEATURES, use_bias=False)(inputs[1])
    hidden = keras.layers.Concatenate()([keras.layers.Flatten()(embedded), of_genres])
    hidden = keras.layers.Dropout(0.2)(hidden)
    outputs = {}
    for task, tower in zip(tasks, middle(hidden)):
        tower = keras.layers.Dropout(0.2)(keras.layers.Dense(32, "relu")(tower))
        outputs[task] = keras.layers.Dense(1, name=task)(tower)
    return keras.Model(inputs, outputs)


"""
## Training, and the mean and standard deviation over the seeds

The AUC is the share of pairs of a liked and another film that the model ranks correctly.
"""


def auc(likes, scores):
    places = np.flatnonzero(likes[np.argsort(scores)])
    return np.mean(places - np.arange(len(places))) / (len(likes) - len(places))


def squared_error(ratings, scores):
    return np.mean((ratings - scores) ** 2)


losses = {"like": keras.losses.BinaryCrossentropy(from_logits=True), "rating": "mse"}
measures = {"like": auc, "rating": squared_error}
stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
trained = {}
print(f"{'':16} {'parameters':>10}  {'AUC of like':17}  squared error of rating")
for name, (tasks, middle) in models.items():
    scores = {task: [] for task in TASKS}
    for seed in range(NUM_SEEDS):
        keras.utils.set_random_seed(seed)
        model = trained[name] = build(tasks, middle)
        model.compile(keras.optimizers.Adam(2e-3), {task: losses[task] for task in tasks})
        model.fit(
            *select(train, tasks),
            validation_data=select(validation, tasks),
            batch_size=BATCH_SIZE,
            epochs=EPOCHS,
            callbacks=[stop],
            verbose=0,
        )
        inputs, expected = select(test, tasks)
        outputs = model.predict(inputs, batch_size=BATCH_SIZE, verbose=0)
        for task in tasks:
            scores[task].append(measures[task](expected[task], outputs[task][:, 0]))
    cells = [f"{np.mean(s):.4f} +- {np.std(s):.4f}" if s else "-" for s in scores.values()]
    print(f"{name:16} {model.count_params():10,}  {cells[0]:17}  {cells[1]}")

"""
## Which task uses which expert

The table shows each expert's share of a task's gate weights over the test rows, in the last model
of each kind. Of the six experts in the last block of PLE, the first four are shared.
"""

figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for panel, name in zip(panels, ("MMoE", "PLE")):
    routings = inspection.record_routings(trained[name], [select(test)[0]])
    for number, task in enumerate(TASKS):
        counts = routings[f"{name.lower()}_{task}"][0].counts
        panel.bar(np.arange(len(counts)) + 0.4 * number, counts / counts.sum(), 0.4, label=task)
    panel.set(title=name, xlabel="expert")
panels[0].set_ylabel("share of the weights")
panels[0].legend()
figure.savefig("recommender.png", dpi=100)
print("written: recommender.png")
