"""Files that are whole or not there."""

import os
import pathlib
import tempfile


def write_whole(path, text):
    """Write a text file beside its place and rename it: no reader ever finds half of it.

    Raises:
        OSError: If it cannot be written; then a file of this name is as it was.
    """
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, _usual_mode())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _usual_mode():
    """What `open` gives a new file; a temporary one is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
