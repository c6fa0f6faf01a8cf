"""Manual pages of Linux in eight languages, from Debian packages."""

import gzip
import pathlib
import re

from .builder import Builder, classified, split_of
from .downloads import fetch_packages, read_members

# Each page has a free licence of its own: GPL and BSD ones mostly; see the copyright files.
PACKAGES = (
    *("manpages", "manpages-dev", "manpages-de", "manpages-es", "manpages-fr", "manpages-it"),
    *("manpages-pl", "manpages-pt-br", "manpages-ro"),
)
LANGUAGES = ("en", "de", "es", "fr", "it", "pl", "pt", "ro")
# What the lines of these macros say is text. Those of the second kind join their arguments.
TEXT_MACROS = {"SH", "SS", "B", "I", "SM", "SB"}
JOINING_MACROS = {"BR", "RB", "BI", "IB", "IR", "RI"}
CHARACTERS = {
    "-": "-", "e": "\\", " ": " ", "~": " ", "(aq": "'", "(cq": "’", "(oq": "‘", "(dq": '"',
    "(lq": "“", "(rq": "”", "(em": "—", "(en": "–", "(bu": "•", "(co": "©", "(ha": "^", "(ti": "~",
    "(rs": "\\", "(bv": "|", "(>=": "≥", "(<=": "≤", "(mu": "×", "[aq]": "'", "[dq]": '"',
}  # fmt: skip
FONT = re.compile(r"\\f(?:\[[^]]*\]|\(..|.)")
ESCAPE = re.compile(r"\\(\[[^]]*\]|\(..|\*\[[^]]*\]|\*\(..|\*.|s[-+]?\d+|.)")
ARGUMENT = re.compile(r'"([^"]*)"?|(\S+)')


class ManualPages(Builder):
    """Pages and the language they are in. All translations of a page are in one split."""

    HOMEPAGE = "https://www.kernel.org/doc/man-pages/"
    FEATURES = classified(LANGUAGES)

    def read(self, downloads):
        splits = {"train": {}, "validation": {}, "test": {}}
        for package in fetch_packages(PACKAGES, downloads / "debian"):
            for path, content in read_members(package, ".gz").items():
                language, page = _language_and_page(path)
                if page is None:
                    continue
                text = plain_text(gzip.decompress(content).decode("utf-8", errors="replace"))
                # Shorter ones only say on which page one should look.
                if len(text) > 400:
                    row = {"text": text, "label": language}
                    splits[split_of(page)][f"{language}/{page}"] = row
        return splits


def plain_text(source):
    """The text of a page that is written with the `man` macros of roff.

    Tables, definitions of macros and comments are left out.
    """
    words, skipped_until = [], None
    for line in source.splitlines():
        macro, *rest = line[1:].split(maxsplit=1) or [""]
        if not line.startswith((".", "'")):
            macro, rest = None, [line]
        if skipped_until:
            skipped_until = None if line.startswith(skipped_until) else skipped_until
        elif macro in ("de", "ig", "TS"):
            skipped_until = ".TE" if macro == "TS" else ".."
        elif macro is None:
            words.append(_unescaped(line))
        elif macro in TEXT_MACROS | JOINING_MACROS:
            arguments = [quoted or plain for quoted, plain in ARGUMENT.findall(" ".join(rest))]
            joint = "" if macro in JOINING_MACROS else " "
            words.append(_unescaped(joint.join(arguments)))
    return " ".join(" ".join(words).split())


def _unescaped(text):
    return ESCAPE.sub(lambda found: CHARACTERS.get(found[1], ""), FONT.sub("", text))


def _language_and_page(path):
    """Of `.../man/de/man1/ls.1.gz` de and ls.1; of what is no page None, twice."""
    *_, folder, section, name = ("", "", *pathlib.PurePosixPath(path).parts)
    if not section.startswith("man"):
        return None, None
    language = "en" if folder == "man" else folder[:2]
    return (language, name.removesuffix(".gz")) if language in LANGUAGES else (None, None)
