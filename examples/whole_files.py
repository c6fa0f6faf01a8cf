"""Files that are whole or not there."""

import os


def write_whole(path, content):
    """The finished file appears in one step: a run that is killed leaves no half of it.

    Args:
        path: `pathlib.Path`; its folder is made if there is none.
        content: bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
