"""Text to integers, the same on every backend."""

import collections
import json
import math
import pathlib
import re

import numpy as np

PADDING, UNKNOWN = 0, 1


class Vocabulary:
    """The words that a model knows, with how much each tells about its document.

    Args:
        words: list of words; the first has the id 2, after padding and the unknown word.
        salience: list of one weight a word, its inverse document frequency.
        length: words a document keeps; the rest is cut off.
    """

    def __init__(self, words, salience, length):
        self.words = words
        self.salience = salience
        self.length = length
        self._ids = {word: index for index, word in enumerate(words, start=UNKNOWN + 1)}

    @classmethod
    def learn(cls, texts, size, length):
        """The `size` words that are in most of the texts, and in two at least."""
        frequencies = collections.Counter()
        for text in texts:
            # Sorted: the order of a set, which decides among equals, differs from run to run.
            frequencies.update(sorted(set(split_words(text))))
        words, salience = [], []
        for word, frequency in frequencies.most_common(size):
            if frequency > 1:
                words.append(word)
                salience.append(math.log((1 + len(texts)) / (1 + frequency)) + 1)
        return cls(words, salience, length)

    def encode(self, texts):
        """(number of texts, length) int32 ids. A text without a word is one unknown word."""
        ids = np.full((len(texts), self.length), PADDING, "int32")
        for row, text in zip(ids, texts):
            words = split_words(text)[: self.length] or [""]
            row[: len(words)] = [self._ids.get(word, UNKNOWN) for word in words]
        return ids

    def save(self, path):
        content = {"length": self.length, "words": self.words, "salience": self.salience}
        pathlib.Path(path).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path):
        return cls(**json.loads(pathlib.Path(path).read_text(encoding="utf-8")))


def split_words(text):
    return re.findall(r"\w+", text.lower())
