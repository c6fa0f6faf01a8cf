"""Text by name: documents with a class, and sentence pairs; downloaded on first use."""

import typing

import numpy as np
import tensorflow_datasets as tfds

from .bible import BibleEsEn
from .libreoffice_help import LibreofficeHelp
from .manual_pages import ManualPages
from .newsgroups import ReutersR8, TwentyNewsgroups

TEXTS = {builder.name: builder for builder in (TwentyNewsgroups, ReutersR8, ManualPages)}
PAIRS = {builder.name: builder for builder in (BibleEsEn, LibreofficeHelp)}
SPLITS = ("train", "validation", "test")


class Split(typing.NamedTuple):
    texts: list
    labels: np.ndarray


class TextDataset(typing.NamedTuple):
    """Choices are made on `validation`; `test` is for the number that is reported."""

    train: Split
    validation: Split
    test: Split
    class_names: list


class Pairs(typing.NamedTuple):
    """`targets[i]` is the translation of `sources[i]`."""

    sources: list
    targets: list


def load(name, data_dir=None):
    """The `TextDataset` of a name in `TEXTS`, kept in a folder, by default that of TFDS."""
    builder = TEXTS[name](data_dir=data_dir)
    builder.download_and_prepare()
    splits = []
    for split in SPLITS:
        texts, labels = _read(builder, split, ("text", "label"))
        splits.append(Split(_decoded(texts), np.array(labels, "int32")))
    return TextDataset(*splits, class_names=builder.info.features["label"].names)


def load_pairs(name, data_dir=None, reverse=False):
    """`Pairs` for training, validation and test, of a name in `PAIRS`; see `load`."""
    builder = PAIRS[name](data_dir=data_dir)
    builder.download_and_prepare()
    keys = builder.info.supervised_keys[:: -1 if reverse else 1]
    return [Pairs(*map(_decoded, _read(builder, split, keys))) for split in SPLITS]


def _read(builder, split, keys):
    rows = list(tfds.as_numpy(builder.as_dataset(split=split)))
    return [[row[key] for row in rows] for key in keys]


def _decoded(texts):
    return [text.decode("utf-8") for text in texts]
