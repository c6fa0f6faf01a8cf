"""Loss-free balancing: biases that are added to the scores to choose experts.

Axes: T tokens, E experts, K experts per token.
"""

import math

from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer, check_number
from keras_moe._internal.serialization import Configured, register, resolve
from keras_moe.backend import backend
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import take_scores, top_k_indices


class SelectionBalancer(Configured):
    """Abstract: updates the bias of each expert's score, so that the load becomes even.

    In training a router measures each batch on each replica, and updates its biases once per
    optimizer step by the mean of the measurements. A subclass implements `measure` and `update`. If
    a measurement cannot be averaged over replicas, `measure` gathers their data.

    Args:
        accumulation_steps: Integer. Micro-batches of an optimizer step: the
            `gradient_accumulation_steps` of the optimizer, times the calls of the layer in one
            pass.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> balancer = keras_moe.routers.LossFreeBias(rate=0.01)
    >>> router = keras_moe.routers.TopKRouter(num_experts=8, balancer=balancer)
    """

    def __init__(self, accumulation_steps: int = 1):
        self.accumulation_steps = check_integer("accumulation_steps", accumulation_steps)

    def measure(self, routing: Routing, scores: Tensor, bias: Tensor) -> Tensor:
        """Return a measurement (E,) of a batch, from scores (T, E) and the current bias (E,)."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `measure`")

    def update(self, bias: Tensor, measured: Tensor) -> Tensor:
        """Return the next bias (E,) from this one and the mean measurement of a step."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `update`")

    def advice(self) -> str:
        """Return what to try if the load is uneven in spite of the balancer."""
        return f"The load is balanced by the expert bias of {type(self).__name__}."


@register
class LossFreeBias(SelectionBalancer):
    """Raises the bias of experts below the mean load, and lowers that of the others.

    `b_e <- b_e + rate * sign(mean(c) - c_e)`, then the mean of b is subtracted, which changes no
    selection. There is no loss, so no gradient works against the task.

    Args:
        rate: Float. Step of the bias. Raise it, to 0.01 for example, if the load becomes even too
            slowly. Lower it if the load in evaluation changes a lot from epoch to epoch.

    Other arguments, errors and an example: as for `SelectionBalancer`.

    Reference: Wang et al. 2024 (arXiv:2408.15664), algorithm 1; DeepSeek-V3 (arXiv:2412.19437),
    section 2.1.2. Subtracting the mean is not in the papers.
    """

    def __init__(self, rate: float = 1e-3, accumulation_steps: int = 1):
        super().__init__(accumulation_steps)
        self.rate = check_number("rate", rate, above=0)

    def measure(self, routing, scores, bias):
        return ops.cast(routing.counts, "float32")

    def update(self, bias, measured):
        mean = ops.mean(measured)
        missing = mean - measured
        # A mean of micro-batches is rounded: an expert with exactly the mean load would move.
        missing = ops.where(ops.abs(missing) > 1e-6 * mean, missing, 0.0)
        bias = bias + self.rate * ops.sign(missing)
        return bias - ops.mean(bias)

    def advice(self):
        fix = "lower the rate if the load jumps from epoch to epoch, else raise it."
        # Scores are from 0 to 1: no larger rate than 0.01 is advised.
        if self.rate < 0.01:
            fix = f"raise the rate, for example to {min(10 * self.rate, 0.01):g}."
        return f"The load is balanced by LossFreeBias(rate={self.rate:g}): {fix}"


@register
class QuantileBias(SelectionBalancer):
    """Sets the bias that would have given each expert its fair share of the last batch.

    A token needs more than its threshold, the (K+1)-th best of its biased scores, to choose an
    expert. The bias lifts the score of an expert above the threshold for N K / E of the N tokens.

    Args:
        momentum: Float from 0 to below 1. Share of the old bias that is kept.

    Other arguments, errors and an example: as for `SelectionBalancer`. The biases of micro-batches
    are averaged.

    Reference: the quantile balancing of Megatron-Core, whose dual variable beta is minus this bias.
    """

    def __init__(self, momentum: float = 0.0, accumulation_steps: int = 1):
        super().__init__(accumulation_steps)
        self.momentum = check_number("momentum", momentum, below=1)

    def measure(self, routing, scores, bias):
        num_experts, top_k = scores.shape[-1], routing.indices.shape[-1]
        if top_k == num_experts:
            return ops.zeros((num_experts,), "float32")
        biased = scores + bias
        threshold = take_scores(biased, top_k_indices(biased, top_k + 1)[:, top_k:])
        margin = ops.where(ops.expand_dims(routing.mask, 1), scores - threshold, -math.inf)
        margin = ops.pad(margin, ((0, 1), (0, 0)), constant_values=-math.inf)  # of an empty batch
        # The mean of the replicas' quantiles is not the quantile of all their tokens.
        margin = -ops.sort(-backend.devices.gather(margin), axis=0)
        num_real = backend.devices.sum(ops.sum(ops.cast(routing.mask, "int32")))
        fair_share = num_real * top_k // num_experts
        last = ops.maximum(num_real - 1, 0)
        quantile = ops.take(margin, ops.minimum(fair_share, last), axis=0)
        # Without a real token the bias does not change.
        return ops.where(ops.isfinite(quantile), -quantile, bias)

    def update(self, bias, measured):
        bias = self.momentum * bias + (1 - self.momentum) * measured
        return bias - ops.mean(bias)

    def advice(self):
        fix = "lower the momentum, or use larger batches."
        return f"The load is balanced by QuantileBias(momentum={self.momentum:g}): {fix}"


IDENTIFIERS = {"loss_free": LossFreeBias, "quantile": QuantileBias}


def get(identifier):
    """Return a balancer from an instance, a config, "loss_free" or "quantile"."""
    return resolve("balancer", identifier, SelectionBalancer, IDENTIFIERS)
