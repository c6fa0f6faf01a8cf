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


def saved_files(folder, *names):
    """The paths of the files that a trained model consists of.

    Raises:
        FileNotFoundError: If one is missing.
    """
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"There is no whole model in the folder. Received: --output {folder}, without "
            f"{', '.join(missing)}. Train one first: give the command without a text."
        )
    return [folder / name for name in names]
