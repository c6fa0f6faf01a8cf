"""A study that ends early prints one line, with exit code 2, or 130 after Ctrl-C.

Studies import this first: it holds for their other imports too, which take seconds.
"""

import atexit
import errno
import os
import sys

# A full disk, a closed pipe: frameworks put the system's words into errors of any class.
CAUSES = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)]


def _end(kind, error, trace):
    """Print one line about the error that ended the program, or the traceback of a bug."""
    message, code = _message(error), 2
    if issubclass(kind, KeyboardInterrupt):
        message, code = "interrupted. The same command, given again, resumes.", 130
    if message is None:
        sys.__excepthook__(kind, error, trace)
        return
    _give_up_output()
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    # Files that could not be written would be written again at a usual end, which crashes HDF5.
    os._exit(code)


def _message(error):
    """The text of an error that is not a bug: of the system, or with what was received."""
    if isinstance(error, OSError) or "Received:" in str(error):
        return str(error)
    while error is not None:
        if any(cause in str(error) for cause in CAUSES):
            return str(error)
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
