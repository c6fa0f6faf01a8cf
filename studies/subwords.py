"""Text to pieces of words and back."""

import hashlib
import io
import pathlib

import numpy as np
import sentencepiece
from files import whole

PADDING, START, END, UNKNOWN = range(4)


class Subwords:
    """A sentencepiece vocabulary whose first four ids are those above, from its bytes."""

    def __init__(self, content):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)

    @classmethod
    def train(cls, texts, size, cache_dir):
        """At most `size` byte-pair pieces learnt from `texts`, kept in the folder `cache_dir`."""
        key = hashlib.sha256("\n".join([str(size), *texts]).encode("utf-8")).hexdigest()[:16]
        path = pathlib.Path(cache_dir) / f"subwords-{key}.model"
        if not path.exists():
            content = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=content,
                model_type="bpe",
                vocab_size=size,
                hard_vocab_limit=False,
                pad_id=PADDING,
                bos_id=START,
                eos_id=END,
                unk_id=UNKNOWN,
                minloglevel=2,
            )
            with whole(path) as part:
                part.write_bytes(content.getvalue())
        return cls(path.read_bytes())

    def __len__(self):
        return len(self._processor)

    def encode(self, texts):
        """List of int32 arrays, each with `END` last."""
        return [np.array([*ids, END], "int32") for ids in self._processor.encode(list(texts))]

    def decode(self, rows):
        """Texts of rows of ids: what comes before the first `END`, specials left out."""
        return [self._processor.decode(_content(row)) for row in rows]

    def pieces(self, ids):
        """The text of each id; a piece inside a word begins with "-"."""
        pieces = (self._processor.id_to_piece(int(index)) for index in ids)
        return [piece[1:] if piece.startswith("\u2581") else f"-{piece}" for piece in pieces]


def _content(row):
    row = [int(index) for index in row]
    end = row.index(END) if END in row else len(row)
    return [index for index in row[:end] if index > UNKNOWN]


def pad(rows, length):
    """(number of rows, length) int32 ids; what is longer is cut off."""
    padded = np.full((len(rows), length), PADDING, "int32")
    for line, row in zip(padded, rows):
        line[: len(row)] = row[:length]
    return padded
