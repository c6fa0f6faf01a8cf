"""Contents of a release, an installed wheel, and types in a user's program."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from backends import ROOT, on_one_backend

# Python files and data, the same under every backend.
pytestmark = on_one_backend

PACKAGE = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "keras_moe").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
)
VERSIONS = [f"3.{minor}" for minor in range(11, 14)]


def run(*command, **kwargs):
    # Not the folder of this repository, which would be imported first.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        env={**environment, **kwargs.pop("env", {})},
        capture_output=True,
        text=True,
        **kwargs,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, source, folder):
    """The path of the `kind`, "sdist" or "wheel", that setuptools makes of a source folder."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    printed = run(sys.executable, "-c", code, cwd=source)
    return folder / printed.splitlines()[-1]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """An sdist, and the wheel that is made of it and of nothing else."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    without = shutil.ignore_patterns("__pycache__", "results")
    for name in ("keras_moe", "tests", "benchmarks", "examples", "studies"):
        shutil.copytree(ROOT / name, source / name, ignore=without)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg", "tox.ini"):
        shutil.copy(ROOT / name, source)
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, folder)


def test_a_wheel_holds_the_package_and_nothing_else(release):
    with zipfile.ZipFile(release[1]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert sorted(name for name in names if ".dist-info/" not in name) == PACKAGE
    assert {"keras_moe/py.typed", "keras_moe/reporting/page.html"} < set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Python: >=3.11" in metadata
    for version in VERSIONS:
        assert f"Classifier: Programming Language :: Python :: {version}\n" in metadata


def test_an_sdist_holds_the_package_and_what_builds_it(release):
    with tarfile.open(release[0]) as sdist:
        names = [member.name.partition("/")[2] for member in sdist if member.isfile()]
    assert set(PACKAGE) | {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= set(names)
    kept = ("keras_moe/", "keras_moe.egg-info/")
    assert not [name for name in names if "/" in name and not name.startswith(kept)]


def environment_with(wheel, python, folder):
    """A new environment of a Python that has nothing but the wheel, and its folder of packages."""
    run(python, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--no-compile", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    return site


USER = """
from backends import on_one_backend
from keras_moe import callbacks, layers, losses, ops, routers

experts = layers.FeedForwardExperts(num_experts=8, hidden_dim=16)
layer = layers.MixtureOfExperts(experts, router=routers.TopKRouter(top_k=1))
monitor = callbacks.ExpertMonitor()

class Mine(losses.RouterLoss):
    def compute(self, routing: ops.Routing) -> object:
        return routing.counts

ops.top_k_routing(top_k=2)  # type: ignore[call-arg]
layers.GatedExperts(num_experts="8", hidden_dim=16)  # type: ignore[arg-type]
"""


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_types_are_seen_from_a_users_program(version, release, tmp_path):
    environment_with(release[1], sys.executable, tmp_path / "environment")
    (tmp_path / "user.py").write_text(USER)
    options = ["--python-version", version, "--ignore-missing-imports", "--warn-unused-ignores"]
    python = ["--python-executable", tmp_path / "environment" / "bin" / "python"]
    run(sys.executable, "-m", "mypy", *options, *python, "user.py", cwd=tmp_path)
