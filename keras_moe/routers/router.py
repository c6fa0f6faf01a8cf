"""The interface of every router."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.base_layer import BaseLayer
from keras_moe._internal.checks import check_indices, check_integer, check_tensors
from keras_moe.backend import backend
from keras_moe.ops.plans import GroupedPlan
from keras_moe.ops.routing import Routing, check_routing, complete, weighted_counts, without_padding


class Router(BaseLayer):
    """Abstract: chooses the experts of each token.

    A router always computes in float32, whatever the policy of the model, because rounded scores
    would select other experts. It can be used alone, without experts.

    A subclass implements `route(tokens, mask, training, **context)`, which returns an
    `ops.Routing`, and sets `top_k`, the number of experts per token. In `route` padding is zero,
    and `mask` is False there. `context` has the `sequence_length`, `token_ids` and `indices` of the
    call, or None.

    A subclass overrides `max_top_k`, `mean_top_k` and `min_top_k` if the number of experts differs
    between tokens, `update` if it has state, and `balance_advice` if it balances the load itself.
    Class attributes such as `causal` describe it. The page on custom parts explains them, with
    examples.

    Args:
        num_experts: Integer. Number of experts, E. None: that of the layer around the router.
        **kwargs: `name` and `trainable`, as in any Keras layer.

    Raises:
        ValueError: If an argument is out of its range, or `dtype` is not float32.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: Boolean. Whether noise is added and state is updated.
        sequence_length: Integer. Length of each sequence in `tokens`, for routers that process each
            separately. None: all tokens are one sequence.
        token_ids: Integer tensor with T entries. Ids of the tokens in the vocabulary.
        indices: (T, K) integer tensor of experts to use instead of new choices, -1 for none. Their
            weights come from the router's scores, with a gradient. Other numbers out of range count
            as -1 in a tensor, and raise an error in an array.
        is_padding_zero: Boolean. Whether padding is zero in `tokens`, as in a layer.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=4, top_k=2)
    >>> router(keras.random.normal((6, 16))).indices.shape
    (6, 2)
    """

    top_k: Any = None  # experts per token, K
    causal = True  # whether a token's experts depend on no other token
    default_losses: tuple = ("load_balance", "router_z")  # if `router_losses` are None
    tokens_choose = True  # so that too many may choose an expert
    replays_indices = False  # whether `route` chooses `indices` where they are given
    serves_all = False  # whether all experts serve each token
    counted_by_weight = False  # whether its load sums weights; place e of the K is expert e
    has_smooth_load = False  # whether the `load` of its routings has a gradient in training
    even_scopes: tuple = ()  # scopes of losses in which all experts always have the same load
    serves_tasks = True  # whether it can be the router of one of many tasks
    has_logits = False  # whether its logits are learned, so that reports judge them
    normalizes_kernel = False  # whether rescaling the kernel leaves the logits unchanged
    shift_invariant: Any = True  # whether a number added to all logits of a token changes nothing
    surgeries: tuple = ()  # "cut", "merge", "copy": what `surgery` can do with its experts
    has_fixed_top_k = False  # whether weights depend on `top_k`, which `surgery` cannot change then

    def __init__(self, num_experts: int | None = None, **kwargs: Any):
        dtype = kwargs.pop("dtype", None)
        if getattr(dtype, "name", dtype) not in (None, "float32"):
            raise ValueError(f"A router always computes in float32. Received: dtype={dtype}")
        super().__init__(dtype="float32", **kwargs)
        if type(self).call is not Router.call:
            raise TypeError(f"`{type(self).__name__}` must implement `route`, not `call`")
        if num_experts is not None:
            num_experts = check_integer("num_experts", num_experts)
        self.num_experts: Any = num_experts
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=2)

    def bind(self, num_experts: int) -> None:
        """Set the number of experts of a router that has none; one that is set stays."""
        if self.num_experts is None:
            self.num_experts = int(num_experts)
        self.check_num_experts()

    def check_num_experts(self) -> None:
        """Raise if the number of experts, once it is known, does not fit the other arguments.

        Constructors end with it, and a subclass extends it. With one expert `top_k` becomes 1.
        """
        if self.num_experts is None:
            return
        if self.max_top_k is None:
            rule = "A router must set `top_k`, the number of experts per token"
            raise TypeError(f"{rule}. Received: a `{type(self).__name__}` with top_k=None")
        if self.num_experts == 1 and max(self.top_k or 0, self.max_top_k) > 1:
            self.top_k = 1
        largest = max(self.top_k or 0, self.max_top_k)
        if largest > self.num_experts:
            raise ValueError(
                "`top_k` must be at most `num_experts`. "
                f"Received: top_k={largest}, num_experts={self.num_experts}"
            )

    @backend.uncompiled
    def __call__(self, *args, **kwargs):
        if self.num_experts is None:
            raise ValueError("A router that is called needs `num_experts`. Received: None")
        if kwargs.get("indices") is not None:  # Keras turns arrays into tensors before `call`.
            check_indices("indices", kwargs["indices"], self.num_experts)
        return super().__call__(*args, **kwargs)

    def call(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        sequence_length: int | None = None,
        token_ids: Tensor | None = None,
        indices: Tensor | None = None,
        is_padding_zero: bool = False,
    ) -> Routing:
        # Arrays are tensors by now, and lists are not.
        mask, token_ids, indices = (
            None if each is None else ops.convert_to_tensor(each)
            for each in (mask, token_ids, indices)
        )
        if token_ids is not None:
            token_ids = ops.reshape(token_ids, (-1,))
        if indices is not None and not self.replays_indices:
            rule = "`indices` can be replayed by routers with `replays_indices`"
            raise ValueError(f"{rule}. Received: indices for a `{type(self).__name__}`")
        check_tensors(
            tokens=(tokens, "TD", "float"),
            mask=(mask, "T", "mask"),
            token_ids=(token_ids, "T", "int"),
            indices=(indices, "TK", "int"),
        )
        tokens, real = without_padding(tokens, mask, is_padding_zero)
        with backend.scope_of_call(self, tokens):
            context = {"sequence_length": sequence_length, "token_ids": token_ids}
            routing = self.route(tokens, real, training, indices=indices, **context)
        if not isinstance(routing, Routing):
            rule = f"`{type(self).__name__}.route` must return an `ops.Routing`"
            raise TypeError(f"{rule}. Received: an object of type {type(routing).__name__}")
        sizes = {"T": tokens.shape[0], "E": self.num_experts, "K": self.max_top_k}
        check_routing(routing, sizes)
        # A user-defined router may not know about all of the padding, and a plan relies on counts.
        knows_padding = routing.mask is real
        mask = real if knows_padding else routing.mask & real
        counts = routing.counts if knows_padding and not self.tokens_choose else None
        if self.counted_by_weight:
            counts = weighted_counts(routing.indices, routing.weights, mask)
        load = routing.load if self.has_smooth_load else None
        routing = complete(routing._replace(mask=mask, counts=counts, load=load))
        if training and self.trainable and indices is None:
            self.update(routing)
        return routing

    def route(self, tokens: Tensor, mask: Tensor, training: bool | None, **context: Any) -> Routing:
        """Return the routing of tokens (T, D), zeros where the mask (T,) is False."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `route`, not `call`")

    def plan(self, routing: Routing, experts: Tensor) -> Any:
        """Return the plan of a routing, with the `experts` (T, K) that process its tokens.

        They are the `indices` of the routing, with -1 also where an expert has no slot.
        """
        are_counted = experts is routing.indices and not self.counted_by_weight
        sizes = routing.counts if are_counted and self.tokens_choose else None
        return GroupedPlan.of(experts, routing.weights, self.num_experts, sizes)

    def update(self, routing: Routing) -> None:
        """Update the state of the router, in training, from a routing that was not replayed."""

    @property
    def max_top_k(self) -> int:
        """Largest number of experts of a token, the K of a routing; `top_k`, unless overridden."""
        return self.top_k

    @property
    def mean_top_k(self) -> float:
        """Mean number of experts of a token; K, unless a subclass aims at fewer."""
        return self.top_k

    @property
    def min_top_k(self) -> int:
        """Smallest number of experts of a token; K, or 1 where all serve with different weights."""
        return 1 if self.serves_all else self.top_k

    def balance_advice(self) -> str | None:
        """Return what to try if the load is uneven, or None if the router does not balance it."""
        return None

    def quantize(self, mode: str, type_check: bool = True, config: Any = None) -> None:
        """Do nothing: a router computes in float32. Keras calls this for every layer."""

    def rematerialized_call(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return the call itself: the layer around the router recomputes it with itself."""
        return call

    def compute_mask(self, tokens, mask=None):
        return None

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        return config
