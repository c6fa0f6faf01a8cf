"""Plain text for people: names from models and data, and tables."""

import unicodedata

# Control and formatting characters, lone surrogates, separators of lines and paragraphs. Among them
# are those that turn the direction of writing, and those that a terminal obeys.
_ACTIVE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# They join letters and emojis.
_JOINERS = "\u200c\u200d"


def as_text(value):
    r"""The text of a value, with an escape such as `\u202e` for each character that would act."""
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in _ACTIVE and letter not in _JOINERS
        else letter
        for letter in str(value)
    )


def table(rows):
    """Lines of a table of texts, with the first column to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
