"""Modules that importing the package brings in, and which part of it may import which."""

import ast
import sys

import pytest
from backends import BACKEND, ROOT, on_one_backend, run_python

PACKAGE = ROOT / "keras_moe"
FILES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"tensorflow", "jax", "jaxlib", "torch", "tensorflow_probability", "triton"}

# A part imports from those above it only; one that is not named, such as a tool, from all of them.
PARTS = [
    ("checks", "keras_internals", "Tensor"),
    ("backend", "serialization"),
    ("base_layer", "ops"),
    ("losses", "metrics", "optimizers", "routers"),
    ("layers",),
    ("health", "inspection"),
    ("visualization",),
]
LEVELS = {name: level for level, names in enumerate(PARTS) for name in names}
TOOLS = len(PARTS)
# Modules of `backend/` that every framework uses.
SHARED = {"base", "layouts", "padded"}


IMPORTED = """
import sys
sys.modules["tensorflow"] = None
import keras
before = set(sys.modules)
import keras_moe
print(*set(sys.modules) - before)
"""


@pytest.mark.backends("jax", "torch")  # TensorFlow takes long to import
def test_the_package_imports_nothing_but_itself_and_the_backend_of_keras():
    new = run_python("-W", "error::DeprecationWarning:keras_moe", "-c", IMPORTED).split()
    own = {BACKEND, "numpy"} | ({"jaxlib"} if BACKEND == "jax" else set())
    foreign = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names) - own
    assert foreign == {"keras_moe"}
    backends = {name.split(".")[2] for name in new if name.startswith("keras_moe.backend.")}
    # Tiles are a layout of those that compile for CPUs.
    assert {name.partition("_")[0] for name in backends} - {"tiles"} == {*SHARED, BACKEND}


@on_one_backend
def test_another_backend_is_refused_with_the_way_out():
    for name in ("numpy", "foo"):
        error = run_python("-c", "import keras_moe", fails=True, KERAS_BACKEND=name)
        assert f"on the Keras backends tensorflow, jax, torch. Received: {name!r}. Set" in error


WITHOUT_OPTIONAL_PARTS = """
import sys
sys.modules["keras_tuner"] = sys.modules["matplotlib"] = None
import keras_moe, pydoc
assert "upcycle" in pydoc.render_doc(keras_moe)
assert not hasattr(keras_moe, "tuner") and not hasattr(keras_moe, "visualization")
try:
    import keras_moe.tuner
except ImportError as error:
    print(error)
"""


@on_one_backend
def test_packages_that_are_missing_leave_the_rest_alone():
    printed = run_python("-c", WITHOUT_OPTIONAL_PARTS)
    assert 'run `pip install "keras-tuner[bayesian]" six`' in printed


def imports(path):
    """Full names of what a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(names):
    """The part that a module belongs to, by its names below the package."""
    return names[1] if names[0] == "_internal" and len(names) > 1 else names[0]


@on_one_backend
def test_a_part_imports_from_lower_parts_and_no_framework():
    for path in FILES:
        names = path.relative_to(PACKAGE).with_suffix("").parts
        here, imported = part(names), list(imports(path))
        # The framework of `backend/jax.py` and of `backend/jax_tpu.py`.
        allowed = {names[1].partition("_")[0]} if here == "backend" else set()
        assert {name.partition(".")[0] for name in imported} & FRAMEWORKS <= allowed, path
        private = "keras.src" in path.read_text()
        assert private == (here == "keras_internals"), path
        own = {part(name.split(".")[1:]) for name in imported if name.startswith("keras_moe.")}
        for other in own - {here} if here != "__init__" else ():
            assert LEVELS.get(other, TOOLS) < LEVELS.get(here, TOOLS), f"{here} imports {other}"
