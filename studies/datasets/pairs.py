"""Sentence pairs for translation by name: built in, or any other of TensorFlow Datasets."""

import typing

import tensorflow_datasets as tfds

from .bible import BibleEsEn
from .catalogue import find_builder, prepared
from .libreoffice_help import LibreofficeHelp

BUILT_IN = {builder.name: builder for builder in (BibleEsEn, LibreofficeHelp)}
REVERSE = "from the target language of the data to the source language"


class Pairs(typing.NamedTuple):
    """`targets[i]` is the translation of `sources[i]`."""

    sources: list
    targets: list


class ParallelDataset(typing.NamedTuple):
    """Choices are made on `validation`; `test` is for the number that is reported."""

    train: Pairs
    validation: Pairs
    test: Pairs


def load(name, data_dir=None, reverse=False):
    """The sentence pairs of this name, downloaded and prepared on first use.

    Args:
        name: one of `BUILT_IN`, whose text ships in packages, or any data set in the catalogue of
            TFDS that is supervised, from text to text, such as `ted_hrlr_translate/pt_to_en`.
        data_dir: folder that keeps the data, or None for the one of TFDS.
        reverse: whether the target language of the data is the source.

    Raises:
        ValueError: If there is no such data set, or it does not translate.
    """
    builder = prepared(lambda: _builder(name, data_dir))
    missing = {"train", "validation", "test"} - set(builder.info.splits)
    if missing:
        raise ValueError(
            "The data set must have the splits train, validation and test. Received: "
            f"{name!r} without {', '.join(sorted(missing))}. "
            f"Choose another, for example {', '.join(BUILT_IN)}."
        )
    keys = builder.info.supervised_keys[:: -1 if reverse else 1]
    return ParallelDataset(*(_read(builder, split, keys) for split in ParallelDataset._fields))


def _builder(name, data_dir):
    builder = find_builder(name, data_dir, BUILT_IN, "lists the others under Translate.")
    features = [builder.info.features[key] for key in builder.info.supervised_keys or ()]
    if len(features) != 2 or not all(isinstance(item, tfds.features.Text) for item in features):
        raise ValueError(
            "The data set must be supervised, from a text to its translation. Received: "
            f"{name!r} with supervised_keys={builder.info.supervised_keys}. "
            f"Choose another, for example {', '.join(BUILT_IN)}."
        )
    return builder


def _read(builder, split, keys):
    rows = list(tfds.as_numpy(builder.as_dataset(split=split)))
    return Pairs(*([row[key].decode("utf-8") for row in rows] for key in keys))
