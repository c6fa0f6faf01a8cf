"""Verdicts on experts and routers in plain words, each with what to try."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_moe._internal.checks import check_integer
from keras_moe._internal.types import Tensor
from keras_moe.losses.router_losses import RouterLoss
from keras_moe.metrics.usage import is_dead

PROBLEM, HINT = "problem", "hint"

# Between all tokens on the same K experts, 0, and an even load, 1.
COLLAPSED = 0.1
# Load of the busiest expert above the mean.
IMBALANCED = 1.0
DROPPED = 0.05
# Entropy of the probabilities of a token, 1 for a router without a preference.
INDIFFERENT = 0.995
CERTAIN = 0.05
# exp(30) is as far as float32 keeps a second choice apart from nothing.
EXPLODED_LOGIT = 30.0
# Weights of a balancing loss, as multiples of its usual one; advice goes up to ten times that.
WEAK_WEIGHT, HEAVY_WEIGHT = 1e-3, 10.01
# What it adds to its value at an even load, as a share of the rest of the loss.
HEAVY_SHARE = 0.1
# Fewer assignments an expert are not enough to call it dead.
ENOUGH = 20


class Finding(NamedTuple):
    """A verdict.

    - `level`: "problem" or "hint".
    - `text`: what is the case.
    - `fix`: what to try.
    """

    level: str
    text: str
    fix: str


def spread(counts: Tensor, top_k: int) -> float:
    """How far the load is from a collapse onto K experts, 0, to balance, 1.

    Experts are counted by the exponential of the entropy of their shares.

    Args:
        counts: List or array, (E,). Assignments per expert.
        top_k: Integer. Experts per token, K.

    Returns:
        Float.
    """
    counts, top_k = _as_counts(counts), check_integer("top_k", top_k)
    if len(counts) <= top_k:
        return 1.0
    share = counts / max(counts.sum(), 1)
    effective = np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1))))
    return float(np.clip((effective - top_k) / (len(share) - top_k), 0, 1))


def judge_load(counts: Tensor, top_k: int, advice: str) -> list[Finding]:
    """Findings about who does the work.

    A problem where experts are dead, as `metrics.dead_experts` counts them, or where the `spread`
    is below 0.1, a collapse; a hint where the busiest expert does more than twice the mean, or
    where fewer than 20 assignments an expert are too few to judge.

    Args:
        counts: List or array, (E,). Assignments per expert.
        top_k: Integer. Experts per token, K.
        advice: String. What to try where the load is uneven: the layer's `balance_advice()`.

    Returns:
        List of `Finding`.
    """
    counts = _as_counts(counts)
    num_experts = len(counts)
    if not is_enough(counts):
        text = f"{int(counts.sum())} assignments are too few to judge {num_experts} experts."
        return [Finding(HINT, text, f"Give it at least {ENOUGH * num_experts}.")]
    if spread(counts, top_k) < COLLAPSED:
        return [collapsed(counts, advice)]
    findings = []
    idle = np.flatnonzero(ops.convert_to_numpy(is_dead(counts)))
    if len(idle):
        findings.append(dead(idle, num_experts, advice))
    busiest = counts.max() / counts.mean()
    if busiest - 1 > IMBALANCED:
        text = f"The busiest expert does {busiest:.1f} times its fair share."
        findings.append(Finding(HINT, text, advice))
    return findings


def judge_drops(dropped: float) -> list[Finding]:
    """Findings about the share of assignments that found no slot, a float from 0 to 1."""
    dropped = _share("dropped", dropped)
    if dropped <= DROPPED:
        return []
    text = f"{dropped:.0%} of the assignments found no slot in their expert."
    fix = "Raise `capacity_factor`, or set it to None so that nothing is dropped."
    return [Finding(PROBLEM, text, fix)]


@np.errstate(invalid="ignore")  # infinite logits become NaN, which is a finding
def logit_sizes(logits, router):
    """How large logits (T, E), or a kernel (D, E) of them, are: by what differs between experts."""
    if router.normalizes_kernel:
        return 0.0 * logits  # It learns their scale; NaN stays NaN.
    if not router.shift_invariant:
        return np.abs(logits)
    return logits - np.mean(logits, axis=-1, keepdims=True)


def judge_router(entropy: float, largest_logit: float) -> list[Finding]:
    """Findings about how the router decides.

    Hints above 0.995 and below 0.05 of the largest entropy; a problem where a logit is above 30.

    Args:
        entropy: Float from 0 to 1. Mean entropy of a token's probabilities over `log E`.
        largest_logit: Float. Size of the largest logit, above the mean of its token where the
            router is `shift_invariant`.

    Returns:
        List of `Finding`.
    """
    if not np.isfinite(largest_logit):
        return [not_a_number()]
    entropy = _share("entropy", entropy)
    if largest_logit > EXPLODED_LOGIT:
        return [exploded(f"reach {largest_logit:.0f}")]
    if entropy > INDIFFERENT:
        text = "The router hardly prefers an expert: the scores of a token are close to each other."
        fix = (
            "Train longer, as scores are close at first. If the loss does not fall either, router "
            "losses, if the layer has any, may weigh too much."
        )
        return [Finding(HINT, text, fix)]
    if entropy < CERTAIN:
        text = "The router is all but certain of every choice, so it hardly learns any more."
        fix = "Raise the weight of `losses.RouterZ`, or add `logit_noise` to the router."
        return [Finding(HINT, text, fix)]
    return []


def not_a_number() -> Finding:
    """The finding that a router computes NaN."""
    return Finding(
        PROBLEM,
        "The router computes what is not a number.",
        "Look for NaN in the inputs, lower the learning rate, clip gradients (`clipnorm=1.0`), and "
        "in float16 use `keras.optimizers.LossScaleOptimizer`.",
    )


def exploded(how: str) -> Finding:
    """The finding that logits are too large; `how` says by how much, after "they"."""
    return Finding(
        PROBLEM,
        f"Router logits explode: they {how}, which makes every choice absolute.",
        "Raise the weight of `losses.RouterZ`, lower the learning rate, and normalise the inputs "
        "of the layer (`keras.layers.LayerNormalization`).",
    )


def collapsed(counts: Tensor, advice: str) -> Finding:
    """The finding that few experts do the work, with the counts (E,), not all 0, that show it."""
    share = np.cumsum(np.sort(counts)[::-1]) / np.sum(counts)
    busy = int(np.argmax(share >= 0.9)) + 1
    work = f"{share[busy - 1]:.0%} of the work goes to {busy} of {len(counts)}"
    return Finding(PROBLEM, f"The experts have collapsed: {work}.", advice)


def dead(experts: Tensor, num_experts: int, advice: str, when: str = "") -> Finding:
    """The finding that experts, a list of their numbers, are dead as `metrics.is_dead` says."""
    experts = np.unique(experts)
    listed = ", ".join(str(expert) for expert in experts[:10])
    if len(experts) > 10:
        listed += f" and {len(experts) - 10} more"
    are = "is" if len(experts) == 1 else "are"
    text = f"{len(experts)} of {num_experts} experts {are} dead{when}: {listed}."
    return Finding(PROBLEM, text, advice)


def is_enough(counts: Tensor) -> bool:
    """Whether counts (E,) are large enough to judge the experts: 20 an expert."""
    return np.sum(counts) >= ENOUGH * len(counts)


def judge_weak_loss(loss: RouterLoss, weight: float) -> Finding | None:
    """A finding, if a `losses.RouterLoss` is on but its present weight cannot matter, or None."""
    usual = loss.usual_weight
    if usual is None or not 0 < weight < WEAK_WEIGHT * usual:
        return None
    text = f"{type(loss).__name__}(weight={weight:g}) is too weak to have any effect."
    return Finding(HINT, text, f"Give it a weight of about {usual:g}, or leave it out.")


def judge_heavy_losses(
    router_losses: Sequence,
    weights: Sequence[float],
    total: float | None,
    values: Sequence[float] | None = None,
) -> Finding | None:
    """A finding, if balancing is a large part of what training can still lower, or None.

    Only what is above the value of a loss at an even load counts: that is constant.

    Args:
        router_losses: List of `losses.RouterLoss`. Those of all MoE layers of a model.
        weights: List of floats. The weight that each has now.
        total: Float or None. The loss of the model: the largest of all epochs, as any loss is large
            beside that of a task that is learned.
        values: List of floats or None. The mean of each loss before its weight, over about the
            steps of `total`. None or NaN if they were not measured: nothing is found then.
    """
    if total is None or values is None:
        return None
    judged = list(zip(router_losses, weights, values, strict=True))
    heavy = [
        (loss, weight, value)
        for loss, weight, value in judged
        if loss.usual_weight is not None and weight >= HEAVY_WEIGHT * loss.usual_weight
    ]
    if not heavy:
        return None
    constant = sum(weight * loss.value_at_balance for loss, weight, _ in judged)
    excess = sum(weight * (value - loss.value_at_balance) for loss, weight, value in heavy)
    rest = total - constant
    # NaN is in no order.
    if not excess >= HEAVY_SHARE * abs(rest) > 0:
        return None
    names = dict.fromkeys(f"{type(loss).__name__}(weight={weight:g})" for loss, weight, _ in heavy)
    text = f"{' and '.join(names)} is {excess:.3g} of a loss of up to {rest:.3g}"
    if constant:
        text += f", not counting the constant {constant:.3g} of balancing losses at an even load"
    fix = (
        "The router may learn balance instead of the task: try a weight of about "
        f"{heavy[0][0].usual_weight:g}, if the load stays even with it."
    )
    return Finding(HINT, f"{text}.", fix)


def _as_counts(counts):
    """Counts as an array of floats (E,)."""
    counts = ops.convert_to_numpy(counts).astype("float64")
    if counts.ndim != 1 or not counts.size or not (counts >= 0).all():
        raise ValueError(f"`counts` must be numbers (E,) of at least 0. Received: counts={counts}")
    return counts


def _share(name, value):
    if not 0 <= value <= 1 + 1e-4:  # a little more is a rounding error
        raise ValueError(f"`{name}` must be a share, from 0 to 1. Received: {name}={value}")
    return float(value)


__all__ = [
    "Finding",
    "collapsed",
    "dead",
    "exploded",
    "is_enough",
    "judge_drops",
    "judge_heavy_losses",
    "judge_load",
    "judge_router",
    "judge_weak_loss",
    "not_a_number",
    "spread",
]


def __dir__():
    return __all__
