"""Text to pieces of words and back, with one vocabulary for both languages."""

import hashlib
import io
import pathlib

import numpy as np
import sentencepiece
from whole_files import whole

PADDING, START, END, UNKNOWN = range(4)


class Subwords:
    """A sentencepiece vocabulary.

    Args:
        content: bytes of a sentencepiece model whose first four ids are those above.
    """

    def __init__(self, content):
        self.content = content
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
            cls(content.getvalue()).save(path)
        return cls.load(path)

    @classmethod
    def load(cls, path):
        """
        Raises:
            ValueError: If the file is no sentencepiece model.
        """
        try:
            subwords = cls(pathlib.Path(path).read_bytes())
            len(subwords)  # Of an empty file nothing but this is refused.
            return subwords
        except RuntimeError as error:
            raise ValueError(
                f"The vocabulary is damaged. Received: {path}, of which sentencepiece says: "
                f"{error}. Delete it and train again."
            ) from error

    def save(self, path):
        with whole(pathlib.Path(path)) as (part,):
            part.write_bytes(self.content)

    def __len__(self):
        return len(self._processor)

    def encode(self, texts):
        """List of int32 arrays, each with `END` last."""
        return [np.array([*ids, END], "int32") for ids in self._processor.encode(list(texts))]

    def decode(self, rows):
        """Texts of rows of ids: what comes before the first `END`, specials left out."""
        return [self._processor.decode(_content(row)) for row in rows]

    def piece(self, index):
        return self._processor.id_to_piece(int(index))


def _content(row):
    ids = []
    for index in map(int, row):
        if index == END:
            break
        if index > UNKNOWN:
            ids.append(index)
    return ids


def pad(rows, length):
    """(number of rows, length) int32 ids; what is longer is cut off."""
    padded = np.full((len(rows), length), PADDING, "int32")
    for line, row in zip(padded, rows):
        line[: len(row)] = row[:length]
    return padded
