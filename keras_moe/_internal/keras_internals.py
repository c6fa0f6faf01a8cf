"""The private names of Keras that have no public one, and what would fail without each."""

import contextlib
import functools
from typing import Any

import keras
import numpy as np

# It traces `network` for its widths. Public calls trace layers only.
from keras.src.backend import compute_output_spec as compute_output_spec
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute

# On JAX only these find the masks of traced tensors.
from keras.src.backend.common.masking import get_keras_mask as get_keras_mask
from keras.src.backend.common.masking import set_keras_mask as set_keras_mask


def drops_losses():
    """Whether Keras drops added losses in a `stateless_call`: training would not be balanced."""
    scope = get_global_attribute("stateless_scope")
    return scope is not None and not in_symbolic_scope() and not scope.collect_losses


def losses_added(layer):
    """The losses that a layer and those in it have added in this pass, without those of weights."""
    return [loss for part in layer._flatten_layers() for loss in part._get_own_losses()]


def in_symbolic_scope():
    """Whether Keras only finds out shapes: on PyTorch there are no values to count."""
    return get_global_attribute("symbolic_scope") is not None


def current_model():
    """The outermost layer that is called in this thread, or None: replicas reset its losses."""
    call = get_global_attribute("current_call_ctx")
    return None if call is None else call.entry_layer


class KeepsLosses:
    """A layer that is called several times in a pass, all of whose losses count; before `Layer`.

    On JAX a pass is a stateless scope, in which Keras takes the call of a layer for the whole pass,
    and would remove the losses of its earlier calls.
    """

    _loss_ids: Any
    _layers: Any

    def _clear_losses(self):
        scope = get_global_attribute("stateless_scope")
        if scope is None:
            return super()._clear_losses()  # type: ignore[misc]
        self._loss_ids &= {id(loss) for loss in scope.losses}
        for layer in self._layers:
            layer._clear_losses()


def current_call():
    """A function that returns a context with the `training` and dtypes of a call to recompute."""
    present = {name: get_global_attribute(name) for name in ("current_call_ctx", "autocast_scope")}
    return lambda: _global_state(**present)


def stored_dtypes():
    """A context in which mixed precision does not round the state that is read."""
    return _global_state(autocast_scope=None)


@contextlib.contextmanager
def _global_state(**attributes):
    outer = {name: get_global_attribute(name) for name in attributes}
    for name, value in attributes.items():
        set_global_attribute(name, value)
    try:
        yield
    finally:
        for name, value in outer.items():
            set_global_attribute(name, value)


def in_stateless_scope():
    """Whether updates are collected: only then may a backward pass repeat a call."""
    return get_global_attribute("stateless_scope") is not None


def recompute_as_one(layer):
    """Let Keras recompute no layer in a layer by itself: on TensorFlow its gradient would be lost.

    There a recomputed function has gradients of variables only; an inner one reads tensors.
    """
    for part in layer._flatten_layers(include_self=False):
        part._remat_mode = None


def own_layers(layer):
    """The sublayers of a layer, for walks through a model and for paths in configs."""
    return list(layer._layers)


def own_variables(layer):
    """The variables of a layer itself, in the order in which Keras saves them."""
    return layer._trainable_variables + layer._non_trainable_variables


def parameters_of(layer):
    """The variables of a layer and all layers in it that were created trainable, frozen or not."""
    return [variable for part in layer._flatten_layers() for variable in part._trainable_variables]


def float_array(variable):
    dtype = "float64" if variable.dtype == "float64" else "float32"
    return np.array(keras.ops.convert_to_numpy(keras.ops.cast(variable.value, dtype)))


def calls_of(model):
    """The calls in a functional model, in order, for upcycling: (layer, inputs, outputs)."""
    depths = sorted(model._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in model._nodes_by_depth[depth]]
    return [(node.operation, node.input_tensors, node.outputs) for node in nodes]


def operation_of(tensor):
    """What computed a symbolic tensor, or None. A slice loses a mask of another shape."""
    return getattr(tensor, "_keras_history", (None,))[0]


def sources_of(tensor):
    """The tensors it was computed from, of a layer's the first: a lost mask is found by them."""
    operation, index, _ = getattr(tensor, "_keras_history", (None, 0, 0))
    if operation is None:
        return []
    tensors = operation._inbound_nodes[index].input_tensors
    return tensors[:1] if isinstance(operation, keras.Layer) else tensors


