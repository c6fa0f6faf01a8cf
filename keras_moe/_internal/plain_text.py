"""Plain text for people: names from models and data, and errors of others on one line."""

import contextlib
import re
import unicodedata
from collections.abc import Iterator

# Control and formatting characters, lone surrogates, separators of lines and paragraphs. Among them
# are those that turn the direction of writing, and those that a terminal obeys.
_ACTIVE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# They join letters and emojis.
_JOINERS = "\u200c\u200d"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Keras wraps an error at each level, in words before it and in lists after it.
_BEFORE = re.compile(
    r".*(Exception encountered(: | when calling \S+ )|Example error message for object <[^>]*>: )"
)
_AFTER = re.compile("Arguments received by|List of objects that could not be loaded")
_LONGEST = 600


def as_text(value):
    r"""The text of a value, with an escape such as `\u202e` for each character that would act."""
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if unicodedata.category(letter) in _ACTIVE and letter not in _JOINERS
        else letter
        for letter in str(value)
    )


def describe(error, longest=_LONGEST):
    """An error on one line; with its class, unless it states a rule and what was received."""
    text = as_text(" ".join(_COLOURS.sub("", str(error)).split()))
    text = _AFTER.split(_BEFORE.sub("", text))[0].strip()
    text = text if len(text) <= longest else f"{text[:longest]}..."
    return text if "Received:" in text else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextlib.contextmanager
def stating(rule, received, fix="") -> Iterator[None]:
    """Errors of others become a ValueError with the rule, what was received and the cause."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if "Received:" in str(error):
            raise
        raise ValueError(
            f"{rule} Received: {received} ({describe(error, longest=300)}). {fix}".strip()
        ) from error


def table(rows):
    """Lines of a table of texts, with the first column to the left and the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
