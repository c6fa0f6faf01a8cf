"""The values from which a search chooses each part of a MoE layer."""

import itertools
from collections.abc import Mapping

import keras
import keras_tuner

from keras_moe import layers, losses, routers
from keras_moe._internal.named_arguments import NamedArguments, check_is_made
from keras_moe._internal.validation import (
    check_choice,
    check_function,
    check_list,
    check_name,
    check_not_negative,
    check_positive_integer,
    listed,
    propose,
    shortened,
)

# Routers whose tokens all have K experts, so that the active size is known before the search.
TAKE_TOP_K = ("cosine", "deepseek_v3", "noisy_top_k", "sinkhorn", "top_k")
SET_TOP_K = ("balanced_assignment", "switch")

# Arguments of the layer that a space gives it.
_CHOSEN = ("router", "capacity_factor")


def _values(name, values):
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(
            f"`{name}` must be a list or tuple of the values to choose from. Received: "
            f"{name}={shortened(values)}. Pass, for a fixed one, a tuple of one."
        )
    if len({repr(value) for value in values}) < len(values):
        raise ValueError(
            f"`{name}` must be values that differ. Received: {name}={shortened(values)}. Leave "
            "out those that come twice."
        )
    return list(values)


def _weights(name, values):
    if not isinstance(values, Mapping):
        raise TypeError(
            "`loss_weights` must be a dict from names of losses to weights to choose from. "
            f"Received: loss_weights={shortened(values)}. Pass, for example, "
            "`{'load_balance': (0.01, 0.1)}`."
        )
    return {
        # Of one type, as KerasTuner wants them.
        loss: [float(check_not_negative(name, weight)) for weight in _values(name, weights)]
        for loss, weights in values.items()
    }


