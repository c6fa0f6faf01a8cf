"""Keras layers that users pass as parts of ours: experts, shared experts, feed-forward layers."""

import inspect
import warnings
import weakref

import keras

from keras_moe._internal.checks import check_tensors
from keras_moe._internal.keras_internals import get_keras_mask, operation_of, sources_of
from keras_moe.layers.expert_bank import ExpertBank

# Parts of layers that were built: routers, banks, feed-forward layers.
_in_use: weakref.WeakSet = weakref.WeakSet()


def warn_of_second_use(layer, *parts):
    """Warn if a layer that is being built has parts of another, whose weights it shares."""
    for part in filter(None, parts):
        if part in _in_use and part.weights:
            warnings.warn(
                f"`{part.name}` is in two layers, of which `{layer.name}` is the second: they "
                "share its weights. If that is not meant, make one for each.",
                stacklevel=3,
            )
        _in_use.add(part)


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
    is_spelled_out = all(
        getattr(type(layer), method) is not getattr(keras.Layer, method)
        for method in ("build", "compute_output_shape")
    )
    if is_spelled_out:
        if not layer.built:
            layer.build(inputs_shape)
        shape = layer.compute_output_shape(inputs_shape)
    else:
        # A layer of `__init__` and `call` only: a symbolic call builds and measures it.
        outputs = _try(layer, inputs_shape)
        shape = getattr(outputs, "shape", None)
    leading = tuple(inputs_shape)[: -1 if num_kept is None else num_kept]
    # Several outputs have a list of shapes, or a dict.
    try:
        shape = tuple(shape)
        has_rank = len(shape) == len(inputs_shape) or (num_kept is not None and len(shape) > 1)
        fits = has_rank and all(size is None or int(size) >= 0 for size in shape)
    except TypeError:
        fits = False
    if not fits or any(None not in pair and pair[0] != pair[1] for pair in zip(shape, leading)):
        raise ValueError(
            f"`{name}` must keep the axes {leading} of its inputs. Received: layer "
            f"`{layer.name}`, which makes {shape} of {tuple(inputs_shape)}"
        )
    return shape


def _try(layer, inputs_shape):
    """The output of a layer for symbolic inputs; for zeros, if it is a module of PyTorch."""
    inputs = keras.KerasTensor(inputs_shape, layer.compute_dtype)
    try:
        return layer(inputs)
    except NotImplementedError:
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
    # Of another shape than it was built for, the sum with it would broadcast.
    axes = "ABCDEFGHIJ"[: len(shape)]
    check_tensors(dict(zip(axes, shape)), **{f"{name}(inputs)": (outputs, axes, "float")})
    return outputs


def warn_of_repetition(layer, inputs):
    """Warn if symbolic inputs were computed by the layer itself, as where a loop repeats it."""
    tensors, seen = [inputs], set()
    while tensors:
        tensor = tensors.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if operation_of(tensor) is layer:
            warnings.warn(
                f"`{layer.name}` receives what it has computed itself: it is in several places, "
                "which share its weights. If that is not meant, make one for each.",
                stacklevel=3,
            )
            return
        tensors += sources_of(tensor)


def warn_of_lost_mask(layer, inputs):
    """Warn if symbolic inputs (batch, ..., D) had a mask that an operation such as `+` dropped."""
    tensors = [inputs]
    is_slice = type(operation_of(inputs)).__name__ == "GetItem"
    seen: set[int] = set()
    while tensors:
        tensor = tensors.pop()
        mask = get_keras_mask(tensor)
        if mask is None:
            tensors += [each for each in sources_of(tensor) if id(each) not in seen]
            seen.update(map(id, tensors))
        elif tensor is not inputs and (
            tuple(mask.shape) == tuple(inputs.shape[:-1])
            or (is_slice and len(mask.shape) == len(inputs.shape) - 1)
        ):
            warnings.warn(
                f"The mask of `{tensor.name}` is lost before `{layer.name}`, which counts and "
                "computes padding: `+`, slices and other operations pass no mask on. Pass `mask=` "
                "or use `keras.layers.Add`.",
                stacklevel=2,
            )
            return
