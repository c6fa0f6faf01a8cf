"""Text from models and data, shown as text: nothing in it may move what stands around it."""

import unicodedata

# Control and formatting characters, lone surrogates, separators of lines and paragraphs. Among them
# are those that turn the direction of writing, and those that a terminal obeys.
_ACTIVE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# They join letters and emojis.
_JOINERS = "\u200c\u200d"


def as_text(value):
    r"""The text of a value, with an escape such as `\u202e` for each character that would act."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) if _acts(character) else character for character in text)


def _acts(character):
    return unicodedata.category(character) in _ACTIVE and character not in _JOINERS


def _escaped(character):
    return character.encode("unicode_escape").decode("ascii")
