"""Types of arguments."""

from typing import Any

# A tensor of Keras's backend, or what `keras.ops.convert_to_tensor` makes one of.
Tensor = Any
