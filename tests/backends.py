"""One interface to three backends: the modes to compute in, arrays in and arrays out."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.backend import backend

BACKEND = keras.backend.backend()
ROOT = pathlib.Path(__file__).parents[1]

# What is written in `keras.ops` alone, or computes nothing, runs on the backend that compiles
# nothing. `test_backend.py` checks what it takes for granted of the others.
on_one_backend = pytest.mark.backends("torch")
on_each_backend = pytest.mark.backends("tensorflow", "jax", "torch")

# "eager" runs operation by operation, "graph" is tf.function without XLA.
MODES = {"tensorflow": ("eager", "graph", "xla"), "jax": ("eager", "jit"), "torch": ("eager",)}[
    BACKEND
]

# Where a test needs one answer and not the agreement of several: JAX compiles each operation of an
# eager call for each shape, which is slower than compiling it as a whole.
FAST_MODE = "jit" if BACKEND == "jax" else "eager"

# Hypothesis draws, by how long the compilation of one shape takes.
EXAMPLES = {"eager": 1 if BACKEND == "jax" else 10, "graph": 5, "xla": 5, "jit": 5}

# `jit_compile` where only the model matters: for TensorFlow, XLA takes seconds for each function.
QUICK_JIT = "auto" if BACKEND == "jax" else False
EVERY_JIT = {"tensorflow": (False, True), "jax": (True,), "torch": (False,)}[BACKEND]
# One mode for each way to compute: "graph" runs the code of "eager".
KERNEL_MODES = {"tensorflow": ("eager", "xla"), "jax": ("jit",), "torch": ("eager",)}[BACKEND]

# Platforms whose products a CPU can run, as kernels are interpreted, and modes to do it in.
PLACES = {
    "tensorflow": [("cpu", "eager"), ("cpu", "xla"), ("gpu", "xla")],
    "jax": [("cpu", "jit"), ("tpu", "jit"), ("gpu", "jit")],
    "torch": [("cpu", "eager"), ("gpu", "eager")],
}[BACKEND]
if BACKEND == "jax":
    import jax

own_platform = backend.platform_of(ops.zeros(()))
if own_platform != "cpu":
    PLACES = [(own_platform, mode) for mode in KERNEL_MODES]

if BACKEND == "tensorflow":
    import tensorflow as tf

    # Each test traces its functions anew, which TensorFlow takes for a mistake.
    tf.get_logger().setLevel("ERROR")


def forget():
    """JAX keeps every function it ever compiled."""
    if BACKEND == "jax":
        jax.clear_caches()


def by_place(cases, few):
    """A test of a `place` and a `case`: all cases in the first place, elsewhere a few."""
    pairs = [(PLACES[0], case) for case in unless_compiled(cases, few)]
    pairs += [(place, case) for place in PLACES[1:] for case in few]
    return pytest.mark.parametrize("place, case", pairs, indirect=["place"], ids=_named)


def _named(case):
    return "-".join(getattr(each, "__name__", str(each)) for each in case)


def unless_compiled(cases, kept):
    """All cases on PyTorch; those `kept` where compiling each takes ten seconds."""
    cases = list(cases)
    assert all(case in cases for case in kept)
    return cases if BACKEND == "torch" else kept


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


def trace(function, *arrays):
    """Trace a function as a compiler does, and compile nothing."""
    if BACKEND == "jax":
        jax.eval_shape(function, *arrays)
    elif BACKEND == "tensorflow":
        tf.function(function, autograph=False).get_concrete_function(*to_tensors(arrays))


def gradients(function, inputs, mode=FAST_MODE):
    """Gradients of the scalar `function(*inputs)`."""
    return differentiated(lambda inputs: (function(*inputs), ()), mode)(inputs)[2]


def most_bytes(function, array):
    """Bytes of the largest tensor of a function and its gradient, on JAX of all that XLA stores."""
    (tensor,) = to_tensors([array])
    both = _GRADIENTS[BACKEND](lambda inputs: function(*inputs))
    if BACKEND == "jax":
        return jax.jit(both).lower([tensor]).compile().memory_analysis().temp_size_in_bytes
    sizes = []
    if BACKEND == "tensorflow":
        graph = tf.function(both, autograph=False).get_concrete_function([tensor]).graph
        for output in (each for operation in graph.get_operations() for each in operation.outputs):
            sizes.append((output.shape.num_elements() or 0) * (output.dtype.size or 0))
        return max(sizes)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            outputs = operation(*args, **(kwargs or {}))
            sizes.extend(each.nbytes for each in keras.tree.flatten(outputs) if ops.is_tensor(each))
            return outputs

    with Sizes():
        both([tensor])
    return max(sizes)


def run_python(*arguments, fails=False, **environment):
    """What a process of this package printed, or its errors where it `fails`."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout[-8000:] + done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def saved_and_loaded(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


def assert_close(actual, expected, scale=None, tolerance=1e-5, message=""):
    """Equal up to `tolerance` of the largest expected entry, or of `scale` where entries cancel.

    A failure shows the message.
    """
    expected = np.asarray(expected, "float64")
    assert np.shape(actual) == expected.shape
    if scale is None:
        scale = np.max(np.abs(expected), initial=0.0)
    actual, limit = np.asarray(actual, "float64"), tolerance * scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit, err_msg=message)


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


_GRADIENTS = {"tensorflow": _tensorflow_gradients, "jax": _jax_gradients, "torch": _torch_gradients}
