"""Text to integers, the same on every backend."""

import collections
import math
import re

import numpy as np

PADDING, UNKNOWN = 0, 1


class Vocabulary:
    """The words that a model knows, with the inverse document frequency of each as `salience`.

    The first word has the id 2, after padding and the unknown word. Of a document the first
    `length` words are kept.
    """

    def __init__(self, words, salience, length):
        self.words = words
        self.salience = salience
        self.length = length

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
        known = {word: index for index, word in enumerate(self.words, start=UNKNOWN + 1)}
        ids = np.full((len(texts), self.length), PADDING, "int32")
        for row, text in zip(ids, texts):
            words = split_words(text)[: self.length] or [""]
            row[: len(words)] = [known.get(word, UNKNOWN) for word in words]
        return ids


def split_words(text):
    return re.findall(r"\w+", text.lower())
