"""How a command ends: in one line that states the rule, what was received, and the fix."""

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

_LONGEST = 600
# Of what stands in brackets between the rule and the fix.
_LONGEST_CAUSE = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Keras wraps an error at each level: words before it, and all arguments, objects or values behind.
_BEFORE = re.compile(
    r".*(Exception encountered(: | when calling \S+ )|Example error message for object <[^>]*>: )"
)
_BEHIND = re.compile("Arguments received by|List of objects that could not be loaded").split


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage in front."""

    def error(self, message) -> NoReturn:
        fail(f"{message}. `{self.prog} --help` lists the arguments.")


def fail(message) -> NoReturn:
    """End the process with one line on standard error and exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors(debug):
    """Whatever is raised inside ends in `fail`; with `debug` in its traceback."""
    try:
        yield
    except Exception as error:
        if debug:
            raise
        fail(f"{describe(error)} Pass --debug to see the traceback.")


@contextlib.contextmanager
def stating(rule, received, fix) -> Iterator[None]:
    """Whatever is raised inside becomes a ValueError with the rule and the fix, if it has none."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if "Received:" in str(error):
            raise
        message = f"{rule} Received: {received} ({cause(error)}). {fix}"
        raise ValueError(message) from error


def cause(error):
    """The text of `describe`, shortened, so that a message can go on after it."""
    return _shortened(describe(error), _LONGEST_CAUSE)


def describe(error):
    """The text of an error; with its class, unless it is a whole sentence of this package."""
    text = _shortened(_BEHIND(_BEFORE.sub("", _plain(error)))[0].strip())
    if "Received:" in text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(message):
    """Text without colours, line breaks and control characters, and not too long."""
    return _shortened(_plain(message))


def _plain(message):
    text = _COLOURS.sub("", str(message))
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())


def _shortened(text, length=_LONGEST):
    return text if len(text) <= length else f"{text[:length]}..."
