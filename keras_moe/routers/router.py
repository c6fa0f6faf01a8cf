"""The interface every router has."""

import inspect

import keras
from keras import ops

from keras_moe._internal.misplaced_arguments import ON_ROUTER, check_place
from keras_moe._internal.named_arguments import Saved, check_is_made, of_package
from keras_moe._internal.saved_state import load_draws, save_draws
from keras_moe._internal.shape_checks import check_fields
from keras_moe._internal.tensor_checks import (
    check_divides,
    check_host_integers,
    check_host_numbers,
    check_is_float,
    check_is_integer,
    check_mask,
    check_replayed,
    check_tensor,
    check_token_ids,
    fits,
    host_values,
)
from keras_moe._internal.validation import (
    check_flag,
    check_has,
    check_method,
    check_positive_integer,
    check_positive_number,
    check_top_k,
    check_training,
    optional,
    overrides,
    shortened,
)
from keras_moe.backend import backend
from keras_moe.ops import Routing, plan_groups
from keras_moe.ops.routing import without_padding


class Router(Saved, keras.layers.Layer):
    """Abstract: decides which experts serve which token.

    A router is a layer of its own and always computes in float32, whatever the policy of the model
    around it: rounded scores select other experts. It can be used alone, without experts.

    A subclass implements `route(tokens, mask, training)`, which returns an `ops.Routing`, and sets
    `top_k`, the number of experts per token. If `route` also has one of these arguments, the
    caller's value is passed to it:

    - `sequence_length`: number of tokens of each sequence; T is a multiple of it.
    - `token_ids`: (T,) integers, the vocabulary ids of the tokens.
    - `indices`: (T, K) experts to use instead of choosing.

    It sets `causal` to False if a token's experts depend on other tokens of the batch, which rules
    it out for language models. It sets `default_losses` if it needs others than a balance loss and
    a z-loss. It overrides `plan` if its tokens do not choose experts, and `max_top_k`, `mean_top_k`
    and `min_top_k` if the number of experts differs between tokens.

    Args:
        num_experts: number of experts, E. None: that of the layer the router is given to.
        **kwargs: arguments of a Keras layer, such as `name`.

    Raises:
        TypeError: If an argument belongs to the layer or the bank.
        ValueError: If `num_experts` is not positive, or `dtype` is not float32.
        NotImplementedError: If the class has no `route`, when it is built.

    Example:

    >>> class NearestRouter(keras_moe.routers.Router):
    ...     top_k = 2
    ...     def build(self, tokens_shape):
    ...         self.centres = self.add_weight(shape=(self.num_experts, tokens_shape[-1]))
    ...     def route(self, tokens, mask, training):
    ...         differences = keras.ops.expand_dims(tokens, 1) - self.centres
    ...         closeness = -keras.ops.sum(differences**2, axis=-1)
    ...         return keras_moe.ops.top_k_routing(closeness, self.top_k, mask)
    >>> router = NearestRouter(num_experts=4)
    >>> router(keras.random.normal((6, 16))).indices.shape
    (6, 2)
    """

    causal = True
    # Losses of a `MixtureOfExperts` that is given none: names in `losses.BY_NAME`.
    default_losses: tuple = ("load_balance", "router_z")
    # Whether tokens choose experts, so that an expert may be chosen by too many.
    takes_capacity = True
    # Whether the norm of the kernel changes no logit.
    normalizes_kernel = False

    _refused_arguments = tuple(ON_ROUTER)
    _attribute_checks = {"num_experts": optional(check_positive_integer), "causal": check_flag}
    _fixed_attributes: tuple[str, ...] = ("num_experts",)

    def __new__(cls, *args, **kwargs):
        router = super().__new__(cls, *args, **kwargs)
        # Not through Keras, which would track the layers in it.
        object.__setattr__(router, "_arguments", (args, kwargs))
        return router

    def __init__(self, num_experts=None, **kwargs):
        check_place(self, ON_ROUTER, kwargs)
        dtype = kwargs.pop("dtype", None)
        if dtype is not None and str(getattr(dtype, "name", dtype)) != "float32":
            raise ValueError(
                "A router always computes in float32, whatever the policy around it. "
                f"Received: dtype={shortened(dtype)}. Leave `dtype` out."
            )
        super().__init__(dtype="float32", **kwargs)
        backend.separate_losses(self)
        self.num_experts = num_experts
        self.supports_masking = True
        check_method(self, "route", "tokens", "mask", "training")
        self._known_arguments = set(inspect.signature(self.route).parameters)

    def __setattr__(self, name, value):
        if name == "top_k" and value is not None:
            value = check_top_k(value, getattr(self, "num_experts", None), type(self).__name__)
        super().__setattr__(name, value)

    def _post_build(self):
        if not overrides(self, "route", Router):
            raise _no_route(self)
        check_has("A router", self, self._made_by_build())
        names = [name for name in ("max_top_k", "min_top_k") if overrides(self, name, Router)]
        for name in (*self._made_by_build(), *names):
            if name.endswith("top_k"):
                check_top_k(getattr(self, name), self.num_experts, type(self).__name__, name)
        if overrides(self, "mean_top_k", Router):
            check_positive_number("mean_top_k", self.mean_top_k)
        for name in ("causal", "normalizes_kernel", "shift_invariant"):
            check_flag(name, getattr(self, name))
        super()._post_build()

    def _made_by_build(self):
        """Names of the attributes without which a built router cannot route."""
        return [] if overrides(self, "max_top_k", Router) else ["top_k"]

    def bind(self, num_experts):
        """Set the number of experts of a router that has none; one that is set stays.

        Raises:
            ValueError: If the number does not fit the other arguments.
        """
        check_positive_integer("num_experts", num_experts)
        if self.num_experts is not None:
            return
        args, kwargs = self._arguments
        parameters = list(inspect.signature(type(self).__init__).parameters)
        if parameters[1:2] == ["num_experts"]:
            args = args[1:]
        # The new router checks its arguments; its values replace those that are None here.
        bound = type(self)(*args, **{**kwargs, "num_experts": num_experts})
        for name, value in vars(bound).items():
            if getattr(self, name) is None and value is not None:
                setattr(self, name, value)

    def __call__(self, *args, **kwargs):
        check_is_made(self)
        if self.num_experts is None:
            raise ValueError(
                "A router must know the number of experts before it is called. Received: "
                f"`{type(self).__name__}` without `num_experts`. Pass `num_experts`, or give the "
                "router to a `MixtureOfExperts` and use `layer.router`."
            )
        # Checked here, because Keras turns arrays into tensors before `call`.
        self.check_arrays(**kwargs)
        check_training(kwargs.get("training"))
        check_host_numbers(**kwargs)
        if args:
            check_tensor("tokens", args[0])
            check_host_numbers(tokens=args[0])
        routing = super().__call__(*args, **kwargs)
        tokens = args[0] if args else kwargs["tokens"]
        check_fields(routing, T=tokens.shape[0], E=self.num_experts)
        if not fits(routing.indices.shape, (None, self.max_top_k)):
            raise ValueError(
                "`route` must choose `top_k` experts for each token (`max_top_k`, where a class "
                f"has that). Received: routing.indices.shape={tuple(routing.indices.shape)} from a "
                f"`{type(self).__name__}` with {self.max_top_k}. Change one of them."
            )
        return routing

    def check_arrays(self, indices=None, token_ids=None, **others):
        """Check the arguments of a call that are not tensors yet; `call` checks the rest."""
        check_host_integers("token_ids", token_ids)
        array = host_values(indices)
        if array is not None and array.ndim == 2 and "indices" in self._known_arguments:
            check_replayed(array, self.num_experts)

    def call(
        self,
        tokens,
        mask=None,
        training=None,
        sequence_length=None,
        token_ids=None,
        indices=None,
    ):
        """Route tokens.

        Args:
            tokens: (T, D) float tensor.
            mask: (T,) bool tensor, False for padding, or None.
            training: whether noise is added.
            sequence_length: length of each sequence in `tokens`, for routers that treat each
                alone; None where all tokens are one sequence.
            token_ids: (T,) integer tensor, for routers that go by the token.
            indices: (T, K) integer tensor of experts to replay: the router weighs them by its own
                scores, with their gradient, instead of choosing. Those in a NumPy array are
                checked; in a tensor what is no expert counts as -1, for none.

        Returns:
            An `ops.Routing`.
        """
        self._check_call(tokens, mask, sequence_length, token_ids, indices)
        if mask is not None:
            mask = ops.cast(mask, "bool")
            # Padding may hold anything, NaN included, and its gradient must be zero.
            tokens = ops.where(ops.expand_dims(mask, 1), tokens, 0.0)
        known = {"sequence_length": sequence_length, "token_ids": token_ids, "indices": indices}
        known = {name: value for name, value in known.items() if name in self._known_arguments}
        routing = self.route(tokens, mask, training, **known)
        if mask is not None and not of_package(type(self), "route"):
            check_fields(routing)
            routing = without_padding(routing, mask)
        return routing

    def _check_call(self, tokens, mask=None, sequence_length=None, token_ids=None, indices=None):
        check_is_float("tokens", tokens)
        if len(tokens.shape) != 2:
            raise ValueError(
                "A router takes tokens (T, D). Received: "
                f"tokens.shape={tuple(tokens.shape)}. Flatten all leading axes into one."
            )
        check_divides("sequence_length", sequence_length, tokens.shape[0])
        if token_ids is not None:
            check_token_ids(token_ids, tokens.shape[0])
        if mask is not None:
            check_mask(mask, tokens.shape, of="tokens")
        if indices is not None and "indices" not in self._known_arguments:
            raise ValueError(
                "Only routers that give each token its K best experts can replay `indices`. "
                f"Received: indices for a `{type(self).__name__}`. Use `routers.TopKRouter`, or "
                "give `route` of a router of your own an argument `indices`."
            )
        if indices is not None:
            check_is_integer("indices", indices)
        if indices is not None and not fits(indices.shape, (tokens.shape[0], self.max_top_k)):
            raise ValueError(
                "`indices` must have the shape (T, K), a row for each token. Received: "
                f"indices.shape={tuple(indices.shape)}, T={tokens.shape[0]}, K={self.max_top_k}. "
                "Pass the `indices` of a routing of these tokens by this router."
            )

    def route(self, tokens, mask, training):
        raise _no_route(self)

    @property
    def max_top_k(self):
        """Most experts that serve a token, the K of a routing; `top_k`, unless overridden."""
        return self.top_k

    @property
    def mean_top_k(self):
        """Experts that serve a token on average; K, unless a subclass aims at fewer."""
        return self.top_k

    @property
    def min_top_k(self):
        """Fewest experts that serve a token, at least 1; K, unless a subclass may do with fewer."""
        return self.top_k

    def balance_advice(self):
        """What to try where the load is uneven, if the router balances it by itself, or None."""
        return None

    @property
    def shift_invariant(self):
        """Whether a number that is added to all logits of a token changes nothing."""
        return True

    def plan(self, routing, **capacity):
        """The rows that move: see `ops.plan_groups` for the arguments of a capacity."""
        return plan_groups(routing, **capacity)

    def check_no_capacity(self, capacity):
        """Refuse the arguments of a capacity, where tokens do not choose experts."""
        if capacity:
            raise ValueError(
                "A capacity limits how many tokens choose an expert, and must not be given where "
                f"they do not. Received: {', '.join(capacity)} for a `{type(self).__name__}`. "
                "Leave it out."
            )

    def save_own_variables(self, store):
        super().save_own_variables(store)
        save_draws(self, store)

    def load_own_variables(self, store):
        super().load_own_variables(load_draws(self, store))

    def quantize(self, mode, type_check=True, config=None):
        """Do nothing: a router computes in float32. Keras calls this for every layer."""

    def rematerialized_call(self, call, *args, **kwargs):
        """The call itself: the layer around the router computes it again with itself."""
        return call

    def compute_mask(self, tokens, mask=None):
        return None

    def compute_output_spec(self, tokens, mask=None, training=None, **known):
        self._check_call(tokens, mask, **known)
        return routing_spec(tokens.shape[0], self.num_experts, self.max_top_k)

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        return {**config, "num_experts": self.num_experts}


def routing_spec(num_tokens, num_experts, top_k):
    """The shapes and dtypes of a routing, for symbolic calls."""
    return Routing(
        indices=keras.KerasTensor((num_tokens, top_k), "int32"),
        weights=keras.KerasTensor((num_tokens, top_k), "float32"),
        probs=keras.KerasTensor((num_tokens, num_experts), "float32"),
        logits=keras.KerasTensor((num_tokens, num_experts), "float32"),
        mask=keras.KerasTensor((num_tokens,), "bool"),
        counts=keras.KerasTensor((num_experts,), "int32"),
        dropped=keras.KerasTensor((), "float32"),
        load=keras.KerasTensor((num_experts,), "float32"),
    )


def _no_route(router):
    return NotImplementedError(
        f"{type(router).__name__} must implement `route(tokens, mask, training)` and return an "
        "`ops.Routing`."
    )


# Else `help` and completion would show that of `__new__`, which takes any arguments.
Router.__new__.__signature__ = inspect.signature(Router.__init__)  # type: ignore[attr-defined]
