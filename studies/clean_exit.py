"""A study that ends early does so in one line, with exit code 2, or 130 after Ctrl-C.

Studies import this first: it holds for their other imports too, which take seconds.
"""

import atexit
import errno
import os
import sys

AGAIN = "The same command, given again, ends as if nothing had happened."
CAUSES = {
    errno.ENOSPC: "The disk is full. Free some space.",
    errno.EDQUOT: "The disk quota is used up. Free some space.",
    errno.EPIPE: "Nobody reads the output any longer.",
}


def _end(kind, error, trace):
    """Print one line about the error that ended the program, or the traceback of a bug."""
    if issubclass(kind, KeyboardInterrupt):
        message, code = f"interrupted. {AGAIN}", 130
    else:
        message, code = _message(error), 2
    if message is None:
        sys.__excepthook__(kind, error, trace)
        return
    _give_up_output()
    print(f"error: {message}", file=sys.stderr, flush=True)
    # Files that could not be written would be written again at a usual end, which crashes HDF5.
    os._exit(code)


def _message(error):
    """What to say of an error, or None if it is a mistake in the program."""
    cause = _number(error)
    if cause in CAUSES:
        return f"{CAUSES[cause]} {AGAIN}"
    # Sentences of this package say what was received.
    if not isinstance(error, OSError) and "Received:" not in str(error):
        return None
    from keras_moe._internal.plain_text import describe  # It imports Keras.

    return describe(error)


def _number(error):
    """The number that the system gives an error; frameworks hide it in texts and causes."""
    while error is not None:
        if getattr(error, "errno", None):
            return error.errno
        for number in CAUSES:
            if os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _give_up_output():
    """Discard buffered output that cannot be written, which Python would report at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams():
    """Keras writes to a closed output, and another file would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115


_open_closed_streams()
sys.excepthook = _end
atexit.register(_give_up_output)
