"""Texts in, translations out: batches of fixed shapes, and the time they take."""

import time

from decoding import Writer
from subwords import END, pad

# Sentences that are written side by side.
ROWS = 64


def write(model, subwords, texts, shapes, beams, rows=None):
    """Translations of texts, and how many pieces a second were written once all was compiled.

    A text longer than the largest of the shapes is cut off.
    """
    longest, rows = shapes.lengths[-1], rows or min(ROWS, len(texts))
    sources = [row[:longest] for row in subwords.encode(texts)]
    writer = Writer(model, longest + longest // 4, beams)
    translations, pieces, seconds = [""] * len(texts), 0, 0.0
    for bucket, length in enumerate(shapes.lengths):
        members = [n for n, row in enumerate(sources) if shapes.bucket(len(row)) == bucket]
        for first in range(0, len(members), rows):
            chosen = members[first : first + rows]
            # Rows that fill a batch up say nothing, so that they are over at once.
            filling = [[END]] * (rows - len(chosen))
            begin = time.perf_counter()
            written = writer.predict_on_batch(pad([sources[n] for n in chosen] + filling, length))[
                : len(chosen)
            ]
            if first:
                seconds += time.perf_counter() - begin
                pieces += int((written > 0).sum())
            for n, text in zip(chosen, subwords.decode(written)):
                translations[n] = text
    return translations, pieces / seconds if seconds else None
