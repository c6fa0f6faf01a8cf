"""Balancing without a loss: what moves the selection bias of a router.

Axes: T tokens, E experts, K experts per token.
"""

import math
from functools import partial

from keras import ops

from keras_moe._internal.serialization import Configured, register, resolve
from keras_moe._internal.shape_checks import check_fields, check_shapes
from keras_moe._internal.validation import (
    check_fraction,
    check_method,
    check_positive_integer,
    check_positive_number,
)
from keras_moe.backend import backend
from keras_moe.ops.selection import take_scores, top_k_indices

# Scores are from 0 to 1: from this rate on, no larger one is named as an example.
LARGE_RATE = 0.01


class SelectionBalancer(Configured):
    """Abstract: from routings to a selection bias that evens out the load.

    In training a router measures each batch, on each replica, and once an optimizer step updates
    its bias with the mean of the measurements. The bias of a step is fixed before the step, so that
    no token's experts depend on later tokens. Padding is not measured.

    A layer that a model calls several times in a step, such as one whose weights are shared over
    depth, measures at each call: multiply `accumulation_steps` by the number of calls, or the bias
    changes between them.

    A subclass implements `measure(routing, scores, bias)` and `update(bias, measured)`; all but the
    scores (T, E) have length E. `measure` gathers what cannot be averaged over replicas.

    Args:
        accumulation_steps: micro-batches of an optimizer step, the `gradient_accumulation_steps`
            of the optimizer, times the calls of the layer in one pass.
    """

    _attribute_checks = {"accumulation_steps": check_positive_integer}

    def __init__(self, accumulation_steps=1):
        self.accumulation_steps = accumulation_steps

    def measure(self, routing, scores, bias):
        raise NotImplementedError(f"{type(self).__name__} must implement `measure`.")

    def update(self, bias, measured):
        raise NotImplementedError(f"{type(self).__name__} must implement `update`.")

    def balance_advice(self):
        """What to try where the load is uneven in spite of the bias."""
        return f"The load is balanced by the selection bias of {type(self).__name__}."

    def get_config(self):
        return {**super().get_config(), "accumulation_steps": self.accumulation_steps}


@register
class LossFreeBias(SelectionBalancer):
    """Raises the bias of experts with less than the mean load, lowers that of the others.

    `b_e <- b_e + rate * sign(mean(c) - c_e)`, then the mean of b is subtracted, which changes no
    selection and keeps b near zero. There is no loss, so no gradient works against the task.

    Args:
        rate: step of the bias. Raise it, for example to 0.01, where the load evens out too slowly,
            and lower it where the load of evaluations then varies less from epoch to epoch. A
            router that still learns varies it at any rate.
        accumulation_steps: micro-batches of an optimizer step.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> balancer = keras_moe.routers.LossFreeBias(rate=0.01)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8, score="sigmoid", balancer=balancer)

    Reference: Wang et al. 2024 (arXiv:2408.15664), algorithm 1; DeepSeek-V3 (arXiv:2412.19437),
    section 2.1.2. Subtracting the mean is not in the papers.
    """

    _attribute_checks = {"rate": partial(check_positive_number, example=0.001)}

    def __init__(self, rate=1e-3, accumulation_steps=1):
        super().__init__(accumulation_steps)
        self.rate = rate

    def measure(self, routing, scores, bias):
        _check_measured(routing, scores, bias)
        return ops.cast(routing.counts, "float32")

    def update(self, bias, measured):
        check_shapes({"bias": (bias, "E", "float"), "measured": (measured, "E", "float")})
        bias = bias + self.rate * ops.sign(ops.mean(measured) - measured)
        return bias - ops.mean(bias)

    def balance_advice(self):
        if self.rate < LARGE_RATE:
            advice = f"raise the rate, for example to {min(10 * self.rate, LARGE_RATE):g}"
        else:
            advice = "lower the rate if the load jumps from epoch to epoch, else raise it"
        return f"The load is balanced by LossFreeBias(rate={self.rate:g}): {advice}."

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


@register
class QuantileBias(SelectionBalancer):
    """Sets the bias so that each expert would have had its fair share of the last batch.

    A token needs more than its threshold, the (K+1)-th best of its biased scores, to choose an
    expert. The bias of an expert is such that its score is above the threshold for N K / E of the N
    tokens: minus a quantile over the tokens. It needs no rate and follows the load within a few
    steps.

    Args:
        momentum: share of the old bias that is kept, from 0 to below 1.
        accumulation_steps: micro-batches of an optimizer step. Their biases are averaged, which is
            close to that of all their tokens if the micro-batches are alike.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> balancer = keras_moe.routers.QuantileBias(momentum=0.9)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8, score="sigmoid", balancer=balancer)

    Reference: the quantile balancing of Megatron-Core, whose dual variable beta is minus this bias.
    """

    _attribute_checks = {"momentum": check_fraction}

    def __init__(self, momentum=0.0, accumulation_steps=1):
        super().__init__(accumulation_steps)
        self.momentum = momentum

    def measure(self, routing, scores, bias):
        _check_measured(routing, scores, bias)
        num_experts, top_k = scores.shape[-1], routing.indices.shape[-1]
        if top_k == num_experts:
            return ops.zeros((num_experts,), "float32")
        biased = scores + bias
        threshold = take_scores(biased, top_k_indices(biased, top_k + 1)[:, top_k:])
        margin = ops.where(ops.expand_dims(routing.mask, 1), scores - threshold, -math.inf)
        # The mean of the replicas' quantiles is not the quantile of all their tokens.
        margin = -ops.sort(-backend.gather_over_replicas(margin), axis=0)
        num_real = backend.sum_over_replicas(ops.sum(ops.cast(routing.mask, "int32")))
        fair_share = num_real * top_k // num_experts
        last = ops.maximum(num_real - 1, 0)
        quantile = ops.take(margin, ops.minimum(fair_share, last), axis=0)
        # Without a real token the bias does not change.
        return ops.where(ops.isfinite(quantile), -quantile, bias)

    def update(self, bias, measured):
        check_shapes({"bias": (bias, "E", "float"), "measured": (measured, "E", "float")})
        bias = self.momentum * bias + (1 - self.momentum) * measured
        return bias - ops.mean(bias)

    def balance_advice(self):
        momentum = f"QuantileBias(momentum={self.momentum:g})"
        return f"The load is balanced by {momentum}: lower the momentum, or use larger batches."

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum}


def _check_measured(routing, scores, bias):
    """What the balancers here are called with; those of users check what they use."""
    check_fields(routing, "indices", "mask", "counts")
    check_shapes(
        {
            "routing.counts": (routing.counts, "E"),
            "scores": (scores, "TE", "float"),
            "routing.mask": (routing.mask, "T"),
            "bias": (bias, "E", "float"),
        }
    )


BY_NAME = {"loss_free": LossFreeBias, "quantile": QuantileBias}


def get(identifier):
    """A balancer from an instance, a config, "loss_free" or "quantile"."""
    balancer = resolve("balancer", identifier, SelectionBalancer, BY_NAME)
    check_method(balancer, "measure", "routing", "scores", "bias")
    check_method(balancer, "update", "bias", "measured")
    return balancer
