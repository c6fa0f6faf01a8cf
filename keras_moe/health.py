"""Verdicts on experts and routers in plain words, each with advice."""

from typing import NamedTuple

import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.metrics import as_counts, is_dead, load_entropy, load_imbalance

__all__ = ["Finding", "balance_advice", "judge_drops", "judge_load", "judge_router"]
__dir__ = __all__.copy

PROBLEM, HINT = "problem", "hint"

# `spread` below this is a collapse.
COLLAPSED = 0.1
# `metrics.load_imbalance`.
IMBALANCED = 1.0
DROPPED = 0.05
# `ExpertHealth` warns above this share only, as early batches are uneven.
MAX_DROPPED = 0.5
# Router entropy over `log E`: no preference; no doubt.
INDIFFERENT = 0.995
CERTAIN = 0.05
# The probability of an expert whose logit is this much lower is below 1e-13.
EXPLODED_LOGIT = 30.0
# Weights of a balancing loss, in multiples of its usual weight: too weak to matter, too large to be
# raised further, and heavy. Not exactly ten, as layers store weights in float32.
WEAK_WEIGHT, LARGE_WEIGHT, HEAVY_WEIGHT = 1e-3, 9.99, 10.01
# What a heavy loss adds to its value at an even load, as a share of the rest of the loss.
HEAVY_SHARE = 0.1
# Assignments per expert that are enough to judge a load; at the end of training fewer will do.
ENOUGH, FEW = 20, 5


def is_large(loss, weight):
    """Whether the weight of a loss should not grow: from ten times its usual weight on."""
    return loss.usual_weight is not None and weight >= LARGE_WEIGHT * loss.usual_weight


def balance_advice(layer: MixtureOfExperts) -> str:
    """Advice for an uneven load. It depends on how a `layers.MixtureOfExperts` balances it."""
    advice = []
    for loss, weight in zip(layer.router_losses, layer.loss_weights_in_force):
        if loss.balances:
            fix = f": give it {'ten times the weight' if weight else 'a weight above 0'}."
            if is_large(loss, weight):
                fix = ", a large weight: with more the router may learn balance, not the task."
            advice.append(f"The load is balanced by {type(loss).__name__}(weight={weight:g}){fix}")
    bias = "Or balance without a loss: see `balancer` of `TopKRouter`."
    loss = "Nothing balances the load: add `losses.LoadBalance()` to its `router_losses`."
    advice.append(layer.router.balance_advice() or (bias if advice else loss))
    return (
        f"{' '.join(advice)} If the features of the layer's inputs have means far from zero, "
        "centre them, by `keras.layers.Normalization` or `BatchNormalization` before the layer. A "
        "lower learning rate in the first steps and `logit_noise` in the router help as well."
    )


class Finding(NamedTuple):
    """A verdict: its `level`, "problem" or "hint"; a `text`; and a `fix`, what to try."""

    level: str
    text: str
    fix: str


def spread(counts, top_k):
    """How far counts (E,) are from a collapse onto K experts, 0, to balance, 1.

    Experts are counted by the exponential of the entropy of their shares.
    """
    number = len(counts)
    if number <= top_k:
        return 1.0
    effective = number ** float(load_entropy(counts))
    return min(max((effective - top_k) / (number - top_k), 0.0), 1.0)


def judge_load(counts: Tensor, top_k: int, advice: str) -> list[Finding]:
    """Findings about the load of the experts.

    A problem if experts are dead (`metrics.dead_experts`), or in a collapse: few more than K get
    nearly all tokens. A hint if one has twice the mean load, or below 20 assignments per expert.

    Args:
        counts: List or array, (E,). Assignments per expert.
        top_k: Integer. Experts per token, K.
        advice: String. What to try where the load is uneven, such as `balance_advice(layer)`.
    """
    counts, top_k = ops.convert_to_numpy(as_counts(counts)), check_integer("top_k", top_k)
    num_experts = len(counts)
    if counts.mean() < ENOUGH:
        text = f"{int(counts.sum())} assignments are too few to judge {num_experts} experts."
        return [Finding(HINT, text, f"Give it at least {ENOUGH * num_experts}.")]
    if spread(counts, top_k) < COLLAPSED:
        return [collapsed(counts, advice)]
    idle = np.flatnonzero(ops.convert_to_numpy(is_dead(counts)))
    findings = [dead(idle, num_experts, advice)] if len(idle) else []
    imbalance = float(load_imbalance(counts))
    if imbalance > IMBALANCED:
        text = f"The busiest expert does {1 + imbalance:.1f} times its fair share."
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
    """The size of the difference between experts, of logits (T, E) or a kernel (D, E)."""
    if router.normalizes_kernel:
        return 0.0 * logits  # It learns their scale; NaN stays NaN.
    if not router.shift_invariant:
        return np.abs(logits)
    return logits - np.mean(logits, axis=-1, keepdims=True)


