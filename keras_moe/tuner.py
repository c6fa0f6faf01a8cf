"""Hyperparameter search for models with MoE layers, with KerasTuner.

Needs KerasTuner: `pip install "keras-tuner[bayesian]" six`.
"""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

try:
    import keras_tuner
except ImportError as error:
    hint = '`keras_moe.tuner` needs KerasTuner: run `pip install "keras-tuner[bayesian]" six`'
    raise ImportError(hint) from error

from keras_moe import layers, losses, routers
from keras_moe._internal.checks import check_choice, check_integer, check_number, shortened
from keras_moe.inspection import summarize

__all__ = ["CostMonitor", "SearchSpace", "WithinBudget"]
__dir__ = __all__.copy

# Routers whose tokens all have K experts, so that the active size is known before the search.
TAKE_TOP_K = ("cosine", "group_limited", "noisy_top_k", "sinkhorn", "top_k")
SET_TOP_K = ("balanced_assignment", "switch")


class SearchSpace:
    """The values from which a search chooses each part of a MoE layer.

    Values are a list, tuple, range or array; a single one is fixed. An expert is `active_width / K`
    wide, so that neither `num_experts` nor `top_k` changes the cost of the experts.

    Args:
        active_width: Integers. Widths K * H of the experts of a token, each divisible by each K.
        num_experts: Integers. Numbers of experts, E.
        top_k: Integers. Experts per token, K. "switch" and "balanced_assignment" always have one.
        routers: Strings. Routers whose tokens all have K experts: "cosine", "group_limited",
            "noisy_top_k", "sinkhorn", "top_k", "balanced_assignment" and "switch".
        loss_weights: Dict of names for `losses.get` to lists of weights, in place of the default.
        capacity_factors: Capacities, as in `layers.MixtureOfExperts`; None is no limit.
        name: String. Prefix of the hyperparameter names; must differ between tuned layers.

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
        check_router = partial(check_choice, choices=TAKE_TOP_K + SET_TOP_K)
        self.routers = _values("routers", routers, check_router)
        self.loss_weights = {}
        for loss, weights in loss_weights.items():
            check_choice("loss_weights", loss, losses.IDENTIFIERS)
            self.loss_weights[loss] = _values("loss_weights", weights, check_number)
        # By names, as KerasTuner knows neither None nor objects.
        self.capacities = {
            str(factor): layers.Capacity.get(factor)
            for factor in _values("capacity_factors", capacity_factors)
        }
        self.name = name
        choices = (self.routers, self.num_experts, self.top_k, self.active_width)
        for *router, width in itertools.product(*choices):
            top_k = _router(*router).top_k
            if width % top_k:
                rule = "Each `active_width` must be divisible by each number of experts per token"
                raise ValueError(f"{rule}. Received: active_width={width}, top_k={top_k}")

    def sample(
        self,
        hp: Any,
        experts: Callable = layers.FeedForwardExperts,
        router_losses: Sequence = (),
        **kwargs: Any,
    ) -> layers.MixtureOfExperts:
        """Return a new `layers.MixtureOfExperts` with the values of this trial.

        Args:
            hp: `keras_tuner.HyperParameters` that a model-building function is given.
            experts: Function of `num_experts` and `hidden_dim` that returns a bank of experts.
            router_losses: Losses besides those in `loss_weights`, such as one of your own whose
                weight is `hp.Choice("weight", ...)`.
            **kwargs: Further arguments of the layer, such as `name` and `shared_expert`.
        """
        with hp.name_scope(self.name):
            num_experts = self._choose(hp, "num_experts", self.num_experts)
            name = self._choose(hp, "router", self.routers)
            top_k, takers = 1, [router for router in self.routers if router in TAKE_TOP_K]
            if takers:
                with hp.conditional_scope("router", takers):
                    if name in takers:
                        top_k = self._choose(hp, "top_k", self.top_k)
            router = _router(name, num_experts, top_k)
            hidden_dim = self._choose(hp, "active_width", self.active_width) // router.top_k
            capacity = self.capacities[self._choose(hp, "capacity_factor", list(self.capacities))]
            searched = [
                losses.IDENTIFIERS[loss](self._choose(hp, f"{loss}_weight", weights))
                for loss, weights in self.loss_weights.items()
            ]
        bank, all_losses = experts(num_experts, hidden_dim), [*searched, *router_losses]
        return layers.MixtureOfExperts(bank, router, all_losses, capacity_factor=capacity, **kwargs)

    def _choose(self, hp, name, values):
        if len(values) == 1:
            choice = hp.Fixed(name, values[0])
        else:
            choice = hp.Choice(name, sorted(values), default=values[0])
        # KerasTuner keeps the values of an earlier space of this name. Other scopes end alike.
        alike = [each for each in hp.space if each.name.endswith(f"{self.name}/{name}")]
        if not any(set(each.values) <= set(values) for each in alike):
            rule = "Spaces of one search with other values must have different names"
            raise ValueError(f"{rule}. Received: a second space {self.name!r}, {name}={values}")
        return choice


def _values(name, values, check=lambda name, value: value):
    if np.ndim(values) != 1 or not len(values):
        received = f"{name}={shortened(values)}"
        raise ValueError(f"`{name}` must be a list of values to choose from. Received: {received}")
    return [check(name, value) for value in values]


def _router(name, num_experts, top_k):
    given = {"top_k": top_k} if name in TAKE_TOP_K else {}
    return routers.get(name, num_experts, **given)


class CostMonitor(keras.callbacks.Callback):
    """Adds what a model costs to the logs of each epoch, for `WithinBudget`.

    - `active_flops`: of one token in all MoE layers, forward, as in `inspection.LayerSummary`.
    - `parameters`: number of trained parameters of the whole model.
    - `step_seconds`: time of a training step, without the first of the epoch, which may compile.

    Example:

    >>> monitor = keras_moe.tuner.CostMonitor()  # for the `callbacks` of a tuner's `search`
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._ends = [(-1, time.perf_counter())]

    def on_train_batch_end(self, batch, logs=None):
        self._ends.append((batch, time.perf_counter()))

    def on_epoch_end(self, epoch, logs=None):
        weights = self.model.trainable_weights
        logs["active_flops"] = float(sum(layer.flops for layer in summarize(self.model)))
        logs["parameters"] = float(sum(math.prod(weight.shape) for weight in weights))
        first = 1 if len(self._ends) > 2 else 0
        (begin, began), (end, ended) = self._ends[first], self._ends[-1]
        logs["step_seconds"] = (ended - began) / (end - begin)


