"""Documents of two topics, and sentence pairs, that need no network."""

import datasets
import numpy as np

TOPICS = {"space": "orbit moon rocket launch star", "cars": "engine wheel road brake driver"}
TRANSLATIONS = {"rey": "king", "casa": "house", "agua": "water", "pan": "bread", "mano": "hand"}


def made_up_text(sizes=(96, 48, 32), num_words=40):
    """A data set whose training, validation and test have so many documents."""
    splits = []
    for seed, documents in enumerate(sizes):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, len(TOPICS), documents).astype("int32")
        words = [topic.split() for topic in TOPICS.values()]
        texts = [" ".join(generator.choice(words[label], num_words)) for label in labels]
        splits.append(datasets.Split(texts, labels))
    return datasets.TextDataset(*splits, class_names=list(TOPICS))


def made_up_pairs(sizes=(64, 16, 16)):
    splits = []
    for seed, number in enumerate(sizes):
        generator = np.random.default_rng(seed)
        lengths = generator.integers(2, 6, number)
        sources = [" ".join(generator.choice(list(TRANSLATIONS), length)) for length in lengths]
        targets = [" ".join(map(TRANSLATIONS.get, source.split())) for source in sources]
        splits.append(datasets.Pairs(sources, targets))
    return splits


def use_made_up_data(monkeypatch):
    """Give all studies of this process made-up data."""
    monkeypatch.setattr(datasets, "load", lambda *arguments: made_up_text())
    monkeypatch.setattr(datasets, "load_pairs", lambda *arguments: made_up_pairs())
