"""The platform that a program is compiled for: "cpu", "gpu" or "tpu"."""

import contextlib
import threading
from collections.abc import Iterator

from keras_moe._internal.checks import check_choice

# Not a context variable, which `torch.compile` and `torch.export` cannot read.
_of_thread = threading.local()


@contextlib.contextmanager
def platform(name: str) -> Iterator[None]:
    """Trace for a platform that this process does not run on.

    TensorFlow traces for the devices of the process, so a SavedModel with XLA functions that is
    exported on a CPU for a GPU is exported inside this context. JAX and PyTorch do not need it. A
    function that was traced before is not traced again. What is traced must be compiled for that
    platform, or for a CPU, which interprets it slowly.

    Args:
        name: String. `"cpu"`, `"gpu"` or `"tpu"`.

    Raises:
        ValueError: If `name` is none of these.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> with keras_moe.ops.platform("cpu"):
    ...     outputs = layer(keras.random.normal((8, 16)))
    >>> outputs.shape
    (8, 16)
    """
    check_choice("name", name, ("cpu", "gpu", "tpu"))
    outer, _of_thread.name = named_platform(), name
    try:
        yield
    finally:
        _of_thread.name = outer


def named_platform():
    """The platform that an enclosing `platform` names, or None."""
    return getattr(_of_thread, "name", None)
