"""Base classes of layers, and initializers of stacked weights."""

import copy
import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal.checks import shortened
from keras_moe._internal.keras_internals import (
    KeepsLosses,
    current_call,
    get_keras_mask,
    recompute_as_one,
    set_keras_mask,
    stored_dtypes,
)
from keras_moe._internal.serialization import (
    argument_names,
    arguments_of,
    load_draws,
    refuse_change,
    save_draws,
)
from keras_moe.backend import backend

# What an argument is that a layer does not have: one of another class, or a name used elsewhere.
_IS = {
    "an argument of `MixtureOfExperts(num_experts=8, hidden_dim=256)`": "num_experts hidden_dim",
    "an argument of `MixtureOfExperts`, for routers such as `TopKRouter`": "top_k",
    "an argument of `MixtureOfExperts`": "capacity_factor router router_losses shared_expert",
    "an argument of `TopKRouter` and routers derived from it": "balancer score",
    "an argument of the bank, such as `FeedForwardExperts`": "use_bias dropout kernel_initializer "
    "bias_initializer kernel_regularizer",
    "`num_experts` here": "n_experts num_local_experts n_routed_experts",
    "`output_dim` here, the width of the outputs, or `hidden_dim`, the width of an expert": "units",
    "`hidden_dim` here": "d_ff ffn_dim mlp_dim expert_dim intermediate_size intermediate_dim",
    "the width of the inputs, inferred at build time": "hidden_size d_model input_dim",
    "`top_k` here": "k topk num_selected_experts num_experts_per_tok experts_per_token",
    "`experts` here, a bank or a list of layers": "expert expert_layers",
    "`feedforward` here": "feed_forward ffn",
    "`dropout` here, of a bank or of a block": "dropout_rate",
    "`router_losses` here, such as `[losses.LoadBalance(0.01)]`": "losses aux_loss "
    "aux_loss_weight aux_loss_coef load_balancing_loss load_balancing_loss_weight "
    "router_aux_loss_coef",
    "a loss here, `router_losses=[losses.LoadBalance(0.01), losses.RouterZ(0.001)]`": "z_loss "
    "z_loss_weight z_loss_coef router_z_loss_coef",
    "`shared_expert` here, one layer with their combined width": "num_shared_experts "
    "n_shared_experts shared_experts",
    'a router here, `router="noisy_top_k"`': "noisy_gating noisy",
    "`input_jitter` of a `router` here, such as `TopKRouter(input_jitter=0.01)`": "jitter "
    "jitter_noise router_jitter_noise",
    "a bank here, `GatedExperts(num_experts=8, hidden_dim=256)`": "gated swiglu",
    "the default: without a `capacity_factor` no token is dropped": "dropless",
}
_IS_OF_NAME = {name: text for text, names in _IS.items() for name in names.split()}


class BaseLayer(KeepsLosses, keras.layers.Layer):
    """Abstract: a layer whose `get_config` reads its constructor's arguments from attributes."""

    # Arguments of a parent's constructor that the constructor of the class sets itself.
    fixed_arguments: tuple[str, ...] = ()
    # Arguments that may be set before the model is compiled again, as `trainable` may.
    changeable_arguments: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any):
        for name in filter(_IS_OF_NAME.get, kwargs):
            received = f"{name}={shortened(kwargs[name])} for a `{type(self).__name__}`"
            raise TypeError(f"`{name}` is {_IS_OF_NAME[name]}. Received: {received}")
        super().__init__(**kwargs)
        backend.devices.separate_losses(self)

    def __setattr__(self, name, value):
        cls: Any = type(self)
        is_argument = name in argument_names(cls) and name not in cls.changeable_arguments
        # Keras locks the state of a layer that is built, except in `unlocked`.
        if is_argument and getattr(self, "built", False) and self._tracker.locked:
            refuse_change(self, name)
        super().__setattr__(name, value)

    def quantized_call(self, *args, **kwargs):
        # Keras calls this in place of `call` where the dtype policy is quantized.
        return self.call(*args, **kwargs)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        save_draws(self, store)

    def load_own_variables(self, store):
        super().load_own_variables(load_draws(self, store))

    def get_config(self):
        return {**super().get_config(), **arguments_of(self)}


