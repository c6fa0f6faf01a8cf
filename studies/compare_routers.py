"""Compares routers, and what balances them, on the topics of Reuters news.

    python studies/compare_routers.py
    python studies/compare_routers.py --seeds 1 --routers top_k expert_choice

The same small Transformer is trained with each router. Then a router that sends every token to the
same two of sixteen experts is trained with each method of balancing: which one gets out, how fast?
"""

import typing

import datasets
import keras
import numpy as np
import plots
from command_line import parser_of
from comparisons import compile_classifier, print_runs, shuffled_batches
from files import claim, write_json
from resuming import StepTimer, say
from vocabulary import Vocabulary

from keras_moe import callbacks, layers, losses, routers


class Size(typing.NamedTuple):
    words: int
    length: int
    features: int
    hidden_dim: int
    documents: int | None
    steps: int


FULL = Size(8_000, 64, features=64, hidden_dim=64, documents=None, steps=240)
SMOKE = Size(200, 16, features=8, hidden_dim=8, documents=64, steps=20)
NUM_EXPERTS, BATCH_SIZE, LEARNING_RATE = 16, 64, 2e-3
# The history has an entry for so many steps.
STEPS_AN_ENTRY = 10

# How a collapsed top-2 router is balanced: its selection bias, or its losses.
BALANCING = {
    "nothing": lambda: (None, []),
    "load_balance 0.01": lambda: (None, [losses.LoadBalance(0.01)]),
    "load_balance 0.1": lambda: (None, [losses.LoadBalance(0.1)]),
    "global_load_balance 0.1": lambda: (None, [losses.LoadBalance(0.1, scope="global")]),
    "sequence_load_balance 0.1": lambda: (None, [losses.LoadBalance(0.1, scope="sequence")]),
    "importance_variation 0.1": lambda: (None, [losses.ImportanceVariation(0.1)]),
    "router_z 0.001": lambda: (None, [losses.RouterZ(0.001)]),
    "loss_free bias": lambda: (routers.LossFreeBias(rate=0.002), []),
    "quantile bias": lambda: (routers.QuantileBias(momentum=0.9), []),
}
BALANCED = 0.5
# Columns of the tables.
OUTCOME = {
    "test accuracy": ("{:.2%}", "test_accuracy"),
    "imbalance: first": ("{:.2f}", lambda run: run["imbalance"][0]),
    "middle": ("{:.2f}", lambda run: run["imbalance"][len(run["imbalance"]) // 2]),
    "last": ("{:.2f}", lambda run: run["imbalance"][-1]),
    "dead": ("{:.1f}", "dead_experts"),
}
COSTS = {"dropped": ("{:.1%}", "dropped_fraction"), "ms per step": ("{:.1f}", "ms_per_step")}
RECOVERY = {
    f"steps to {BALANCED}": (
        lambda steps: "never" if None in steps else f"{np.mean(steps):.0f}",
        lambda run: steps_to_balance(run["imbalance"]),
    )
}


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    arrays, num_classes = load(size, options.data_dir)
    results: dict = {"routers": {}, "balancing": {}}
    for title, names, make in (
        ("routers", options.routers, routed),
        ("balancing", options.balancing, collapsed),
    ):
        for name in names:
            results[title][name] = []
            for seed in range(options.seeds):
                say(f"{name}, seed {seed}")
                keras.utils.set_random_seed(seed)
                model = make(name, num_classes, size)
                results[title][name].append(train(model, arrays, size))
    print_runs("router", results["routers"], {**OUTCOME, **COSTS})
    print_runs("collapsed, then", results["balancing"], {**OUTCOME, **RECOVERY})
    write_json(options.output / "results.json", results)
    drawn = {title: models for title, models in results.items() if models}
    plots.courses(drawn, options.output / "imbalance.png", ["steps"], "imbalance", yscale="symlog")
    print(f"\nPicture and results are in {options.output}.")
    return results


def parse_options(arguments):
    names = [*sorted(routers.IDENTIFIERS), "hash"]
    parser = parser_of(__doc__, "output_routers", seeds=3)
    parser.add_argument("--routers", nargs="*", choices=names, default=names, metavar="ROUTER")
    parser.add_argument(
        "--balancing", nargs="*", choices=BALANCING, default=[*BALANCING], metavar="METHOD"
    )
    return parser.parse_args(arguments)


def load(size, data_dir):
    data = datasets.load("reuters_r8", data_dir)
    vocabulary = Vocabulary.learn(data.train.texts, size.words, size.length)

    def encoded(split):
        return vocabulary.encode(split.texts[: size.documents]), split.labels[: size.documents]

    return [encoded(data.train), encoded(data.test)], len(data.class_names)


def routed(name, num_classes, size):
    """A model with a router and its default losses."""
    if name == "hash":
        router = routers.HashRouter(NUM_EXPERTS, vocabulary_size=size.words + 2, top_k=2)
    else:
        router = routers.get(name, num_experts=NUM_EXPERTS)
    return build_model(router, None, num_classes, size)


def collapsed(name, num_classes, size):
    """A model whose router sends every token to the first two experts, with a method of balancing.

    After a normalisation with an offset of 1 the features of a token sum to D. Two columns of the
    kernel with 1 / D everywhere make a logit of exactly 1 from that, whatever the token; all other
    logits are near 0.
    """
    balancer, router_losses = BALANCING[name]()
    router = routers.TopKRouter(NUM_EXPERTS, balancer=balancer)
    model = build_model(router, router_losses, num_classes, size)
    (norm,) = (layer for layer in model._flatten_layers() if layer.name == "feedforward_norm")
    norm.beta.assign(np.ones(norm.beta.shape))
    kernel = 1e-3 * keras.ops.convert_to_numpy(router.kernel)
    kernel[:, :2] = 1 / len(kernel)
    router.kernel.assign(kernel)
    return model


def build_model(router, router_losses, num_classes, size):
    bank = layers.FeedForwardExperts(NUM_EXPERTS, size.hidden_dim)
    moe = layers.MixtureOfExperts(bank, router, router_losses, name="experts")
    ids = keras.Input((size.length,), dtype="int32")
    words = keras.layers.Embedding(size.words + 2, size.features, mask_zero=True)(ids)
    block = layers.TransformerEncoderBlock(num_heads=4, feedforward=moe, dropout=0.1)
    hidden = keras.layers.LayerNormalization()(block(words, token_ids=ids))
    document = keras.layers.GlobalAveragePooling1D()(hidden)
    return keras.Model(ids, keras.layers.Dense(num_classes)(document))


def train(model, arrays, size):
    """Train, then read the test accuracy once."""
    train, test = arrays
    # Routers settle as the rate falls.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    compile_classifier(model, loss, LEARNING_RATE, size.steps)
    timer, monitor = StepTimer(), callbacks.ExpertMonitor()
    model.fit(
        shuffled_batches(*train, BATCH_SIZE).repeat(),
        epochs=size.steps // STEPS_AN_ENTRY,
        steps_per_epoch=STEPS_AN_ENTRY,
        shuffle=False,  # they are shuffled already
        callbacks=[monitor, timer],
        verbose=0,
    )
    _, accuracy = model.evaluate(*test, verbose=0)
    return {
        "test_accuracy": float(accuracy),
        "imbalance": monitor.history["experts_load_imbalance"],
        "steps": [*range(STEPS_AN_ENTRY, size.steps + 1, STEPS_AN_ENTRY)],
        "dead_experts": monitor.history["experts_dead_experts"][-1],
        "dropped_fraction": monitor.history["experts_dropped_fraction"][-1],
        "ms_per_step": float(np.median(timer.ms_per_step[1:])),
    }


def steps_to_balance(imbalance):
    """Steps after which the imbalance stayed below `BALANCED`, or None."""
    above = np.flatnonzero(np.array(imbalance) >= BALANCED)
    first = above[-1] + 1 if len(above) else 0
    return None if first == len(imbalance) else int(first) * STEPS_AN_ENTRY


if __name__ == "__main__":
    main()
