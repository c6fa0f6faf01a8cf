"""What tests share: strict warnings, reproducible draws, one interface to three backends."""

import os
import random

import hypothesis
import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import backend
from keras_moe.ops.grouped import run

BACKEND = keras.backend.backend()

# "eager" runs operation by operation, "graph" is tf.function without XLA.
MODES = {
    "tensorflow": ("eager", "graph", "xla"),
    "jax": ("eager", "jit"),
    "torch": ("eager",),
}[BACKEND]

# Where a test needs one answer and not the agreement of several: JAX compiles each operation of an
# eager call for each shape, which is slower than compiling it as a whole.
FAST_MODE = "jit" if BACKEND == "jax" else "eager"

# Hypothesis draws, by how long the compilation of one shape takes.
EXAMPLES = {"eager": 1 if BACKEND == "jax" else 15, "graph": 5, "xla": 5, "jit": 5}

# A test runs what it compiles once or twice, so XLA and LLVM compile in a hurry. For fused loops,
# XLA's older emitter takes half the time of the one by MLIR.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)

hypothesis.settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, max_examples=30
)
hypothesis.settings.load_profile("reproducible")

# One mode for each way to compute: "graph" runs the code of "eager".
KERNEL_MODES = {"tensorflow": ("eager", "xla"), "jax": ("jit",), "torch": ("eager",)}[BACKEND]

if BACKEND == "tensorflow":
    import tensorflow as tf

    # Each test traces its functions anew, which TensorFlow takes for a mistake.
    tf.get_logger().setLevel("ERROR")

if BACKEND == "jax":
    import jax


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for exception in (
        # Keras's own `convert_to_numpy` on PyTorch with NumPy 2.
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    ):
        config.addinivalue_line("filterwarnings", exception)


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if runs_elsewhere(item)])
    items[:] = [item for item in items if not runs_elsewhere(item)]


def runs_elsewhere(item):
    """Whether a test is marked as one of other backends."""
    marker = item.get_closest_marker("backends")
    if marker is None:
        return False
    assert {"tensorflow", "jax", "torch"} >= set(marker.args) != set(), f"{item.nodeid} never runs"
    return BACKEND not in marker.args


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so short that small groups need full tiles and a tail, and runs of few groups."""
    monkeypatch.setattr("keras_moe.ops.grouped.tile_sizes.tile_sizes", lambda *_: (2, 8))
    monkeypatch.setattr("keras_moe.ops.grouped.tile_sizes.TILE_OVERHEAD", 1)
    monkeypatch.setattr("keras_moe.ops.grouped.padded.tile_length", lambda *_: 4)
    monkeypatch.setattr("keras_moe.ops.grouped.slices.CPU_RUN_ROWS", 8)
    if BACKEND == "jax":
        # It keeps what it traced by the function: this one has traced no other tiles.
        compute = run._run.__wrapped__
        monkeypatch.setattr(run, "_run", backend.compile_once(lambda *inputs: compute(*inputs)))


@pytest.fixture(autouse=True)
def policy_of_before():
    """Benchmarks set the policy of their process, and the next test may be any other."""
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture(autouse=True)
def draws_of_one_seed():
    """A test draws the same weights in every run, whichever tests came before it.

    `keras.utils.set_random_seed` also empties TensorFlow's cache of kernels: half again the time.
    """
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """JAX keeps every function it ever compiled, some gigabytes at the end of a suite."""
    yield
    forget()


def forget():
    if BACKEND == "jax":
        jax.clear_caches()


def some(cases, mode):
    """The cases; the first alone where each call compiles its loops anew."""
    return list(cases)[:1] if (BACKEND, mode) == ("jax", "eager") else list(cases)


def to_numpy(tree):
    """All tensors of a structure as arrays. None stays None: a missing gradient is seen."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else ops.convert_to_numpy(leaf), tree
    )


def to_tensors(tree):
    """All arrays of a structure as tensors; None stays None."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), tree
    )


def compiled(function, mode):
    """`function`, from arrays to arrays, in one of `MODES`."""
    return _on_arrays(_compile(function, mode))


def differentiated(function, mode):
    """From `function(inputs, *context) -> (scalar, aux)` to `(scalar, aux, gradients)`.

    `inputs` is a list of float arrays; there is one gradient for each.
    """
    return _on_arrays(_compile(_GRADIENTS[BACKEND](function), mode))


def gradients(function, inputs, mode=FAST_MODE):
    """Gradients of the scalar `function(*inputs)`."""
    return differentiated(lambda inputs: (function(*inputs), ()), mode)(inputs)[2]


def assert_close(actual, expected, scale=None, tolerance=1e-5):
    """Equal up to `tolerance` of the largest expected entry, or of `scale` where entries cancel."""
    expected = np.asarray(expected, "float64")
    assert np.shape(actual) == expected.shape
    if scale is None:
        scale = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(
        np.asarray(actual, "float64"), expected, rtol=0, atol=tolerance * scale
    )


def _on_arrays(function):
    return lambda *arrays: to_numpy(function(*to_tensors(arrays)))


def _compile(function, mode):
    if mode == "jit":
        return jax.jit(function)
    if mode in ("graph", "xla"):
        # As in Keras, which never lets AutoGraph rewrite a layer.
        return tf.function(function, jit_compile=mode == "xla", autograph=False)
    return function


def _tensorflow_gradients(function):
    def value_and_gradients(inputs, *context):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value, aux = function(inputs, *context)
        return value, aux, tape.gradient(value, inputs)

    return value_and_gradients


def _jax_gradients(function):
    def value_and_gradients(inputs, *context):
        both = jax.value_and_grad(function, has_aux=True)
        (value, aux), gradients = both(inputs, *context)
        return value, aux, gradients

    return value_and_gradients


def _torch_gradients(function):
    import torch

    def value_and_gradients(inputs, *context):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        value, aux = function(inputs, *context)
        return value, aux, list(torch.autograd.grad(value, inputs, allow_unused=True))

    return value_and_gradients


_GRADIENTS = {
    "tensorflow": _tensorflow_gradients,
    "jax": _jax_gradients,
    "torch": _torch_gradients,
}