class WithinBudget(keras_tuner.Objective):
    """Minimises a loss subject to a cost budget: trials above it rank below all within it.

    The score of a trial is from 0 to 1 within the budget, and above 1 over it. A warning is given
    as long as no trial is within the budget.

    Args:
        budget: Float, greater than 0, else a ValueError is raised. Highest cost.
        cost: String. The limited value in the logs, such as "active_flops" of `CostMonitor`.
        loss: String. Value in the logs to minimise.

    Example:

    >>> objective = keras_moe.tuner.WithinBudget(1000)
    >>> score = objective.get_value({"val_loss": 3.0, "active_flops": 1000.0})
    """

    def __init__(self, budget: float, cost: str = "active_flops", loss: str = "val_loss"):
        super().__init__(name=f"{loss}_within_{cost}", direction="min")
        self.budget = check_number("budget", budget, above=0)
        self.cost = cost
        self.loss = loss
        self._lowest = math.inf  # cost of all trials so far

    def has_value(self, logs):
        return self.cost in logs and self.loss in logs

    def get_value(self, logs):
        if not self.has_value(logs):
            # Fatal to KerasTuner, which would otherwise try the next trial.
            fix = "give `search` validation data and `callbacks=[tuner.CostMonitor()]`, and name "
            fix += "in `cost` and `loss` what the logs have"
            rule = f"The logs must contain {self.loss!r} and {self.cost!r}: {fix}"
            raise keras_tuner.errors.FatalValueError(f"{rule}. Received: {sorted(logs)}")
        cost, loss = float(logs[self.cost]), float(logs[self.loss])
        if self.budget < cost < self._lowest:
            rule = f"No trial so far has kept to the budget of {self.budget:g}"
            warnings.warn(f"{rule}. The lowest {self.cost} is {cost:g}", stacklevel=2)
        self._lowest = min(self._lowest, cost)
        score = (1 + loss / (1 + abs(loss))) / 2
        return score if cost <= self.budget else score + cost / self.budget
