"""Manual pages of Linux in eight languages, from Debian packages."""

import gzip
import pathlib
import re
import zlib

import tensorflow_datasets as tfds

from .debian import fetch_packages, read_members

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


class ManualPages(tfds.core.GeneratorBasedBuilder):
    """Pages and the language they are in. All translations of a page are in one split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=LANGUAGES),
                }
            ),
            supervised_keys=("text", "label"),
            homepage="https://www.kernel.org/doc/man-pages/",
        )

    def _split_generators(self, dl_manager):
        packages = fetch_packages(PACKAGES, dl_manager.download_dir / "debian")
        splits = {"train": {}, "validation": {}, "test": {}}
        for package in packages:
            for path, content in read_members(package, ".gz").items():
                language, page = _language_and_page(path)
                if page is None:
                    continue
                text = plain_text(gzip.decompress(content).decode("utf-8", errors="replace"))
                # Shorter ones only say on which page one should look.
                if len(text) > 400:
                    example = {"text": text, "label": language}
                    splits[_split_of(page)][f"{language}/{page}"] = example
        return {name: pages.items() for name, pages in splits.items()}

    def _generate_examples(self, pages):
        yield from pages


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


def _split_of(page):
    part = zlib.crc32(page.encode("utf-8")) % 20
    return {0: "test", 1: "validation"}.get(part, "train")
