"""Private modules: nothing here is meant for users, and any of it may change."""

from typing import Any

# A tensor of Keras's backend, or anything that `keras.ops.convert_to_tensor` accepts.
Tensor = Any
