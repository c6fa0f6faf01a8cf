"""Builds the release in `dist/`, checks it, and runs the first example from each file of it.

`python -m tox -e release` runs it; an argument is the tag, which must be that of the version.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).parents[1]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command, **kwargs):
    subprocess.run([str(part) for part in command], check=True, **kwargs)


def main(tag=None):
    (version,) = re.findall(r'^__version__ = "(.*)"', text("keras_moe/__init__.py"), re.MULTILINE)
    if tag is not None:
        assert tag == f"v{version}", (
            f"The tag must be that of the version. Received: {tag}, {version}"
        )
        assert f"\n## {version}\n" in text("CHANGELOG.md"), f"CHANGELOG.md must have {version}"
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", ROOT)
    files = sorted((ROOT / "dist").iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    program = re.search("```python\n(.*?)```", text("README.md"), re.DOTALL)[1]
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            venv.create(folder, with_pip=True)
            python = pathlib.Path(folder, "bin", "python")
            run(python, "-m", "pip", "install", "--quiet", f"{file}[jax]")
            # Not in the repository, whose package would be imported.
            run(python, "-c", program, cwd=folder, env={**os.environ, "KERAS_BACKEND": "jax"})
            print(file.name, "runs")


if __name__ == "__main__":
    main(*sys.argv[1:])
