"""Portuguese and English sentences of LibreOffice's help, from two Debian packages."""

import html.parser
import re

import tensorflow_datasets as tfds

from .builder import Builder, split_of
from .downloads import fetch_packages, read_members

PACKAGES = {"pt": "libreoffice-help-pt-br", "en": "libreoffice-help-en-us"}
FOLDER = re.compile(r".*/libreoffice/help/[^/]+/text/")
BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
CODE = re.compile(r"[{}<>\\=_;|]|\w\(|://")
LONGEST = 28


class LibreofficeHelp(Builder):
    """Paragraphs of at most 28 words, from Brazilian Portuguese. A page is in one split only."""

    HOMEPAGE = "https://help.libreoffice.org"
    KEYS = tuple(PACKAGES)
    FEATURES = tfds.features.Translation(languages=KEYS)

    def read(self, downloads):
        paths = fetch_packages(PACKAGES.values(), downloads / "debian")
        portuguese, english = (_paragraphs(read_members(path, ".html")) for path in paths)
        splits = {"train": {}, "validation": {}, "test": {}}
        seen = set()
        for key in sorted(portuguese.keys() & english.keys()):
            pair = {"pt": portuguese[key], "en": english[key]}
            # Half of the help is the same few sentences on many pages.
            if _is_prose(pair) and tuple(pair.values()) not in seen:
                seen.add(tuple(pair.values()))
                splits[split_of(key[0])]["#".join(key)] = pair
        return splits


class _ParagraphParser(html.parser.HTMLParser):
    """Collects the text of each heading and paragraph that has an id."""

    def __init__(self):
        super().__init__()
        self.texts = {}
        self._identifier = None

    def handle_starttag(self, tag, attrs):
        if tag in BLOCKS:
            self._identifier = dict(attrs).get("id")

    def handle_endtag(self, tag):
        if tag in BLOCKS:
            self._identifier = None

    def handle_data(self, data):
        if self._identifier:
            self.texts[self._identifier] = self.texts.get(self._identifier, "") + data


def _paragraphs(pages):
    """Text by page and id."""
    paragraphs = {}
    for path, content in pages.items():
        page, found = FOLDER.subn("", path)
        if found:
            parser = _ParagraphParser()
            parser.feed(content.decode("utf-8"))
            for identifier, text in parser.texts.items():
                paragraphs[page, identifier] = " ".join(text.split())
    return paragraphs


def _is_prose(pair):
    """Whether both are sentences: not code, not a name that is the same in both."""
    portuguese, english = pair.values()
    return portuguese != english and all(
        1 < len(text.split()) <= LONGEST and not CODE.search(text) for text in pair.values()
    )
