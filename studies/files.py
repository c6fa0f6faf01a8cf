"""The folder of a study's output, and files that are whole or not there."""

import contextlib
import fcntl
import json
import os

# A file that is open stays locked until the process ends, however it ends.
_CLAIMED: dict = {}


def claim(folder):
    """Make the folder if there is none, and keep other runs out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in _CLAIMED:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OSError(
            f"Only one run at a time may use a folder. Received: --output {folder}, in use."
        ) from None
    _CLAIMED[folder.resolve()] = handle


@contextlib.contextmanager
def whole(path):
    """A path to write to; the file appears at `path` once it is written.

    A run that is killed leaves no half of a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name keeps its ending, by which Keras and Matplotlib choose the format.
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=2), encoding="utf-8")


def save_figure(figure, path):
    with whole(path) as part:
        figure.savefig(part, dpi=120)
