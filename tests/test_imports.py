"""What importing the package brings in, and which part of it may import which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

BACKEND = keras.backend.backend()
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keras_moe"
FILES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"tensorflow", "jax", "jaxlib", "torch", "tensorflow_probability", "triton"}

# A part imports from parts of a lower number only; a part that is not named stands on top.
LEVELS = {
    "keras_internals": -1,
    "backend": 0,
    "bank_weights": 0,
    "batches": 1,
    "command_line": 0,
    "files": 0,
    "initializers": 0,
    "parameters": 0,
    "plain_text": 0,
    "saved_state": 0,
    "keras_objects": 0,
    "misplaced_arguments": 0,
    "named_arguments": -1,
    "tensor_checks": -1,
    "validation": -2,
    "shape_checks": 0,
    "lora": 1,
    "serialization": 1,
    "activations": 2,
    "ops": 1,
    "replacing": 2,
    "routers": 2,
    "losses": 2,
    "metrics": 2,
    "optimizers": 2,
    "layers": 3,
    "inspection": 4,
    "health": 5,
    "visualization": 5,
    "__main__": 7,
}
TOP = 6


def run(*arguments, backend=BACKEND):
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:keras_moe", *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_package_imports_nothing_but_itself_and_the_backend_of_keras():
    done = run(
        "-c",
        "import sys, keras\n"
        "before = set(sys.modules)\n"
        "import keras_moe\n"
        "print(*set(sys.modules) - before)",
    )
    assert done.returncode == 0, done.stderr
    new = done.stdout.split()
    own = {BACKEND, "numpy"} | ({"jaxlib"} if BACKEND == "jax" else set())
    foreign = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) - own
    assert foreign == {"keras_moe"}
    backends = {name for name in new if name.startswith("keras_moe.backend.")}
    if BACKEND != "torch":
        backends.remove("keras_moe.backend.one_hot")  # what the two that compile share
    assert {name.split(".")[2].partition("_")[0] for name in backends} == {BACKEND}


@pytest.mark.backends("torch")
@pytest.mark.parametrize(
    "backend, received",
    [
        ("numpy", "keras.backend.backend()='numpy'"),
        ("foo", "KERAS_BACKEND='foo' (Unable to import backend : foo)"),
    ],
)
def test_another_backend_is_refused_with_the_way_out(backend, received):
    said = (
        "ImportError: keras_moe runs on the Keras backends tensorflow, jax, torch. "
        f"Received: {received}. "
        "Set KERAS_BACKEND to one of them, which is installed, before keras is imported."
    )
    imported = run("-c", "import keras_moe", backend=backend)
    assert imported.returncode != 0
    assert imported.stderr.strip().splitlines()[-1] == said
    called = run("-m", "keras_moe", "inspect", "model.keras", backend=backend)
    assert called.returncode != 0
    assert said in called.stderr and len(called.stderr.splitlines()) == 1


def imports(path):
    """Full names of what a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return part(path.relative_to(PACKAGE).with_suffix("").parts)


def part(names):
    """The part that a module belongs to, by its names below the package."""
    return names[1] if names[0] == "_internal" and len(names) > 1 else names[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_frameworks_are_named_in_the_backend_folder_only(path):
    found = {name.partition(".")[0] for name in imports(path)} & FRAMEWORKS
    assert found <= ({framework_of(path)} if part_of(path) == "backend" else set())


def framework_of(path):
    """The framework of `backend/jax.py` and of `backend/jax_kernels/`."""
    return path.relative_to(PACKAGE / "backend").parts[0].removesuffix(".py").partition("_")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_part_imports_from_lower_parts_only(path):
    here = part_of(path)
    if here == "__init__":
        return
    own = {part(name.split(".")[1:]) for name in imports(path) if name.startswith("keras_moe.")}
    for other in own - {here}:
        assert LEVELS.get(other, TOP) < LEVELS.get(here, TOP), f"{here} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_keras_are_in_one_file_only(path):
    private = "keras.src" in path.read_text()
    assert private == (part_of(path) == "keras_internals")
