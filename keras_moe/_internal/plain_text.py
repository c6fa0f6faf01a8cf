"""Plain text for people: names from models and data, errors on one line, tables."""

import re
import unicodedata

# Control and formatting characters, lone surrogates, separators of lines and paragraphs. Among them
# are those that turn the direction of writing, and those that a terminal obeys.
_ACTIVE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# They join letters and emojis.
_JOINERS = "\u200c\u200d"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Keras wraps an error in a layer's call, in words before it and in a list of arguments after it.
_BEFORE = re.compile(r".*Exception encountered(: | when calling \S+ )")
_AFTER = "Arguments received by"
_LONGEST = 300


def as_text(value):
    r"""The text of a value, with an escape such as `\u202e` for each character that would act."""
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in _ACTIVE and letter not in _JOINERS
        else letter
        for letter in str(value)
    )


def describe(error):
    """An error on one line; with its class, unless it says what was received."""
    text = as_text(" ".join(_COLOURS.sub("", str(error)).split()))
    text = _BEFORE.sub("", text).partition(_AFTER)[0].strip()
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text if "Received:" in text else f"{type(error).__name__}: {text}".removesuffix(": ")


def table(rows):
    """Lines of a table of texts, with the first column to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
