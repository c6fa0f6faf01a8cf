"""The folder of a study's output, which one run has at a time."""

import fcntl
import os

# A file that is open stays locked until the process ends, however it ends.
_CLAIMED: dict = {}


def claim(folder):
    """Make the folder if there is none, and keep other runs out of it.

    Args:
        folder: `pathlib.Path`.

    Raises:
        OSError: If nothing can be written there, or another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise OSError(f"{_RULE} Received: --output {folder} ({error.strerror}). {_FIX}") from error
    if not writable:
        raise OSError(f"{_RULE} Received: --output {folder}, which is read-only. {_FIX}")
    if folder.resolve() in _CLAIMED:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OSError(
            f"One run at a time has a folder. Received: --output {folder}, where another one "
            "works. Wait for it to end, or pass another folder."
        ) from None
    _CLAIMED[folder.resolve()] = handle


_RULE = "The folder of the output must be a folder that can be written to."
_FIX = "Pass another folder."
