"""Search spaces of MoE layers."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras_tuner
import numpy as np

from keras_moe import layers, losses, routers
from keras_moe._internal.checks import check_choice, check_integer, check_number, shortened

# Routers whose tokens all have K experts, so that the active size is known before the search.
TAKE_TOP_K = ("cosine", "deepseek_v3", "noisy_top_k", "sinkhorn", "top_k")
SET_TOP_K = ("balanced_assignment", "switch")


class SearchSpace:
    """The values from which a search chooses each part of a MoE layer.

    Values come as a list, tuple, range or array. The first of an argument is the one picked by
    hand, which `DefaultsFirst` tries first, and a single one is fixed. An expert is
    `active_width / K` wide, so that neither the number of experts nor `top_k` changes what the
    experts cost.

    Args:
        active_width: Integers. Widths K * H of the experts of a token together, each divisible by
            each K.
        num_experts: Integers. Numbers of experts, E.
        top_k: Integers. Experts per token, K. "switch" and "balanced_assignment" have one, whatever
            it is.
        routers: Strings. Routers whose tokens all have K experts: "cosine", "deepseek_v3",
            "noisy_top_k", "sinkhorn", "top_k", "balanced_assignment" and "switch".
        loss_weights: Dict of names for `losses.get` to floats, their weights.
        capacity_factors: Capacities, as in `layers.MixtureOfExperts`; None is no limit.
        name: String with which the names of the hyperparameters begin. Layers that are tuned
            independently need spaces of different names.

    Raises:
        ValueError: If a value is out of its range, or some do not go together.

    Example:

    >>> import keras_tuner
    >>> space = keras_moe.tuner.SearchSpace((64, 128), num_experts=(8, 16), top_k=(2, 1, 4))
    >>> layer = space.sample(keras_tuner.HyperParameters())
    >>> layer.experts.num_experts, layer.experts.hidden_dim, layer.router.top_k
    (8, 32, 2)
    """

    def __init__(
        self,
        active_width: Sequence[int],
        num_experts: Sequence[int] = (8, 4, 16),
        top_k: Sequence[int] = (2, 1, 4),
        routers: Sequence[str] = ("top_k",),
        loss_weights: dict | None = None,
        capacity_factors: Sequence = (None,),
        name: str = "moe",
    ):
        if loss_weights is None:
            loss_weights = {"load_balance": (1e-2, 1e-3, 1e-1), "router_z": (1e-3,)}
        self.active_width = _values("active_width", active_width, check_integer)
        self.num_experts = _values("num_experts", num_experts, check_integer)
        self.top_k = _values("top_k", top_k, check_integer)
        self.routers = _values(
            "routers", routers, partial(check_choice, choices=TAKE_TOP_K + SET_TOP_K)
        )
        self.loss_weights = {
            check_choice("loss_weights", loss, losses.IDENTIFIERS): _values(
                "loss_weights", weights, check_number
            )
            for loss, weights in loss_weights.items()
        }
        capacity_factors = _values("capacity_factors", capacity_factors)
        for factor in capacity_factors:
            layers.Capacity.get(factor)
        # By names, as KerasTuner knows neither None nor objects.
        self.capacities = {str(factor): factor for factor in capacity_factors}
        self.name = name
        for *router, width in itertools.product(
            self.routers, self.num_experts, self.top_k, self.active_width
        ):
            top_k = _router(*router).top_k
            if width % top_k:
                raise ValueError(
                    "Each `active_width` must be divisible by each number of experts per token. "
                    f"Received: active_width={width}, top_k={top_k}"
                )

    def sample(
        self,
        hp: Any,
        experts: Callable = layers.FeedForwardExperts,
        router_losses: Sequence = (),
        **kwargs: Any,
    ) -> layers.MixtureOfExperts:
        """Return a layer with the values of this trial.

        Args:
            hp: `keras_tuner.HyperParameters` that a model-building function is given.
            experts: Function of `num_experts` and `hidden_dim` that returns a bank of experts.
            router_losses: Losses besides those in `loss_weights`, such as one of your own whose
                weight is `hp.Choice("weight", ...)`.
            **kwargs: Further arguments of the layer, such as `name` and `shared_expert`.

        Returns:
            A new `layers.MixtureOfExperts`. Layers of one space have the same values in a trial.
        """
        with hp.name_scope(self.name):
            num_experts = self._choose(hp, "num_experts", self.num_experts)
            router = self._sample_router(hp, num_experts)
            hidden_dim = self._choose(hp, "active_width", self.active_width) // router.top_k
            capacity = self.capacities[self._choose(hp, "capacity_factor", list(self.capacities))]
            searched = [
                losses.IDENTIFIERS[loss](self._choose(hp, f"{loss}_weight", weights))
                for loss, weights in self.loss_weights.items()
            ]
        return layers.MixtureOfExperts(
            experts(num_experts, hidden_dim),
            router,
            [*searched, *router_losses],
            capacity_factor=capacity,
            **kwargs,
        )

    def _sample_router(self, hp, num_experts):
        name = self._choose(hp, "router", self.routers)
        open_routers = [router for router in self.routers if router in TAKE_TOP_K]
        if open_routers:
            with hp.conditional_scope("router", open_routers):
                if name in open_routers:
                    return _router(name, num_experts, self._choose(hp, "top_k", self.top_k))
        return _router(name, num_experts)

    def _choose(self, hp, name, values):
        """Return the trial's value for a name in the scope of the space."""
        if len(values) == 1:
            choice = hp.Fixed(name, values[0])
        else:
            choice = hp.Choice(name, sorted(values), default=values[0])
        # A hyperparameter that is there already keeps its values. Other scopes end alike.
        alike = [each for each in hp.space if each.name.endswith(f"{self.name}/{name}")]
        if not any(set(each.values) <= set(values) for each in alike):
            raise ValueError(
                "Spaces of one search with other values must have different names. "
                f"Received: two spaces {self.name!r} with other values of `{name}`"
            )
        return choice