def judge_router(entropy: float, largest_logit: float) -> list[Finding]:
    """Findings about how the router decides.

    Hints if the entropy is above 0.995 or below 0.05; a problem if a logit is above 30.

    Args:
        entropy: Float from 0 to 1. Mean entropy of a token's probabilities over `log E`.
        largest_logit: Float. Size of the largest logit; where adding a number to all logits of a
            token changes nothing, above their mean.
    """
    bad = bad_logits(largest_logit)
    if bad is not None:
        return [bad]
    entropy = _share("entropy", entropy)
    if entropy > INDIFFERENT:
        text = "The router hardly prefers an expert: the scores of a token are close to each other."
        fix = "Train longer. If the loss does not fall either, router losses may weigh too much."
    elif entropy < CERTAIN:
        text = "The router is all but certain of every choice, so it hardly learns any more."
        fix = "Raise the weight of `losses.RouterZ`, or add `logit_noise` to the router."
    else:
        return []
    return [Finding(HINT, text, fix)]


def bad_logits(largest, most=EXPLODED_LOGIT):
    """A finding, if the largest logit is NaN or too large, or None."""
    if not np.isfinite(largest):
        text = "The router's logits are NaN."
        fix = (
            "Look for NaN in the inputs, lower the learning rate, clip gradients (`clipnorm=1.0`), "
            "and in float16 use `keras.optimizers.LossScaleOptimizer`."
        )
    elif largest > most:
        text = f"Router logits explode: {largest:.0f} makes every choice absolute."
        fix = (
            "Raise the weight of `losses.RouterZ`, lower the learning rate, and normalise the "
            "inputs of the layer (`keras.layers.LayerNormalization`)."
        )
    else:
        return None
    return Finding(PROBLEM, text, fix)


def collapsed(counts, advice):
    """The finding that few experts do the work, with counts (E,), not all 0, that show it."""
    share = np.cumsum(np.sort(counts)[::-1]) / np.sum(counts)
    busy = int(np.argmax(share >= 0.9)) + 1
    work = f"{share[busy - 1]:.0%} of the work goes to {busy} of {len(counts)}"
    return Finding(PROBLEM, f"The experts have collapsed: {work}.", advice)


def dead(experts, num_experts, advice, when=""):
    listed = ", ".join(map(str, experts[:10]))
    if len(experts) > 10:
        listed += f" and {len(experts) - 10} more"
    named = f"Expert {listed}" if len(experts) == 1 else f"Experts {listed}"
    text = f"{named} of {num_experts} {'is' if len(experts) == 1 else 'are'} dead{when}."
    return Finding(PROBLEM, text, advice)


def weak_loss(loss, weight):
    """A finding, if a router loss is on but its present weight cannot matter, or None."""
    usual = loss.usual_weight
    if usual is None or not 0 < weight < WEAK_WEIGHT * usual:
        return None
    text = f"{type(loss).__name__}(weight={weight:g}) is too weak to have any effect."
    return Finding(HINT, text, f"Give it a weight of about {usual:g}, or leave it out.")


def heavy_losses(losses, total):
    """A finding, if balancing is a large part of what training can still lower, or None.

    `losses` are tuples of a loss, its weight and its mean before the weight. `total` is the largest
    loss of the model: any balancing loss is large beside that of a task that has been learned.
    """
    usual = [each for each in losses if each[0].usual_weight is not None]
    heavy = [each for each in usual if each[1] >= HEAVY_WEIGHT * each[0].usual_weight]
    constant = sum(weight * loss.value_at_balance for loss, weight, _ in losses)
    excess = sum(weight * (value - loss.value_at_balance) for loss, weight, value in heavy)
    rest = total - constant
    # NaN is in no order.
    if not heavy or not excess >= HEAVY_SHARE * abs(rest) > 0:
        return None
    names = dict.fromkeys(f"{type(loss).__name__}(weight={weight:g})" for loss, weight, _ in heavy)
    text = f"{' and '.join(names)} is {excess:.3g} of a loss of up to {rest:.3g}"
    if constant:
        text += f", not counting the constant {constant:.3g} of balancing losses at an even load"
    weight = heavy[0][0].usual_weight
    fix = f"It may outweigh the task: try a weight of about {weight:g}, if the load stays even."
    return Finding(HINT, f"{text}.", fix)


def _share(name, value):
    if not 0 <= value <= 1 + 1e-4:  # a little more is a rounding error
        raise ValueError(f"`{name}` must be a share, from 0 to 1. Received: {name}={value}")
    return float(value)
