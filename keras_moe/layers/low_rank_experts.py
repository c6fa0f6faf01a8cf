"""A bank of low-rank experts over one frozen network.

The frozen kernels W multiply each token once. With factors B A of expert k and combine weights g,

    h_k = act(W_g x + B_gk A_gk x) * (W_u x + B_uk A_uk x)
    y   = W_d (sum_k g_k h_k) + sum_k g_k B_dk A_dk h_k

Each expert is a network of its factors, with inputs x, W_g x, W_u x and outputs h_k, B_dk A_dk h_k.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import EachExpert
from keras_moe._internal.checks import check_indices, check_integer, check_number
from keras_moe._internal.keras_internals import names_beside
from keras_moe._internal.serialization import register
from keras_moe.backend import backend
from keras_moe.layers import expert_bank
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.projection import Projection
from keras_moe.layers.stacked_experts import StackedExperts
from keras_moe.ops.networks import network_of
from keras_moe.ops.plans import GroupedPlan


class _Factor(Projection):
    """Factors A or B of one linear map, stacked (E, ...)."""

    def build(self, widths, experts):
        is_a = self.name.endswith("a")
        initializer = self.bank.a_initializer if is_a else self.bank.b_initializer
        self._add("kernel", (len(experts), *widths), EachExpert(initializer, self.stream, experts))

    def _weight_name(self, part):
        return self.name


@register
class LowRankExperts(StackedExperts):
    """Experts that share one frozen network and differ by low-rank corrections.

    For each linear map `x W` of the base, expert k computes `x W + (alpha / rank) (x A_k) B_k`, as
    a copy with LoRA would. The base is computed once for each token. Only the factors train. They
    are `{name}_lora_a` (E, D, r) and `{name}_lora_b` (E, r, H) for the base's `{name}_kernel`.
    `quantize` stores the base as integers.

    Args:
        base: Bank with one expert, such as `GatedExperts(1, hidden_dim)`; it is frozen. All its
            linear maps but the last take the tokens themselves, and the last one makes the output.
        rank: Integer. Rank of the corrections, r.
        alpha: Float. The corrections are multiplied by `alpha / rank`. None: `rank`.
        a_initializer: Initializer of each expert's `A`.
        b_initializer: Initializer of each expert's `B`. With zeros all experts start as the base.

    Raises:
        ValueError: If a number is out of its range, or `base` has several experts, LoRA, or a
            network of a different form.
        TypeError: If `base` is not a bank with stacked kernels.

    Other arguments, call arguments and output shape: as for `ExpertBank`.

    Example:

    >>> base = keras_moe.layers.GatedExperts(num_experts=1, hidden_dim=256)
    >>> experts = keras_moe.layers.LowRankExperts(base, num_experts=8, rank=4)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    References: Hu et al. 2021 (arXiv:2106.09685), section 4.1; Li et al. 2024, MixLoRA
    (arXiv:2404.15159), section 3.
    """

    projection_class = _Factor
    fixed_arguments = (
        *("activation", "use_bias", "kernel_initializer", "bias_initializer"),
        *("kernel_regularizer", "bias_regularizer"),
    )

    def __init__(
        self,
        base: StackedExperts,
        num_experts: int,
        rank: int,
        alpha: float | None = None,
        a_initializer: str | Callable = "he_uniform",
        b_initializer: str | Callable = "zeros",
        **kwargs: Any,
    ):
        base = expert_bank.get(base, "base")
        if not isinstance(base, StackedExperts):
            rule = "`base` must be a bank with stacked kernels, such as `GatedExperts`"
            raise TypeError(f"{rule}. Received: base of type {type(base).__name__}")
        if base.num_experts != 1 or base.lora_rank:
            received = f"num_experts={base.num_experts}, lora_rank={base.lora_rank}"
            raise ValueError(f"`base` must have one expert, without LoRA. Received: {received}")
        super().__init__(
            num_experts, None, base.use_bias, a_initializer, "zeros", None, None, **kwargs
        )
        self.base = base
        self.rank = check_integer("rank", rank)
        self.alpha = None if alpha is None else check_number("alpha", alpha, above=0)
        self.a_initializer = keras.initializers.get(a_initializer)
        self.b_initializer = keras.initializers.get(b_initializer)
        self.scale = 1.0 if alpha is None else alpha / rank
        base.trainable = False
        if self.has_own_policy:
            self._take_policy(self.dtype_policy)

    def build(self, tokens_shape):
        if backend.devices.expert_processes() is not None:
            rule = "`LowRankExperts` must be whole in each process, as in replicas"
            raise NotImplementedError(f"{rule}. Received: `expert_parallel` on PyTorch")
        if not self.base.built:
            self.base.build(tokens_shape)
        has_vectors = any(each.is_vector for each in self.base.projections)
        if has_vectors or self.base._network.last is None:
            rule = "`base` must have linear maps, no vectors, and return what the last map returns"
            raise ValueError(f"{rule}. Received: `{type(self.base).__name__}`")
        super().build(tokens_shape)

    def widths(self, features):
        return {
            f"{name}_lora_{letter}": shape
            for name, (fan_in, fan_out) in self.base.widths(features).items()
            for letter, shape in (("a", (fan_in, self.rank)), ("b", (self.rank, fan_out)))
        }

    def _trace(self, features):
        base = self.base._trace(features)
        names = (*base.saved, base.last)
        widths = tuple(self.base.widths(features)[name] for name in names)
        factors = _FactorsOfExpert(base.function, names, widths, self.use_bias, self.scale)
        seen = features + sum(fan_out for _, fan_out in widths[:-1])
        return network_of(factors, seen, self.widths(features))

    def _function(self):
        return self._network.function

    def call(self, tokens: Tensor, plan: GroupedPlan, training: bool | None = None) -> Tensor:
        factors = self._network.function
        *first, last = map(self.base.projection, factors.names)
        width, fan_out = factors.widths[-1]
        tokens = self._compute(tokens)
        first = [_multiply(tokens, projection, projection.bias) for projection in first]
        sums = super().call(ops.concatenate([tokens, *first], axis=1), plan, training)
        outputs = _multiply(sums[:, :width], last)
        outputs = outputs + sums[:, width : width + fan_out]
        if self.use_bias:
            outputs = outputs + sums[:, -1:] * self._compute(last.bias[0])
        return outputs

    compute_all = ExpertBank.compute_all

    def compute_output_shape(self, tokens_shape):
        return self.base.compute_output_shape(tokens_shape)

    def _take_policy(self, policy):
        self.dtype_policy = expert_bank.in_floats(policy)
        self.base.inherit_policy(policy)

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Store the kernels of the base as integers, see its `quantize`; factors stay floats."""
        self.base.quantize(mode, config=config)

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Raise: the experts are factors of low rank already."""
        raise NotImplementedError(f"`{self.name}` has factors of low rank already")

    def _corrected(self):
        return [self.base]

    def merge(self, experts: Sequence[int] | None = None) -> StackedExperts:
        """Return a bank of the base's class whose kernels are `W + (alpha / rank) A B`, as floats.

        Args:
            experts: List of integers. Numbers of the experts in the new bank. None: all.
        """
        experts = list(range(self.num_experts) if experts is None else experts)
        check_indices("experts", experts, self.num_experts)
        config = {**self.base.get_config(), "num_experts": len(experts), "name": self.name}
        config["dtype"] = expert_bank.in_floats(self.base._own_policy())
        bank = type(self.base).from_config(config)
        with names_beside(self):
            bank.build((None, self.input_spec.axes[1]))
        for old, new in zip(self.base.projections, bank.projections):
            kernel = np.repeat(old.merged_kernel(), len(experts), axis=0)
            a, b = (
                self.projection(f"{old.name}_lora_{letter}").merged_kernel()[experts]
                for letter in "ab"
            )
            new.kernel.assign(kernel + self.scale * np.matmul(a, b))
            if old.bias is not None:
                new.bias.assign(np.repeat(ops.convert_to_numpy(old.bias), len(experts), axis=0))
        return bank


@dataclasses.dataclass(frozen=True)
class _FactorsOfExpert:
    """The network of an expert's factors. Rows are tokens and their products with the base."""

    base: Callable
    names: tuple  # of the linear maps of the base, in the order of their calls
    widths: tuple  # (D, H) of each
    use_bias: bool
    scale: float

    def __call__(self, rows, linear):
        *names, last = self.names
        start = self.widths[0][0]
        tokens, products = rows[:, :start], {}
        for name, (_, width) in zip(names, self.widths):
            products[name], start = rows[:, start : start + width], start + width
        hidden: list[Any] = []

        def base(name, values):
            if name == last:  # The base computes this map once, of the weighted sum.
                hidden.append(values)
                return 0.0
            if values is not tokens:
                rule = "All linear maps of `base` but the last must take the tokens themselves"
                raise ValueError(f"{rule}. Received: {name!r} with other inputs")
            return products[name]

        low = self.base(tokens, _CorrectedLinear(base, linear, self.scale))
        # The weighted sum of ones is the weight of the last bias.
        ones = [ops.ones_like(rows[:, :1])] if self.use_bias else []
        return ops.concatenate([*hidden, low, *ones], axis=1)


class _CorrectedLinear:
    """The `linear` of the base: `base(name, rows)` plus the correction from the factors."""

    def __init__(self, base, linear, scale):
        self._base, self._linear, self._scale = base, linear, scale
        self.dropout = linear.dropout

    def __call__(self, name, rows):
        low = self._linear(f"{name}_lora_a", rows) * self._scale
        return self._base(name, rows) + self._linear(f"{name}_lora_b", low)


def _multiply(rows, projection, bias=None):
    """Rows times the kernel of one expert, plus its bias; neither gets a gradient."""

    def forward(rows, kernel, save):
        return kernel.multiply(rows), ()

    def backward(rows, kernel, saved, gradient):
        return kernel.multiply(gradient, transposed=True)

    kernel = projection.kernels().apply(lambda stack: stack[0])
    outputs = backend.differentiable(forward, backward, rows, kernel)
    return outputs if bias is None else outputs + ops.cast(bias[0], rows.dtype)