class SearchSpace(NamedArguments):
    """The values from which a search chooses each part of a MoE layer.

    The first value of a tuple is the one picked by hand: `DefaultsFirst` tries these first. A tuple
    of one value is fixed. An expert is `active_width / K` wide, so that neither the number of
    experts nor `top_k` changes what the experts cost; the router's share grows with E.

    Args:
        active_width: widths K * H of the experts of a token together, each divisible by each K.
        num_experts: numbers of experts, E.
        top_k: experts per token, K. "switch" and "balanced_assignment" have one, whatever it is.
        routers: names of those whose tokens all have K experts: "cosine", "deepseek_v3",
            "noisy_top_k", "sinkhorn", "top_k", "balanced_assignment" and "switch".
        loss_weights: dict of names in `losses.BY_NAME` to weights.
        capacity_factors: capacities, as in `layers.MixtureOfExperts`; None is no limit.
        name: what the names of the hyperparameters begin with. Layers that are tuned independently
            need spaces of different names.

    Raises:
        ValueError: If a value is out of its range, or some do not go together.

    Example:

    >>> import keras_tuner
    >>> space = keras_moe.tuner.SearchSpace((64, 128), num_experts=(8, 16), top_k=(2, 1, 4))
    >>> layer = space.sample(keras_tuner.HyperParameters())
    >>> layer.experts.num_experts, layer.experts.hidden_dim, layer.router.top_k
    (8, 32, 2)
    """

    _attribute_checks = {
        **dict.fromkeys(("active_width", "num_experts", "top_k", "routers"), _values),
        "loss_weights": _weights,
        "name": check_name,
    }

    def __init__(
        self,
        active_width,
        num_experts=(8, 4, 16),
        top_k=(2, 1, 4),
        routers=("top_k",),
        loss_weights=None,
        capacity_factors=(None,),
        name="moe",
    ):
        if loss_weights is None:
            loss_weights = {"load_balance": (1e-2, 1e-3, 1e-1), "router_z": (1e-3,)}
        self.active_width = active_width
        self.num_experts = num_experts
        self.top_k = top_k
        self.routers = routers
        self.loss_weights = loss_weights
        self.capacities = {
            str(factor): factor for factor in _values("capacity_factors", capacity_factors)
        }
        self.name = name
        self._check()

    def sample(self, hp, experts=layers.FeedForwardExperts, router_losses=(), **kwargs):
        """A layer of the values that `hp` has in this trial.

        Args:
            hp: the `keras_tuner.HyperParameters` that a model-building function is given.
            experts: function of `num_experts` and `hidden_dim` that makes the bank of experts.
            router_losses: losses besides those in `loss_weights`, such as one of your own whose
                weight is `hp.Choice("weight", ...)`.
            **kwargs: further arguments of the layer, such as `name` and `shared_expert`.

        Returns:
            A new `layers.MixtureOfExperts`. Layers of one space have the same values in a trial.

        Raises:
            TypeError: If `hp` or `experts` is of another type.
            ValueError: If an argument is one that the space chooses.
        """
        check_is_made(self)
        if not isinstance(hp, keras_tuner.HyperParameters):
            raise TypeError(
                "`hp` must be a `keras_tuner.HyperParameters`. Received: an object of type "
                f"{type(hp).__name__}. Pass what the model-building function is given."
            )
        if isinstance(experts, keras.Layer):
            raise TypeError(
                "`experts` must be a function of (num_experts, hidden_dim). Received: a "
                f"`{type(experts).__name__}`, made already. Pass its class."
            )
        if isinstance(experts, type) and not issubclass(experts, layers.ExpertBank):
            raise TypeError(
                "`experts` must be a bank of experts, if it is a class. Received: "
                f"{experts.__name__}. Pass, for example, `layers.GatedExperts`."
            )
        check_function("experts", experts, "num_experts", "hidden_dim")
        check_list("router_losses", router_losses)
        for name in _CHOSEN:
            if name in kwargs:
                raise ValueError(
                    f"`{name}` must be left to the space, which chooses it. Received: "
                    f"{name}={shortened(kwargs[name])}. Leave it out."
                )
        with hp.name_scope(self.name):
            num_experts = self._choose(hp, "num_experts", self.num_experts)
            router = self._sample_router(hp, num_experts)
            hidden_dim = self._choose(hp, "active_width", self.active_width) // router.max_top_k
            capacity = self.capacities[self._choose(hp, "capacity_factor", list(self.capacities))]
            searched = [
                losses.BY_NAME[loss](self._choose(hp, f"{loss}_weight", weights))
                for loss, weights in self.loss_weights.items()
            ]
        bank = experts(num_experts, hidden_dim)
        if not isinstance(bank, layers.ExpertBank):
            raise TypeError(
                "`experts` must return a bank of experts. Received: an object of type "
                f"{type(bank).__name__}. Pass, for example, `layers.GatedExperts`."
            )
        return layers.MixtureOfExperts(
            bank, router, [*searched, *router_losses], capacity_factor=capacity, **kwargs
        )

    def _choose(self, hp, name, values):
        """The value that `hp` has for this name, within the scope of the space."""
        if len(values) == 1:
            choice = hp.Fixed(name, values[0])
        else:
            choice = hp.Choice(name, sorted(values), default=values[0])
        # What was there before keeps its values, which may be fewer. Other scopes end alike.
        alike = [each for each in hp.space if each.name.endswith(f"{self.name}/{name}")]
        if not any(set(each.values) <= set(values) for each in alike):
            raise ValueError(
                "Spaces of one search must have names that differ, unless their values are the "
                f"same. Received: two of the name {self.name!r} with other values of `{name}`. "
                "Pass, for example, `name='second_moe'`."
            )
        return choice

    def _sample_router(self, hp, num_experts):
        name = self._choose(hp, "router", self.routers)
        open_routers = [router for router in self.routers if router in TAKE_TOP_K]
        if open_routers:
            with hp.conditional_scope("router", open_routers):
                if name in open_routers:
                    return _router(name, num_experts, self._choose(hp, "top_k", self.top_k))
        return _router(name, num_experts)

    def _check(self):
        for width in self.active_width:
            check_positive_integer("active_width", width)
        for name in self.routers:
            check_choice("routers", name, TAKE_TOP_K + SET_TOP_K)
            top_k = self.top_k if name in TAKE_TOP_K else (None,)
            for combination in itertools.product(self.num_experts, top_k):
                self._check_width(_router(name, *combination).max_top_k)
        for loss in self.loss_weights:
            names = sorted(losses.BY_NAME)
            if loss not in names:
                raise ValueError(
                    f"`loss_weights` must be of losses among {listed(names)}. Received: the name "
                    f"{shortened(loss)}. {propose(loss, names)} A loss of your own goes to "
                    "`sample(..., router_losses=[...])`."
                )
        for capacity in self.capacities.values():
            layers.Capacity.get(capacity)

    def _check_width(self, top_k):
        for width in self.active_width:
            if width % top_k:
                raise ValueError(
                    "Each `active_width` must be divisible by each number of experts per token. "
                    f"Received: active_width={width}, top_k={top_k}. "
                    f"Pass a multiple of {top_k}, or leave this `top_k` out."
                )


def _router(name, num_experts, top_k=None):
    classes: dict = routers.BY_NAME
    given = {} if top_k is None else {"top_k": top_k}
    return classes[name](num_experts=num_experts, **given)
