"""The oracle of the routers: selection and weights from logits, one token at a time, in float64.

Each function takes logits (T, E) and a mask (T,) and returns dense weights (T, E), zero where an
expert does not serve, scores (T, E) as a distribution, and places (T, E): 0 for the first choice
of a token and so on, 99 for experts that it did not choose. Rows of padding are zero, places 99.
"""

import math

import numpy as np
import reference
from reference import softmax


def _sigmoid(z):
    return 1 / (1 + np.exp(-z)) + 1e-7


SCORES = {
    "softmax": softmax,
    "sigmoid": _sigmoid,
    "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}


def best(scores, k):
    """The k best, ties to the lower index."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def routed(logits, mask, choose):
    """From `choose(t)`, the weights by expert in the order of choice, and the scores."""
    weights, probs = np.zeros(logits.shape), np.zeros(logits.shape)
    places = np.full(logits.shape, 99)
    for t in np.flatnonzero(mask):
        chosen, scores = choose(t)
        for place, (e, weight) in enumerate(chosen.items()):
            weights[t, e], places[t, e] = weight, place
        probs[t] = scores / sum(scores) if sum(scores) else scores
    return weights, probs, places


def token_by_token(choose):
    """A router from `choose(z) -> (weights by expert, scores)` for one token's logits."""
    return lambda logits, mask: routed(logits, mask, lambda t: choose(logits[t].astype("float64")))


def top_k(k, score="softmax", renormalize=None, scale=1.0, bias=0.0, groups=None):
    """`groups`: number of groups and how many of them a token may use."""

    def choose(z):
        scores = SCORES[score](z)
        selection = scores + bias
        if groups is not None:
            number, kept = groups
            size = len(z) // number
            worth = [sum(sorted(selection[g * size : (g + 1) * size])[-2:]) for g in range(number)]
            open_groups = best(worth, kept)
            selection = [
                s if e // size in open_groups else -math.inf for e, s in enumerate(selection)
            ]
        experts = best(selection, k)
        total = 1.0
        if renormalize or (renormalize is None and k > 1):
            total = sum(scores[e] for e in experts)
        return {e: scale * scores[e] / total for e in experts}, scores

    return token_by_token(choose)


@token_by_token
def dense(z):
    return dict(enumerate(softmax(z))), softmax(z)


def top_p(threshold, k):
    def choose(z):
        p = softmax(z)
        chosen, total = {}, 0.0
        for e in best(p, k):
            if total < threshold or not chosen:
                chosen[e] = p[e]
            total += p[e]
        return chosen, p

    return token_by_token(choose)


def relu(k):
    def choose(z):
        w = np.maximum(z, 0)
        return {e: w[e] for e in best(w, k) if w[e] > 0}, w

    return token_by_token(choose)


def expert_choice(factor, length):
    """Each expert, in each sequence of `length` tokens, takes its best real tokens, NaN last."""

    def route(logits, mask):
        scores = {t: softmax(logits[t].astype("float64")) for t in np.flatnonzero(mask)}
        chosen = {t: {} for t in scores}
        for start in range(0, len(logits), max(length, 1)):
            real = [t for t in scores if start <= t < start + length]
            room = reference.expert_capacity(len(real), logits.shape[1], 1, factor)
            for e in range(logits.shape[1]):
                of_expert = {t: np.nan_to_num(scores[t][e], nan=-1) for t in real}
                for t in sorted(real, key=lambda t: (-of_expert[t], t))[:room]:
                    chosen[t][e] = scores[t][e]
        return routed(logits, mask, lambda t: (chosen[t], scores[t]))

    return route


def sinkhorn(iterations, k):
    """Rows to 1 and columns to N / E in turn, of `exp(z)`; then the k best of the plan."""

    def route(logits, mask):
        real = np.flatnonzero(mask)
        z = logits[real].astype("float64")
        plan = np.exp(z - np.max(z, initial=-math.inf))
        for _ in range(iterations if len(real) else 0):
            plan /= plan.sum(axis=1, keepdims=True)
            plan *= len(real) / logits.shape[1] / plan.sum(axis=0, keepdims=True)
        rows = dict(zip(real, plan))

        def choose(t):
            scores = SCORES["sigmoid" if k == 1 else "softmax"](logits[t].astype("float64"))
            return {e: scores[e] for e in best(rows[t], k)}, scores

        return routed(logits, mask, choose)

    return route


def stable_assignment(logits, mask):
    """Tokens one after another ask their experts by preference; a full expert drops its worst."""
    real = list(np.flatnonzero(mask))
    num_experts = logits.shape[1]
    room = math.ceil(len(real) / num_experts) if real else 0
    wishes = {t: best(logits[t], num_experts) for t in real}
    served = [[] for _ in range(num_experts)]
    free = list(real)
    while free:
        token = free.pop(0)
        expert = wishes[token].pop(0)
        served[expert].append(token)
        served[expert].sort(key=lambda t: (-logits[t, expert], t))
        free += served[expert][room:]
        del served[expert][room:]
    return {t: e for e, tokens in enumerate(served) for t in tokens}


def balanced_assignment(logits, mask):
    experts = stable_assignment(logits, mask)

    def choose(t):
        scores = _sigmoid(logits[t].astype("float64"))
        return {experts[t]: scores[experts[t]]}, scores

    return routed(logits, mask, choose)


def smooth_step(t, gamma):
    if abs(t) >= gamma / 2:
        return float(t > 0)
    return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 1 / 2


def selector(bits, num_experts, gamma):
    """Shares of the experts by the binary encoding of their numbers, lowest bit first."""
    steps = [smooth_step(t, gamma) for t in bits]
    shares = np.zeros(num_experts)
    for code in range(2 ** len(bits)):
        digits = [code >> place & 1 for place in range(len(bits))]
        # A number of no expert counts for the expert without the highest bit.
        expert = code if code < num_experts else code - 2 ** (len(bits) - 1)
        shares[expert] += math.prod(s if d else 1 - s for s, d in zip(steps, digits))
    return shares


def dselect_k(kernel, bias, k, gamma, num_experts):
    """`kernel` (D, K + K M): the logits of the weights of the selectors, then their bits."""

    @token_by_token
    def route(x):
        values = x @ kernel + bias
        bits = values[k:].reshape(k, -1)
        selectors = [selector(each, num_experts, gamma) for each in bits]
        weights = sum(w * each for w, each in zip(softmax(values[:k]), selectors))
        return {e: weight for e, weight in enumerate(weights) if weight > 0}, weights

    return route


def soft(x, kernel, scale, experts, slots, mask):
    """Soft MoE of one sequence, token by token; `experts` are functions of rows."""
    real = np.flatnonzero(mask)
    unit_kernel = kernel / np.sqrt(np.sum(kernel**2, axis=0) + 1e-6)
    logits = np.zeros((len(x), kernel.shape[1]))
    for t in real:
        logits[t] = scale * (x[t] / np.sqrt(np.sum(x[t] ** 2) + 1e-6)) @ unit_kernel
    return soft_of_logits(x, logits, experts, slots, mask)


def soft_of_logits(x, logits, experts, slots, mask):
    """Soft MoE of one sequence by the logits (T, E P)."""
    real = np.flatnonzero(mask)
    outputs = [np.zeros_like(experts[0](token)) for token in x.astype("float64")]
    for m in range(logits.shape[1] if len(real) else 0):
        share = softmax(logits[real, m])
        slot = sum(weight * x[t] for weight, t in zip(share, real))
        made = experts[m // slots](slot)
        for t in real:
            outputs[t] += softmax(logits[t])[m] * made
    return np.array(outputs)


def soft_routing(slots):
    """The expert whose slots a token takes most from, and what it takes from each."""

    def route(logits, mask):
        def choose(t):
            shares = softmax(logits[t]).reshape(-1, slots).sum(axis=1)
            return {e: shares[e] for e in best(shares, 1)}, shares

        return routed(logits[:, ::slots], mask, choose)

    return route


def fixed(indices, num_experts):
    """Given experts (T, K), each with the weight 1 / K."""
    chosen = np.array([np.isin(np.arange(num_experts), each) for each in indices])
    chosen = chosen / indices.shape[1]

    def route(logits, mask):
        weights = np.where(mask[:, None], chosen[: len(mask)], 0.0)
        return weights, weights

    return route


def of_directions(route, scale=1.0):
    """A router that sees no norms of its tokens."""
    return lambda tokens, mask: route(
        np.array([scale * token / np.sqrt(np.sum(token**2) + 1e-6) for token in tokens]), mask
    )


def noisy_load(clean, noisy, deviation, k, mask):
    """Chance that an expert is among the best k of a token if its own noise is drawn again."""
    load = np.zeros(clean.shape[1])
    for t in np.flatnonzero(mask):
        for e in range(len(load)):
            others = sorted(np.delete(noisy[t], e), reverse=True)
            threshold = others[k - 1] if k < len(load) else -math.inf
            x = (clean[t, e] - threshold) / deviation[t, e]
            load[e] += 0.5 * (1 + math.erf(x / math.sqrt(2)))
    return load


def quantile_bias(scores, bias, k, mask):
    """Minus the (m + 1)-th largest margin of each expert, m its fair share of the tokens."""
    thresholds = np.sort(scores + bias, axis=1)[:, ::-1][:, k : k + 1]
    margins = np.sort((scores - thresholds)[mask], axis=0)[::-1]
    return -margins[np.sum(mask) * k // scores.shape[1]]
