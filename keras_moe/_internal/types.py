"""Types of arguments."""

from typing import Any

# A tensor of Keras's backend, or anything that `keras.ops.convert_to_tensor` accepts.
Tensor = Any
