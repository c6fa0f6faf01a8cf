"""Why does a mixture gain little, or much, in translation? One thing is changed at a time.

    KERAS_BACKEND=jax python studies/translation_causes.py
    KERAS_BACKEND=jax python studies/translation_causes.py --dataset libreoffice_help --reverse
    KERAS_BACKEND=jax python studies/translation_causes.py --changes none "32 experts"

Trains the translators of `translation.py` for one epoch: the mixture of that study, and others
that differ from it in one thing, such as the number of experts, the weight of the balance loss, or
the size of the data. Each is compared with the dense model of the same active size that has the
same data, the same learning rate and the same seed, in validation loss. Finished runs stay in
--output, so that further changes and seeds add to them.
"""

import argparse
import pathlib
import typing

import clean_exit  # noqa: F401
import keras
import numpy as np
import resuming
import training
import translation
from bilingual_embedding import bilingual_embedding
from comparison_table import interval
from datasets import pairs
from output_folder import claim
from sentence_batches import SentenceBatches
from subwords import Subwords
from whole_files import write_json

EPOCHS = 1


class Setting(typing.NamedTuple):
    """What may be the cause. The width of the active experts is the same in all."""

    experts: int = 8
    top_k: int = 2
    balance: float = 0.01
    sides: tuple[str, ...] = translation.SIDES
    learning_rate: float = training.LEARNING_RATE
    part_of_data: float = 1.0


CHANGES = {
    "none": Setting(),
    "4 experts": Setting(experts=4),
    "16 experts": Setting(experts=16),
    "32 experts": Setting(experts=32),
    "64 experts": Setting(experts=64),
    "32 narrow experts, 8 active": Setting(experts=32, top_k=8),
    "balance 0.1": Setting(balance=0.1),
    "balance 0.001": Setting(balance=0.001),
    "encoder only": Setting(sides=("encoder",)),
    "decoder only": Setting(sides=("decoder",)),
    "32 experts, decoder only": Setting(experts=32, sides=("decoder",)),
    "half the learning rate": Setting(learning_rate=training.LEARNING_RATE / 2),
    "twice the learning rate": Setting(learning_rate=training.LEARNING_RATE * 2),
    "half of the data": Setting(part_of_data=0.5),
    "a quarter of the data": Setting(part_of_data=0.25),
}


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    study = Study.prepare(options)
    results: dict = {name: {} for name in options.changes}
    for seed in options.seeds:
        for name in options.changes:
            twin = study.loss(CHANGES[name], seed, sparse=False)
            loss = study.loss(CHANGES[name], seed, sparse=True)
            results[name][seed] = {"loss": loss, "dense": twin}
            write_json(options.output / "results.json", results)
            print_table({name: runs for name, runs in results.items() if runs})
    return results


def parse_options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--changes", nargs="+", choices=CHANGES, default=[*CHANGES], metavar="NAME",
        help="; ".join(CHANGES),
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--dataset", default="bible_es_en", help=", ".join(pairs.BUILT_IN))
    parser.add_argument("--reverse", action="store_true", help=pairs.REVERSE)
    parser.add_argument("--data-dir", help="folder that keeps the data; default: that of TFDS")
    parser.add_argument("--smoke", action="store_true", help="tiny models on a few sentences")
    output = pathlib.Path("output_translation_causes")
    parser.add_argument("--output", type=pathlib.Path, default=output)
    return parser.parse_args(arguments)


class Study(typing.NamedTuple):
    """Data, and the folder that keeps what was computed."""

    size: translation.Size
    subwords: Subwords
    train: pairs.Pairs
    validation: SentenceBatches
    folder: pathlib.Path

    @classmethod
    def prepare(cls, options):
        size = translation.size_of(options)
        data = pairs.load(options.dataset, options.data_dir, options.reverse)
        train, validation = (translation.cut(split, size.pairs) for split in data[:2])
        subwords = Subwords.train(
            [*train.sources, *train.targets], size.vocabulary, options.output / "cache"
        )
        name = resuming.digest(size, options.dataset, options.reverse, EPOCHS)
        validation = translation.batches_of(subwords, validation, size)
        return cls(size, subwords, train, validation, options.output / "runs" / name)

    def loss(self, setting, seed, sparse):
        """The validation loss of a run that may be finished already."""
        if not sparse:
            # What a dense model does not have does not tell one from another.
            setting = Setting(
                learning_rate=setting.learning_rate, part_of_data=setting.part_of_data
            )

        def train(progress):
            print(f"\n{'mixture' if sparse else 'dense'}, seed {seed}, {setting}")
            number = int(setting.part_of_data * len(self.train.sources))
            part = translation.cut(self.train, number)
            batches = translation.batches_of(self.subwords, part, self.size)
            keras.utils.set_random_seed(seed)
            model = self.build(setting, batches, sparse)
            history = training.fit(
                model, batches, self.validation, EPOCHS, progress, None, setting.learning_rate
            )
            return history["val_loss"][-1]

        return resuming.once(self.folder / resuming.digest(setting, seed, sparse), train)

    def build(self, setting, train, sparse):
        # Of equal width, as two experts of the study are.
        size = self.size._replace(hidden_dim=2 * self.size.hidden_dim // setting.top_k)
        feedforward = translation.expert_feedforward if sparse else translation.twin_feedforward
        options = argparse.Namespace(**setting._asdict(), moe_every=1)
        model = translation.build_model(feedforward, len(self.subwords), options, size)
        embedding = bilingual_embedding(train, len(self.subwords), size.features)
        model.embedding.embeddings.assign(embedding)
        return model


def print_table(results):
    """Differences are those of runs with one seed; behind +-, half of a 95% interval."""
    print(f"\n{'change':<28} {'seeds':>5} {'mixture':>8} {'dense':>8} {'difference':>20}")
    for name, runs in results.items():
        loss, dense = (np.array([run[of] for run in runs.values()]) for of in ("loss", "dense"))
        print(f"{name:<28} {len(runs):>5} {loss.mean():>8.4f} {dense.mean():>8.4f}", end=" ")
        print(f"{interval(loss - dense):>20}")


if __name__ == "__main__":
    main()
