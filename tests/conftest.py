"""What all tests share: strict warnings, reproducible draws, programs that are compiled in a hurry.

The process that hands the tests out to others loads this file too, so Keras is imported where the
tests run only.
"""

import gc
import os
import random
import re
import subprocess
import sys
import tempfile

import hypothesis
import pytest

# A test runs what it compiles once or twice, so XLA and LLVM compile in a hurry. For fused loops,
# XLA's older emitter takes half the time of the one by MLIR.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
if os.environ.get("KERAS_BACKEND") == "jax":
    # Both cores are busy anyway, and code in one part is compiled with a tenth less work.
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

# All that is alive is searched for garbage after each file only: see `forget_what_was_compiled`.
gc.set_threshold(*gc.get_threshold()[:2], 10**6)

hypothesis.settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, max_examples=30
)
hypothesis.settings.load_profile("reproducible")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for exception in (
        # Keras's own `convert_to_numpy` on PyTorch with NumPy 2.
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
        # Keras's own import of ONNX, in 3.13.
        "ignore:In the future `np.object` will be defined:FutureWarning",
        # Keras's own `fit` on JAX 0.12 with labels of int64.
        "ignore:Explicitly requested dtype int64 requested in ShapeDtypeStruct:UserWarning",
        # A program that another worker still writes (`share_programs`): JAX compiles it.
        "ignore:Error reading persistent compilation cache entry:UserWarning",
        # Small tests of routers whose experts choose among the tokens of a batch.
        "ignore:Experts choose among all samples:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", exception)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        share_programs(config)


def share_programs(config):
    """JAX reads what a worker of this run, or a process that a test started, has compiled."""
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_ignore_collect(collection_path):
    """Leave out files all of whose tests run on other backends: their imports take seconds."""
    if collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    mark = r"^pytestmark = \[?\s*(?:on_one_backend|pytest\.mark\.backends\((.*?)\))"
    of_file = re.search(mark, text, re.MULTILINE)
    if of_file is None or "on_each_backend" in text:
        return None
    if text.count("pytest.mark.backends(") > (of_file[1] is not None):
        return None
    return True if os.environ.get("KERAS_BACKEND", "") not in (of_file[1] or "torch") else None


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


def pytest_generate_tests(metafunc):
    """A test of a `mode` runs in each of `KERNEL_MODES`, of a `place` in each of `PLACES`."""
    from backends import KERNEL_MODES, PLACES

    names = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    for name, values in (("mode", KERNEL_MODES), ("place", PLACES)):
        if name in metafunc.fixturenames and not any(name in each for each in names):
            is_place = name == "place"
            ids = "-".join if is_place else None
            metafunc.parametrize(name, values, indirect=is_place, ids=ids)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so short that small groups need full tiles and a tail, and chunks of few groups."""
    from backends import BACKEND

    from keras_moe.backend import tiles

    for place in ("tiles", "padded"):
        monkeypatch.setattr(f"keras_moe.backend.{place}.tile_length", lambda *_: 4)
    num_wide_rows = tiles.num_wide_rows
    monkeypatch.setattr(tiles, "num_wide_rows", lambda *each: min(num_wide_rows(*each), 2))
    for name, value in (("MIN_WIDE_ROWS", 1), ("CHUNK_ENTRIES", 1), ("MAX_REST", 0.7)):
        monkeypatch.setattr(tiles, name, value)
    if BACKEND == "torch":
        monkeypatch.setattr("keras_moe.backend.torch_groups.CPU_CHUNK_VALUES", 64)
    if BACKEND == "jax":
        # It keeps what it traced by the function: this one has traced no other tiles.
        import jax

        from keras_moe.backend import jax as jax_backend

        compute = jax_backend.run_compiled.__wrapped__
        program = jax.jit(lambda *inputs: compute(*inputs), static_argnums=(0, 1, 2, 3))
        monkeypatch.setattr(jax_backend, "run_compiled", program)


@pytest.fixture
def place(request, small_tiles):
    """A platform to compute for, and a mode to do it in: of `PLACES`, unless a test sets others."""
    from keras_moe import ops

    with ops.platform(request.param[0]):
        yield request.param


@pytest.fixture(scope="module")
def programs_not_kept():
    """What JAX compiles for devices that are not there, it cannot read."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def keep(programs):
        jax.config.update("jax_enable_compilation_cache", programs)
        compilation_cache.reset_cache()

    before = jax.config.jax_enable_compilation_cache
    keep(False)
    yield
    keep(before)


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


@pytest.fixture(autouse=True, scope="session")
def data_is_not_tuned():
    """TensorFlow tunes datasets in threads that sleep longer and longer.

    Where an iterator is deleted late, as by the search for garbage after a file, that waits for its
    thread to wake up: up to 20 seconds.
    """
    from backends import BACKEND

    if BACKEND != "tensorflow":
        yield
        return
    import tensorflow as tf

    iterate = tf.data.Dataset.__iter__

    def iterate_untuned(dataset):
        options = tf.data.Options()
        options.autotune.enabled = False
        return iterate(dataset.with_options(options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.data.Dataset, "__iter__", iterate_untuned)
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """JAX keeps every function it ever compiled, some gigabytes at the end of a suite.

    TensorFlow cannot be made to forget. What it keeps is at least not searched for garbage again,
    which took seconds each time.
    """
    from backends import forget

    yield
    forget()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """End a run whose backend does not start, with its reason: a worker's last words are lost."""
    if not error:
        return
    program = [sys.executable, "-c", "import keras; print(keras.ops.ones(1) + 1)"]
    started = subprocess.run(program, capture_output=True, text=True)
    if started.returncode:
        pytest.exit(f"The backend does not start:\n{started.stderr}", returncode=1)