def set_state(layer, name, value):
    """Put another sublayer in the place of a built layer's, which files go by."""
    old, tracker = getattr(layer, name), layer._tracker
    layers = tracker.config["layers"][1]
    place = next((place for place, each in enumerate(layers) if each is old), None)
    was_locked = tracker.locked
    tracker.unlock()
    tracker.untrack(old)
    setattr(layer, name, value)
    if was_locked:
        tracker.lock()
    if place is not None and layers and layers[-1] is value:
        layers.insert(place, layers.pop())


def untrack(layer, variable):
    """Remove a variable: a kernel that became integers, counters of other experts."""
    layer._untrack_variable(variable)


@contextlib.contextmanager
def unlocked(layer):
    """A context in which a built layer may get weights, as Keras's own `enable_lora` has."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def quantization(layer, mode, config):
    """The mode and the config to quantize a layer by. After 3.15 Keras leaves that to the layer."""
    mode = getattr(config, "mode", mode)
    name = f"{str(mode).capitalize()}QuantizationConfig"
    if config is None and hasattr(keras.quantizers, name):
        config = getattr(keras.quantizers, name)()
    layer._check_quantize_args(mode, layer.compute_dtype)
    return mode, config


@contextlib.contextmanager
def names_below(path):
    """A context in which names of variables begin with a path, such as a layer's, or None."""
    with contextlib.ExitStack() as stack:
        for name in filter(None, (path or "").split("/")):
            stack.enter_context(keras.name_scope(name))
        yield


def names_beside(layer):
    """A context in which names of variables begin with the path of the layer that holds a layer."""
    return names_below((layer.path or "").rpartition("/")[0])


# What Keras compiles of a model; the last one is of KerasHub.
_COMPILED = ("train_function", "test_function", "predict_function", "generate_function")


def forget_compiled(model, functions=_COMPILED):
    """Let a model trace its compiled functions, or some of them, again."""
    for layer in model._flatten_layers():
        vars(layer).pop("_text_writer", None)  # of `generate`
        for function in functions:
            if getattr(layer, function, None) is not None:
                setattr(layer, function, None)


def state_of_compilation(model):
    """Objects that are replaced when functions compiled of a model no longer hold."""
    return [*model.variables, getattr(model, "_compile_config", None)]


def compile_like(model, other):
    """Move the compile state of `other` to `model`, with its losses and metrics."""
    if other.compiled:
        other.reset_metrics()
        # It scales the loss already, where that was wanted.
        optimizer = {"optimizer": other.optimizer, "auto_scale_loss": False}
        model.compile(**{**other._compile_config.config, **optimizer})


def renew_test_function(model):
    """Make a test function that shares no trace with earlier ones."""
    own_step = vars(model).get("test_step")  # which the user has given this model
    # JAX gives functions of the same method the same trace.
    model.test_step = functools.partial(model.test_step)
    model.make_test_function(force=True)
    del model.test_step
    if own_step is not None:
        model.test_step = own_step


def forget_old_weights(model):
    """Trace a model again, and start its optimizer again, where weights were replaced."""
    forget_compiled(model)
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):  # PyTorch's list of all parameters in it
            layer._track_variables()
        if getattr(layer, "_compiled_trainable_state", None) is not None:  # as it was compiled
            # A new dict, as TensorFlow exports no model with a changed one. Not by `setattr`, which
            # makes of it a dict that PyTorch cannot export.
            parts = layer._flatten_layers()
            vars(layer)["_compiled_trainable_state"] = {part: part.trainable for part in parts}
        optimizer = getattr(layer, "optimizer", None)
        if optimizer is not None and optimizer.built:
            # One without state. User-defined classes in it need not be registered.
            optimizers = [optimizer, getattr(optimizer, "inner_optimizer", optimizer)]
            parts = [*optimizers, *(each._learning_rate for each in optimizers)]
            classes = {type(part).__name__: type(part) for part in parts}
            with keras.saving.custom_object_scope(classes):
                layer.optimizer = type(optimizer).from_config(optimizer.get_config())
            layer.optimizer.build(layer.trainable_variables)
            if getattr(layer, "compiled", False):  # Else the old one would keep its memory.
                layer._compile_config.config["optimizer"] = layer.optimizer