class Recomputable(BaseLayer):
    """Abstract: a layer that `keras.RematScope` recomputes in the backward pass of training.

    A layer that counts, draws random numbers, moves a bias or adds losses is no function of its
    inputs: computed again, it would do all of that again, from another state.
    """

    def rematerialized_call(self, call, *args, **kwargs):
        # Keras's own wrapper fails with effects on JAX, and with `training` on TensorFlow.
        if super().rematerialized_call(call, *args, **kwargs) is call:
            return call
        recompute_as_one(self)
        parts = self._flatten_layers()
        observers = (each for part in parts for each in getattr(part, "routing_observers", ()))
        # A function would see each routing twice, on JAX without values.
        is_seen = any(observer.on_routing for observer in observers)
        if is_seen or not kwargs.get("training"):
            return call
        return functools.partial(_recomputed, self, call)


def _recomputed(layer, call, *args, **kwargs):
    """`call(*args, **kwargs)`, of which only inputs and outputs are kept for the gradient."""
    trained = layer.trainable_variables
    state = [*layer.non_trainable_variables, *layer.metrics_variables]
    leaves = keras.tree.flatten((args, kwargs))
    tensors = [place for place, leaf in enumerate(leaves) if ops.is_tensor(leaf)]
    places = [place for place in tensors if keras.backend.is_float_dtype(leaves[place].dtype)]
    with stored_dtypes():
        # Read here, outside the function: TensorFlow adds a gradient for each variable read inside.
        # Reshaped, as `convert_to_tensor` would pass the variable itself on.
        weights = [ops.reshape(variable, variable.shape) for variable in trained]
        # Read once: TensorFlow's optimizer of graphs may let a second read follow the assignment.
        values = list(map(ops.stop_gradient, state))
    again, found = current_call(), {}

    def function(*tensors):
        inputs = list(leaves)
        for place, tensor in zip(places, tensors[len(trained) :]):
            set_keras_mask(tensor, get_keras_mask(leaves[place]))
            inputs[place] = tensor
        args_again, kwargs_again = keras.tree.pack_sequence_as((args, kwargs), inputs)
        mapping = zip([*trained, *state], [*tensors[: len(trained)], *values])
        with stored_dtypes():  # to which the scope casts the values
            scope = keras.StatelessScope(mapping, collect_losses=True)
        with again(), scope:
            before = list(map(scope.get_current_value, state))
            outputs = call(*args_again, **kwargs_again)
        after = list(map(scope.get_current_value, state))
        found["changed"] = [n for n, value in enumerate(after) if value is not before[n]]
        found["structure"] = keras.tree.map_structure(lambda _: 0, outputs)
        updates = [ops.stop_gradient(after[number]) for number in found["changed"]]
        return [*keras.tree.flatten(outputs), *updates, *scope.losses]

    results = iter(keras.remat(function)(*weights, *(leaves[place] for place in places)))
    outputs = keras.tree.map_structure(lambda _: next(results), found["structure"])
    for number in found["changed"]:
        values[number] = ops.copy(values[number])  # PyTorch assigns in place
    with stored_dtypes():  # In PyTorch a value that is read in another dtype is a copy.
        for number in found["changed"]:
            state[number].assign(next(results))
    for loss in results:
        layer.add_loss(ops.convert_to_tensor(loss))  # JAX returns a constant as a literal
    return outputs


def reseeded(initializer, *keys):
    """Return a copy whose seed is derived from its own and integer keys, so that kernels differ."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        return initializer
    seed = int(np.random.SeedSequence([seed, *keys]).generate_state(1)[0] >> 1)
    config = initializer.get_config() if hasattr(initializer, "get_config") else {}
    if "seed" in config:
        return type(initializer).from_config({**config, "seed": seed})
    initializer = copy.copy(initializer)
    initializer.seed = seed
    return initializer


def mark_stack(variable):
    """Mark a variable whose first axis is experts, for `optimizers.Muon`, and return it."""
    variable.is_stack_of_experts = True
    return variable


class EachExpert(keras.initializers.Initializer):
    """Initializes a stacked kernel (E, D, H) of numbered experts one by one.

    Keras would count E as part of the fan, and start 1 / sqrt(E) too small. As an initializer
    repeats its values at each call, each expert and each kernel, or "stream", has its own seed.
    """

    def __init__(self, initializer, stream, experts):
        self.initializer, self.stream, self.experts = initializer, stream, experts

    def __call__(self, shape, dtype=None):
        each = (reseeded(self.initializer, self.stream, expert) for expert in self.experts)
        kernels = [initializer(shape[1:], dtype=dtype) for initializer in each]
        if any(np.shape(kernel) != tuple(shape[1:]) for kernel in kernels):  # Keras does not check
            raise ValueError(
                "`kernel_initializer` must return a tensor of the shape that it is given. "
                f"Received: shape {np.shape(kernels[0])} for {tuple(shape[1:])}"
            )
        return ops.stack(kernels)
