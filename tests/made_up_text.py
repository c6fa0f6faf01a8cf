"""Documents of two topics that need no network."""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "studies"))

import datasets  # noqa: E402

TOPICS = {"space": "orbit moon rocket launch star", "cars": "engine wheel road brake driver"}


def split(documents, seed, num_words=12):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(TOPICS), documents).astype("int32")
    words = [topic.split() for topic in TOPICS.values()]
    texts = [" ".join(generator.choice(words[label], num_words)) for label in labels]
    return datasets.Split(texts, labels)


def made_up_text(sizes, num_words=12):
    """A data set whose training, validation and test have so many documents."""
    splits = [split(documents, seed, num_words) for seed, documents in enumerate(sizes)]
    return datasets.TextDataset(*splits, class_names=list(TOPICS))
