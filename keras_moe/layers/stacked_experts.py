"""Banks with stacked kernels: LoRA, quantization, processes and serialization."""

import dataclasses
import types
import weakref
from collections.abc import Callable
from typing import Any

import keras

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.keras_internals import own_layers, quantization, unlocked
from keras_moe._internal.serialization import load_draws, save_draws
from keras_moe.backend import backend
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.projection import Projection, weight_names
from keras_moe.ops import draws
from keras_moe.ops.networks import Problem, network_of
from keras_moe.ops.plans import GroupedPlan


class StackedExperts(ExpertBank):
    """Abstract: experts of one shape, each of their kernels stacked in one weight (E, D, H).

    An expert is a small network of linear maps. A subclass declares their widths and connects them:

    - `widths(features)` returns {name: (D, H)} in the order of a forward pass. A tuple (H,)
      declares a vector for each expert, initialized with ones.
    - `network(rows, linear)` returns the outputs (n, D') of rows (n, D) of one or several experts.
      `linear(name, rows)` is a linear map with its bias; it is called once for each name.
      `linear(name)` is the vector of each row's expert, (n, H). `linear.dropout(rows, rate)` is
      dropout in training. It may also use any differentiable `keras.ops` that process each row
      separately, but no other weights.

    The weights of a map are `{name}_kernel` (E, D, H) and, with `use_bias`, `{name}_bias` (E, H); a
    vector is `{name}` (E, H). Low-rank adaptation, quantization, expert parallelism, saving and
    export work without further code.

    Args:
        activation: String, function of one tensor, Keras layer without weights, or None.
        use_bias: Boolean. Whether each linear map has a bias.
        kernel_initializer: Initializer of the kernels, called for each expert separately.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the stacked kernels, or None.
        bias_regularizer: Regularizer of the stacked biases, or None.

    Raises:
        ValueError: If a number is out of its range, or, when the bank is built, if a layer in it,
            such as `activation`, has weights or random numbers, or `network` does not call `linear`
            once for each name in `widths`.

    Other arguments, call arguments and output shape: as for `ExpertBank`.

    Example:

    >>> class ResidualExperts(keras_moe.layers.StackedExperts):
    ...     def widths(self, features):
    ...         return {"up": (features, 32), "middle": (32, 32), "down": (32, features)}
    ...     def network(self, rows, linear):
    ...         hidden = self.activation(linear("up", rows))
    ...         hidden = hidden + self.activation(linear("middle", hidden))
    ...         return linear("down", hidden)
    >>> layer = keras_moe.layers.MixtureOfExperts(ResidualExperts(8, activation="silu"))
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)
    """

    projection_class = Projection
    projections: tuple[Projection, ...] = ()
    lora_rank: Any = None
    lora_alpha: Any = None
    lora_enabled = False
    _was_frozen = False  # before it got LoRA
    _refusal: Any = None  # why weights were not loaded

    def __init__(
        self,
        num_experts: int,
        activation: str | Callable | None = None,
        use_bias: bool = True,
        kernel_initializer: str | Callable = "glorot_uniform",
        bias_initializer: str | Callable = "zeros",
        kernel_regularizer: str | Callable | None = None,
        bias_regularizer: str | Callable | None = None,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        if activation in ("geglu", "glu", "reglu", "swiglu"):
            rule = '`GatedExperts` have a gate: with `activation="silu"` they are SwiGLU'
            raise ValueError(f"{rule}, with 'gelu' GEGLU. Received: {activation=}")
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        # Processes that share the experts, each with some of them; None where each has all.
        self.processes: Any = None

    def widths(self, features: int) -> dict[str, tuple[int, ...]]:
        """Return {name: (D, H)} of all linear maps, and {name: (H,)} of vectors."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `widths`")

    def network(self, rows: Tensor, linear: Callable) -> Tensor:
        """Return the outputs (n, D') of rows (n, D)."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `network`")

    def projection(self, name: str) -> Projection:
        """Return the projection of a built bank by its name."""
        return next(each for each in self.projections if each.name == name)

    def build(self, tokens_shape):
        if len(tokens_shape) > 2:
            rule = "Experts of stacked kernels take tokens (T, D): for samples use `LayerExperts`"
            raise ValueError(f"{rule}. Received: tokens of shape {tuple(tokens_shape[1:])}")
        self._fix_shape(tokens_shape)
        widths = self.widths(tokens_shape[-1])
        if isinstance(self.activation, keras.Layer) and not self.activation.built:
            self.activation(keras.KerasTensor((None, next(iter(widths.values()))[-1])))
        names = [part for name, each in widths.items() for part in weight_names(name, each)]
        taken = [name for name in names if hasattr(self, name) or names.count(name) > 1]
        if taken:
            rule = "Weights by the names in `widths` must have names that the bank has not yet"
            raise ValueError(f"{rule}. Received: {list(dict.fromkeys(taken))}")
        self._network = self._trace(tokens_shape[-1])
        for layer in own_layers(self):
            # They would run outside of what is differentiated and of the call in training.
            if not isinstance(layer, ExpertBank) and layer.variables:
                rule = "Layers in `network` must have no weights or random numbers"
                fix = "`linear(name, rows)` has weights, `linear.dropout(rows, rate)` draws"
                raise ValueError(f"{rule}. Received: `{layer.name}` in `{self.name}`. {fix}")
        self._dropout_seed = draws.seeded_generator() if self._network.has_dropout else None
        self.processes = backend.devices.expert_processes()
        experts = range(self.num_experts)
        if self.processes is not None:
            experts = self.processes.own_experts(self.num_experts)
        self._is_quantized = self.quantization_mode is not None
        self.projections = tuple(
            self.projection_class(self, name, stream, is_vector=len(each) == 1)
            for stream, (name, each) in enumerate(widths.items())
        )
        for projection, each in zip(self.projections, widths.values()):
            projection.build(tuple(each), experts)
        if self.lora_rank:
            self._add_factors()

    def _function(self):
        """The network as a hashable function; equal functions share compiled programs."""
        network = self.network
        if isinstance(network, types.MethodType):
            network = _NetworkOfBank(weakref.WeakMethod(network))
        return network

    def call(self, tokens: Tensor, plan: GroupedPlan, training: bool | None = None) -> Tensor:
        draws_now = self._dropout_seed is not None and training
        key = draws.key(self._dropout_seed) if draws_now else None
        problem = self._problem(tokens, plan, key)
        network = self._network._replace(function=self._function())
        devices = backend.devices.sharing(self)
        if devices is not None:
            return devices.run(backend.run, network, problem)
        return backend.run(network, problem)

    def compute_all(self, tokens, training=None):
        if backend.devices.sharing(self) is not None or self._dropout_seed is not None:
            return super().compute_all(tokens, training)
        network = self._network._replace(function=self._function())
        return network.run_on_all(self._problem(tokens))

    def _problem(self, tokens, plan=None, key=None):
        weights = None if plan is None else plan.weights
        problem = Problem(self._compute(tokens), weights, {}, {}, plan, key)
        for projection in self.projections:
            projection.add_tensors(problem.trained, problem.frozen)
        return problem

    def compute_output_shape(self, tokens_shape):
        network = self._network if self.built else self._trace(tokens_shape[-1])
        return (*tokens_shape[:-1], network.output_width)

    def _trace(self, features):
        """The `Network` for tokens of so many features."""
        widths = {name: (1, *each)[-2:] for name, each in self.widths(features).items()}
        return network_of(self._function(), features, widths)

    def _take_policy(self, policy):
        self.dtype_policy = policy

    @property
    def trainable(self):
        return keras.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        # Keras sets it for all weights. A corrected kernel has no gradient, only weight decay.
        keras.Layer.trainable.fset(self, value)
        for part in self._corrected():
            part.trainable = False

    def _corrected(self):
        """What factors correct, which never trains."""
        return [each.kernel for each in self._kernels() if self.lora_enabled]

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        a_initializer: str | Callable = "he_uniform",
        b_initializer: str | Callable = "zeros",
    ) -> None:
        """Freeze each kernel and train a correction of low rank for it.

        `x W` becomes `x W + (lora_alpha / rank) (x A) B` with factors `A` (E, D, rank) and `B`
        (E, rank, H). Saving adds the corrections to the kernels, as Keras does. Compile the model
        afterwards. In a frozen layer only the factors train.

        Args:
            rank: Integer. Rank of the corrections.
            lora_alpha: Float. The corrections are multiplied by `lora_alpha / rank`. None: `rank`.
            a_initializer: Initializer of each expert's `A`.
            b_initializer: Initializer of each expert's `B`. With zeros nothing changes at first.

        Raises:
            ValueError: If the layer is not built, or has LoRA already.

        Reference: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
        """
        rank = check_integer("rank", rank)
        alpha = rank if lora_alpha is None else check_number("lora_alpha", lora_alpha, above=0)
        if not self.built or self.lora_enabled:
            received = f"built={self.built}, lora_enabled={self.lora_enabled}"
            raise ValueError(f"`enable_lora` needs a built layer without it. Received: {received}")
        if not self.trainable:  # The factors of a frozen layer train, and nothing else of it.
            self.trainable = self._was_frozen = True
            for weight in self.weights:
                weight.trainable = False
        self.lora_rank, self.lora_alpha = rank, alpha
        with unlocked(self):
            self._add_factors(a_initializer, b_initializer)

    def _add_factors(self, a_initializer="he_uniform", b_initializer="zeros"):
        for projection in self._kernels():
            projection.add_factors(a_initializer, b_initializer)
        self.lora_enabled = True

    def merge_factors(self) -> None:
        """Add the corrections to the kernels, which stay frozen, and remove the factors."""
        store: dict = {}
        self.save_own_variables(store)  # with corrected kernels
        for projection in self._kernels():
            projection.remove_factors()
        self.lora_rank = self.lora_alpha = None
        self.lora_enabled = False
        self.load_own_variables(store)
        if self._was_frozen and not self.trainable_weights:
            self.trainable = self._was_frozen = False  # as before LoRA, which a file keeps

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

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Store the kernels as integers with scales; one expert at a time is cast to floats.

        "int8" has a scale for each output of each expert. "int4" packs two integers into a byte,
        and has a scale and a zero point for each `block_size` inputs, else scales as in "int8".

        Args:
            mode: String. "int8" or "int4". None: the mode of `config`.
            type_check: Not used; Keras passes it.
            config: Quantization config of Keras, for its `block_size`. None: the default of `mode`.

        Raises:
            NotImplementedError: For any other mode, or if processes share the experts.
            ValueError: If the bank is not built, or quantized already.
        """
        mode, config = quantization(self, mode, config)
        quantizer = getattr(config, "weight_quantizer", None)
        if mode not in ("int8", "int4") or quantizer is not None:
            rule = '`mode` must be "int8" or "int4", without a `weight_quantizer`'
            received = f"mode={mode!r}, weight_quantizer={quantizer}"
            raise NotImplementedError(f"{rule}. Received: {received} for `{self.name}`")
        if self.processes is not None:
            rule = "Experts must be in one process to be quantized: save the model, load it in one"
            received = f"`{self.name}` in {self.processes.num_processes} processes"
            raise NotImplementedError(f"{rule}. Received: {received}")
        projections = self._kernels()
        with unlocked(self):
            kernels = [projection.take_kernel() for projection in projections]
            self._is_quantized = True
            policy = self._own_policy()
            if policy.quantization_mode is None:
                block_size = getattr(config, "block_size", None)
                blocks = mode == "int4" and block_size not in (None, -1)
                prefix = f"{mode}/{block_size}" if blocks else mode
                self.dtype_policy = keras.dtype_policies.get(f"{prefix}_from_{policy.name}")
            for projection, kernel in zip(projections, kernels):
                projection.add_integers(kernel.shape)
                projection.set_kernel(kernel)

    def _kernels(self):
        """The projections that are not vectors."""
        return [projection for projection in self.projections if not projection.is_vector]

    def _own_policy(self):
        """The policy in force; from a map of policies, the one for the bank's path."""
        policy: Any = self.dtype_policy
        is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
        return policy[self.path] if is_map and self.path else policy

    def block_size(self) -> int | None:
        """Number of rows of a kernel that share a scale in "int4", None for all."""
        block_size = getattr(self._own_policy(), "block_size", -1)
        return None if block_size == -1 else block_size

    def save_own_variables(self, store):
        values = [value for each in self.projections for value in each.save()]
        for index, value in enumerate(values):
            store[str(index)] = value
        save_draws(self, store)

    def load_own_variables(self, store):
        store = load_draws(self, store)
        weights = [weight for each in self.projections for weight in each.weights()]
        if not store and self._refusal is not None:
            raise ValueError(self._refusal)  # Keras tries again by the path of another attribute.
        try:
            self._load(store, weights)
            self._refusal = None
        except ValueError as error:
            self._refusal = str(error)
            raise

    def _load(self, store, weights):
        if len(store) != len(weights):
            rule = f"`{self.name}` must have the arguments and the dtype of the saved layer"
            raise ValueError(f"{rule}. Received: {len(store)} arrays for {len(weights)} weights")
        own = slice(None)
        if self.processes is not None:
            experts = self.processes.own_experts(self.num_experts)
            own = slice(experts.start, experts.stop)
        for index, weight in enumerate(weights):
            value = store[str(index)][own]
            if tuple(value.shape) != tuple(weight.shape):
                rule = f"`{weight.name}` must have the shape of the saved weight"
                received = f"shape {tuple(weight.shape)} for {tuple(value.shape)}"
                raise ValueError(f"{rule}. Received: {received}")
            weight.assign(value)
        for projection in self.projections:
            projection.forget_factors()


@dataclasses.dataclass(frozen=True)
class _NetworkOfBank:
    """The `network` method of a bank, which keeps neither the bank nor its weights."""

    method: weakref.WeakMethod

    def __call__(self, rows, linear):
        return self.method()(rows, linear)  # type: ignore[misc]
