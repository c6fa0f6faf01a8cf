"""Files that ship inside Debian packages."""

import io
import json
import pathlib
import shutil
import subprocess
import tarfile
import tempfile

from . import digests

DIGESTS = "sha256.json"


def fetch_packages(names, cache_dir):
    """Paths of these packages, downloaded together once, so that their versions agree.

    apt does the download and checks it, with the sources and keys that the user has set. What it
    has brought is checked again whenever it is read.

    Args:
        names: names of packages.
        cache_dir: folder that keeps them.

    Raises:
        OSError: If this is no system with apt and dpkg.
        ConnectionError: If apt cannot get the packages.
        ValueError: If a package is not as it came.
    """
    folder = pathlib.Path(cache_dir) / "-".join(names)
    if not folder.exists():
        _require_debian(names)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the finished download appears there in one step.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            download = pathlib.Path(scratch, "download")
            download.mkdir()
            run = subprocess.run(
                ["apt-get", "download", "--quiet", *names],
                cwd=download,
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise ConnectionError(
                    f"Cannot download the Debian packages {', '.join(names)}, which hold the data. "
                    f"Received from apt-get:\n{run.stderr.strip()}\n"
                    "Run `apt-get update`, check the connection, and run again; or choose data "
                    "that come from PyPI."
                )
            received = {path.name: digests.sha256(path) for path in download.glob("*.deb")}
            (download / DIGESTS).write_text(json.dumps(received))
            download.rename(folder)
    packages = [path for name in names for path in folder.glob(f"{name}_*.deb")]
    found = {path.name: digests.sha256(path) for path in packages}
    if not (folder / DIGESTS).exists() or found != json.loads((folder / DIGESTS).read_text()):
        raise ValueError(
            f"The cached packages must be {', '.join(names)} as they came. Received: "
            f"{', '.join(sorted(found)) or 'none'}, of other content. Delete the folder {folder} "
            "and run again."
        )
    return packages


def read_members(package, suffix):
    """Content of each file of a package whose name ends in `suffix`, by its path.

    Raises:
        ValueError: If the package is damaged.
    """
    run = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True)
    if run.returncode:
        raise ValueError(
            f"The cached package is damaged. Received from dpkg-deb for {package}:\n"
            f"{run.stderr.decode(errors='replace').strip()}\n"
            f"Delete the folder {package.parent} and run again."
        )
    with tarfile.open(fileobj=io.BytesIO(run.stdout)) as archive:
        return {
            member.name: archive.extractfile(member).read()
            for member in archive
            if member.isfile() and member.name.endswith(suffix)
        }


def _require_debian(names):
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise OSError(
            f"The data are in the Debian packages {', '.join(names)}, which are fetched with "
            f"apt-get and opened with dpkg-deb. Received: a system without {', '.join(missing)}. "
            "Use Debian or Ubuntu, or choose data that come from PyPI."
        )
