"""Keras layers that users pass as parts of ours: experts, shared experts, feed-forward layers."""

import inspect
import warnings

import keras

from keras_moe._internal.checks import check_tensors
from keras_moe._internal.keras_internals import get_keras_mask, operation_of, sources_of
from keras_moe.layers.expert_bank import ExpertBank


def freeze_parts(layer):
    """Freeze the parts of a layer that was constructed with `trainable=False`.

    Keras stores the flag before there are parts, and a frozen router must not move its bias.
    """
    if not layer.trainable:
        # TensorFlow skips setting an attribute to the value it has.
        keras.Layer.trainable.fset(layer, False)


def build_and_measure(name, layer, inputs_shape, num_kept=None):
    """Build a layer, if it is not built, and return the shape of its output.

    It must be one tensor that keeps `num_kept` leading axes of the inputs, or all but the last.
    """
    if isinstance(layer, ExpertBank):
        raise TypeError(
            f"`{name}` must not be a bank: use `MixtureOfExperts(bank)`. Received: {layer!r}"
        )
    shape = getattr(_symbolic_outputs(layer, inputs_shape), "shape", ())  # () of several outputs
    leading = tuple(inputs_shape)[: -1 if num_kept is None else num_kept]
    has_rank = len(shape) == len(inputs_shape) or (num_kept is not None and len(shape) > 1)
    if not has_rank or any(None not in pair and pair[0] != pair[1] for pair in zip(shape, leading)):
        raise ValueError(
            f"`{name}` must keep the axes {leading} of its inputs. Received: layer "
            f"`{layer.name}`, which makes {shape} of {tuple(inputs_shape)}"
        )
    return tuple(shape)


def _symbolic_outputs(layer, inputs_shape):
    inputs = keras.KerasTensor(inputs_shape, layer.compute_dtype)
    try:
        return layer(inputs)
    except NotImplementedError:  # A module of PyTorch takes values only.
        sizes = [1 if size is None else size for size in inputs_shape]
        zeros = keras.ops.zeros(sizes, layer.compute_dtype)
        shape = layer(zeros, training=False).shape
        known = (None if size is None else made for size, made in zip(inputs_shape, shape))
        return keras.KerasTensor((*known, *shape[len(inputs_shape) :]), layer.compute_dtype)


def call_part(name, layer, inputs, shape, **arguments):
    """The output, of a shape, of a layer for inputs and those of the arguments that it takes."""
    accepted = inspect.signature(layer.call).parameters
    arguments = {key: value for key, value in arguments.items() if key in accepted}
    if "mask" in arguments:
        # Keras would warn of a `Sequential` of layers that do not support it.
        layer.supports_masking = True
    outputs = layer(inputs, **arguments)
    # The sum with outputs of another shape would broadcast.
    axes = "ABCDEFGHIJ"[: len(shape)]
    check_tensors(dict(zip(axes, shape)), **{f"{name}(inputs)": (outputs, axes, "float")})
    return outputs


def warn_of_lost_mask(layer, inputs):
    """Warn if symbolic inputs (batch, ..., D) had a mask that an operation such as `+` dropped."""
    is_slice = type(operation_of(inputs)).__name__ == "GetItem"
    tensors, seen = [inputs], set()
    while tensors:
        tensor = tensors.pop()
        mask = get_keras_mask(tensor)
        if id(tensor) in seen or (mask is not None and tensor is inputs):
            continue
        seen.add(id(tensor))
        if mask is None:
            tensors += sources_of(tensor)
            continue
        is_like_inputs = tuple(mask.shape) == tuple(inputs.shape[:-1])
        if is_like_inputs or (is_slice and len(mask.shape) == len(inputs.shape) - 1):
            warnings.warn(
                f"The mask of `{tensor.name}` is lost before `{layer.name}`, which counts and "
                "computes padding: `+`, slices and other operations pass no mask on, and "
                "`keras.layers.Add` only if all its inputs have one. Pass `mask=`.",
                stacklevel=2,
            )
            return
