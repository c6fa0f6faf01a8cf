"""Files that are whole or not there."""

import os
import pathlib
import tempfile


def write_whole(path, text):
    """Write a text file beside its place and rename it: no reader ever finds half of it.

    Raises:
        OSError: If it cannot be written; then a file of this name is as it was.
        ValueError: If there is something else of this name, such as a device or a folder, which
            the new file would replace.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(
            f"A file must be written to the name of a file, or to a new one. Received: "
            f"{str(path)!r}, which is a device, a pipe or a folder. Name another."
        )
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
