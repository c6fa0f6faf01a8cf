"""Files that are whole or not there."""

import contextlib
import json
import os


@contextlib.contextmanager
def whole(*paths):
    """Paths to write to, one for each of `paths`, where the files appear once all are written.

    A run that is killed leaves no half of a file, and no set of old and new ones: the old ones but
    the first are removed before the new ones appear.

    Args:
        *paths: `pathlib.Path`s in one folder, which is made if there is none.
    """
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    # The name keeps its ending, by which Keras and Matplotlib choose the format.
    parts = [path.with_name(f".{os.getpid()}-{path.name}") for path in paths]
    try:
        yield parts
        for path in paths[1:]:
            path.unlink(missing_ok=True)
        for part, path in zip(parts, paths):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def write_json(path, content):
    """Write a file that is whole or not there."""
    with whole(path) as (part,):
        part.write_text(json.dumps(content, indent=2), encoding="utf-8")


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


def save_figure(figure, path):
    with whole(path) as (part,):
        figure.savefig(part, dpi=120)
