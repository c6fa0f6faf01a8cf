"""The base class of all layers, and of those with LoRA; initializers of stacked weights."""

import copy
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal.checks import check_integer, check_number, shortened
from keras_moe._internal.keras_internals import KeepsLosses, unlocked
from keras_moe._internal.serialization import arguments_of, load_draws, save_draws
from keras_moe.backend import backend

# What an argument is that a layer does not have: one of another class, or a name used elsewhere.
_IS = {
    "an argument of `MixtureOfExperts(num_experts=8, hidden_dim=256)`": "num_experts hidden_dim",
    "an argument of `MixtureOfExperts` and of routers such as `TopKRouter`": "top_k",
    "an argument of `MixtureOfExperts`": "capacity_factor router router_losses shared_expert",
    "an argument of `TopKRouter` and routers derived from it": "balancer score",
    "an argument of the bank, such as `FeedForwardExperts`": "use_bias dropout kernel_initializer "
    "bias_initializer kernel_regularizer",
    "`num_experts` here": "n_experts num_local_experts n_routed_experts",
    "`hidden_dim` here": "units d_ff ffn_dim mlp_dim expert_dim intermediate_size hidden_size",
    "`top_k` here": "k topk num_selected_experts num_experts_per_tok",
    "`experts` here, a bank or a list of layers": "expert expert_layers",
    "`router_losses` here, such as `[losses.LoadBalance(0.01)]`": "losses aux_loss "
    "aux_loss_weight aux_loss_coef load_balancing_loss router_aux_loss_coef z_loss_weight",
    "`shared_expert` here, one layer as wide as all of them": "num_shared_experts n_shared_experts",
    'a router here, `router="noisy_top_k"`': "noisy_gating noisy",
}
_IS_OF_NAME = {name: text for text, names in _IS.items() for name in names.split()}


class BaseLayer(KeepsLosses, keras.layers.Layer):
    """Abstract: a layer whose `get_config` reads its constructor's arguments from attributes."""

    # Arguments of a parent's constructor that the constructor of the class sets itself.
    fixed_arguments: tuple[str, ...] = ()

    def __init__(self, **kwargs: Any):
        for name in filter(_IS_OF_NAME.get, kwargs):
            received = f"{name}={shortened(kwargs[name])} for a `{type(self).__name__}`"
            raise TypeError(f"`{name}` is {_IS_OF_NAME[name]}. Received: {received}")
        super().__init__(**kwargs)
        backend.devices.separate_losses(self)

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


class Adaptable(BaseLayer):
    """Abstract: a layer with LoRA; the first base of a class.

    A subclass implements `add_factors`, and calls it at the end of `build` if `lora_rank` is set.
    """

    lora_rank: Any = None
    lora_alpha: Any = None
    lora_enabled = False
    # Names of the kernels, or of the bank, that factors correct. They never train.
    _corrected: tuple = ()

    @property
    def trainable(self):
        return keras.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        # Keras sets it for all weights. A corrected kernel has no gradient, only weight decay.
        keras.Layer.trainable.fset(self, value)
        for name in self._corrected:
            getattr(self, name).trainable = False

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: str | Callable = "he_uniform",
        b_initializer: str | Callable = "zeros",
    ) -> None:
        """Freeze each kernel and train a correction of low rank for it.

        `x W` becomes `x W + (lora_alpha / rank) (x A) B` with factors `A` (..., D, rank) and `B`
        (..., rank, H), in a bank one of each expert. Saving adds the corrections to the kernels, as
        Keras does. Compile the model afterwards. In a frozen layer only the factors train.

        Args:
            rank: Integer. Rank of the corrections.
            lora_alpha: Float. The corrections are multiplied by `lora_alpha / rank`. None: `rank`.
            a_initializer: Initializer of `A`, in a bank of each expert's.
            b_initializer: Initializer of `B`. With zeros nothing changes at first.

        Raises:
            ValueError: If the layer is not built, or has LoRA already.
            NotImplementedError: If a router computes its logits in another way than `x W`.

        Reference: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
        """
        rank = check_integer("rank", rank)
        alpha = rank if lora_alpha is None else check_number("lora_alpha", lora_alpha, above=0)
        if not self.built or self.lora_enabled:
            received = f"built={self.built}, lora_enabled={self.lora_enabled}"
            raise ValueError(f"`enable_lora` needs a built layer without it. Received: {received}")
        self.check_takes_lora()
        if not self.trainable:  # The factors of a frozen layer train, and nothing else of it.
            self.trainable, self.state_is_frozen = True, True
            for weight in self.weights:
                weight.trainable = False
        initializers = map(keras.initializers.get, (a_initializer, b_initializer))
        self.lora_rank, self.lora_alpha = rank, alpha
        with unlocked(self):
            self.add_factors(*initializers)

    def check_takes_lora(self) -> None:
        """Raise where corrections would have no effect."""

    def add_factors(self, a_initializer="he_uniform", b_initializer="zeros"):
        raise NotImplementedError

    def freeze_kernel(self, name):
        getattr(self, name).trainable = False
        self._corrected = (*self._corrected, name)

    def merge_factors(self) -> None:
        """Remove the factors; the kernels, which stay frozen, get the corrections."""
        store: dict = {}
        self.save_own_variables(store)  # with corrected kernels
        self.remove_factors()
        self.load_own_variables(store)

    def remove_factors(self):
        for weight in self.weights:
            if "_lora_" in weight.name:
                delattr(self, weight.name)
        self.lora_rank = self.lora_alpha = None
        self.lora_enabled, self._corrected = False, ()
        if getattr(self, "state_is_frozen", False) and not self.trainable_weights:
            self.trainable = self.state_is_frozen = False  # as before LoRA, which a file keeps

    def lora_scale(self):
        return (self.lora_alpha or self.lora_rank) / self.lora_rank

    def get_config(self):
        lora = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        return {**super().get_config(), **(lora if self.lora_rank else {})}

    @classmethod
    def from_config(cls, config):
        lora = {name: config[name] for name in ("lora_rank", "lora_alpha") if name in config}
        layer = super().from_config({key: config[key] for key in config if key not in lora})
        for name, value in lora.items():
            setattr(layer, name, value)
        return layer


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
