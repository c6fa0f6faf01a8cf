"""The base of the builders of data, and how names are split."""

import zlib

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Abstract: data that are read as a whole.

    A subclass has `HOMEPAGE`, `FEATURES`, `KEYS` (of the two columns) and a method
    `read(downloads)`, from the folder that keeps downloads to `{split: {key: row}}`.
    """

    VERSION = tfds.core.Version("1.0.0")
    KEYS = ("text", "label")

    def _info(self):
        return self.dataset_info_from_configs(
            features=self.FEATURES, supervised_keys=self.KEYS, homepage=self.HOMEPAGE
        )

    def _split_generators(self, dl_manager):
        splits = self.read(dl_manager.download_dir)
        return {name: self._generate_examples(rows) for name, rows in splits.items()}

    def _generate_examples(self, rows):
        yield from rows.items()


def classified(names):
    """Features of texts with a class."""
    return tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=names)}
    )


def split_of(unit):
    """The split of a number or a name: one of twenty is for test, one for validation."""
    number = zlib.crc32(unit.encode("utf-8")) if isinstance(unit, str) else unit
    return {0: "test", 1: "validation"}.get(number % 20, "train")