class DefaultsFirst(keras_tuner.Oracle):
    """Abstract: a mixin before an oracle, whose first trial then has the default values.

    So the best trial is never worse than what was picked by hand.

    Raises:
        TypeError: If it does not come before an oracle among the bases of a class.

    Example:

    >>> import keras_tuner
    >>> class Oracle(keras_moe.tuner.DefaultsFirst, keras_tuner.oracles.RandomSearchOracle):
    ...     pass
    >>> # search = keras_tuner.Tuner(Oracle(objective, max_trials=10), build_model)
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if super().populate_space.__func__ is keras_tuner.Oracle.populate_space:
            bases = ", ".join(base.__name__ for base in type(self).__bases__)
            raise TypeError(
                "`DefaultsFirst` must come before an oracle among the bases of a class. "
                f"Received: {bases}"
            )

    def populate_space(self, trial_id):
        answer = super().populate_space(trial_id)
        if self.trials or answer["status"] != "RUNNING":
            return answer
        first = keras_tuner.HyperParameters()
        first.merge(self.get_space())
        # Hyperband stores its own state among the hyperparameters.
        own = {key: value for key, value in answer["values"].items() if key.startswith("tuner/")}
        return {**answer, "values": {**first.values, **own}}


def _values(name, values, check=None):
    """Return values to choose from as a list of Python numbers."""
    if isinstance(values, str) or not isinstance(values, (Sequence, np.ndarray)) or not len(values):
        received = f"{name}={shortened(values)}"
        raise ValueError(f"`{name}` must be a list of values to choose from. Received: {received}")
    values = [value.item() if hasattr(value, "item") else value for value in values]
    return values if check is None else [check(name, value) for value in values]


def _router(name, num_experts, top_k=1):
    given = {"top_k": top_k} if name in TAKE_TOP_K else {}
    classes: dict = routers.IDENTIFIERS
    return classes[name](num_experts=num_experts, **given)
