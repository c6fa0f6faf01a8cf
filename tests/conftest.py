"""What all tests share: strict warnings, reproducible draws, programs that are compiled in a hurry.

The process that hands the tests out to others loads this file too, so Keras is imported where the
tests run only.
"""

import gc
import os
import random
import shutil
import tempfile

import hypothesis
import pytest

# A test runs what it compiles once or twice, so XLA and LLVM compile in a hurry. For fused loops,
# XLA's older emitter takes half the time of the one by MLIR.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)

# JAX reads a program that was compiled before, here or in a process that a test started.
PROGRAMS = os.environ.get("JAX_COMPILATION_CACHE_DIR") is None and tempfile.mkdtemp()
if PROGRAMS:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

hypothesis.settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, max_examples=30
)
hypothesis.settings.load_profile("reproducible")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for exception in (
        # Keras's own `convert_to_numpy` on PyTorch with NumPy 2.
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", exception)


def pytest_unconfigure():
    if PROGRAMS:
        shutil.rmtree(PROGRAMS)


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if runs_elsewhere(item)])
    items[:] = [item for item in items if not runs_elsewhere(item)]


def runs_elsewhere(item):
    """Whether a test is marked as one of other backends."""
    from backends import BACKEND

    marker = item.get_closest_marker("backends")
    if marker is None:
        return False
    assert {"tensorflow", "jax", "torch"} >= set(marker.args) != set(), f"{item.nodeid} never runs"
    return BACKEND not in marker.args


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so short that small groups need full tiles and a tail, and runs of few groups."""
    from backends import BACKEND

    from keras_moe import backend
    from keras_moe.ops.grouped import run

    monkeypatch.setattr("keras_moe.ops.grouped.tile_sizes.tile_sizes", lambda *_: (2, 8))
    monkeypatch.setattr("keras_moe.ops.grouped.tile_sizes.TILE_OVERHEAD", 1)
    monkeypatch.setattr("keras_moe.ops.grouped.padded.tile_length", lambda *_: 4)
    monkeypatch.setattr("keras_moe.ops.grouped.slices.CPU_RUN_ROWS", 8)
    if BACKEND == "jax":
        # It keeps what it traced by the function: this one has traced no other tiles.
        compute = run._run.__wrapped__
        monkeypatch.setattr(run, "_run", backend.compile_once(lambda *inputs: compute(*inputs)))


@pytest.fixture(scope="module")
def programs_not_kept():
    """What JAX compiles for devices that are not there, it cannot read."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def policy_of_before():
    """Benchmarks set the policy of their process, and the next test may be any other."""
    import keras

    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture(autouse=True)
def draws_of_one_seed():
    """A test draws the same weights in every run, whichever tests came before it.

    `keras.utils.set_random_seed` also empties TensorFlow's cache of kernels: half again the time.
    """
    import numpy as np

    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """JAX keeps every function it ever compiled, some gigabytes at the end of a suite.

    So does TensorFlow, whatever one does: Python need not look through it again for what is no
    longer in use, which took seconds each time.
    """
    from backends import forget

    yield
    forget()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def traces_are_no_news():
    """Each test traces its functions anew, which TensorFlow takes for a mistake."""
    from backends import BACKEND

    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")
