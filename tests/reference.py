"""The oracle: what the package computes, in float64 NumPy, one token and one expert at a time.

Written from the formulas, not from the package, and slow on purpose: every function is a loop that
can be checked by reading it. Gradients are derived by hand; a test holds them against finite
differences of the forward pass.

Axes: T tokens, D features, E experts, K experts per token, C capacity, H hidden width.
"""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np

_erf = np.vectorize(math.erf, otypes=["float64"])

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


# Routing


def softmax(logits):
    exponentials = np.exp(logits - np.max(logits))
    return exponentials / np.sum(exponentials)


def top_k_routing(logits, top_k, mask=None):
    """`p = softmax(z)`; the K largest, ties to the lower index; renormalised where K > 1.

    Rows of padding are zero: nothing is promised about them.
    """
    num_tokens, num_experts = logits.shape
    indices = np.zeros((num_tokens, top_k), int)
    weights = np.zeros((num_tokens, top_k))
    probs = np.zeros((num_tokens, num_experts))
    counts = np.zeros(num_experts, int)
    mask = np.ones(num_tokens, bool) if mask is None else mask
    for t in np.flatnonzero(mask):
        p = softmax(logits[t].astype("float64"))
        chosen = sorted(range(num_experts), key=lambda e: (-p[e], e))[:top_k]
        probs[t], indices[t], weights[t] = p, chosen, p[chosen]
        if top_k > 1:
            weights[t] /= sum(p[chosen])
        for e in chosen:
            counts[e] += 1
    return SimpleNamespace(indices=indices, weights=weights, probs=probs, counts=counts, mask=mask)


def logit_gradient(probs, chosen, weight_gradient, prob_gradient):
    """Gradient for one token's logits of a loss with these gradients for its weights and probs."""
    gradient = prob_gradient.astype("float64")
    if len(chosen) == 1:
        gradient[chosen[0]] += weight_gradient[0]
    else:
        # w_j = p_j / s, s the sum of the chosen p: dw_j / dp_i = [i == j] / s - p_j / s ** 2
        total = sum(probs[chosen])
        for i in range(len(chosen)):
            for j in range(len(chosen)):
                slope = (i == j) / total - probs[chosen[j]] / total**2
                gradient[chosen[i]] += weight_gradient[j] * slope
    return probs * (gradient - np.dot(probs, gradient))


def selection_gap(logits, top_k):
    """How far rounding may move a logit before another expert is chosen, or in another order."""
    ordered = np.sort(logits, axis=1)[:, ::-1][:, : top_k + 1]
    gaps = ordered[:, :-1] - ordered[:, 1:]
    return np.min(gaps, initial=np.inf)


# Capacity


def expert_capacity(num_tokens, num_experts, top_k, factor):
    """`ceil(factor * T * K / E)`, from 1 to `T * K`, without a rounding error."""
    exact = Fraction(str(factor)) * num_tokens * top_k / num_experts
    return max(1, min(math.ceil(exact), num_tokens * top_k))


def queues(indices, mask, num_experts, capacity=None):
    """For each expert the `(token, choice)` it serves: first choices first, then token order."""
    served = [[] for _ in range(num_experts)]
    num_tokens, top_k = indices.shape
    for choice in range(top_k):
        for token in range(num_tokens):
            queue = served[indices[token, choice]]
            if mask[token] and (capacity is None or len(queue) < capacity):
                queue.append((token, choice))
    return served


# Losses


def load_balance(routing):
    """`E * sum_e f_e P_e`: f is a share of all assignments, P a mean over real tokens."""
    num_real = np.sum(routing.mask)
    if num_real == 0:
        return 0.0
    num_tokens, num_experts = routing.probs.shape
    total = 0.0
    for e in range(num_experts):
        mean_prob = sum(routing.probs[t, e] for t in range(num_tokens) if routing.mask[t])
        total += routing.counts[e] / np.sum(routing.counts) * mean_prob / num_real
    return num_experts * total


def router_z(logits, mask):
    """Mean over real tokens of `logsumexp(z) ** 2`."""
    values = [_logsumexp(logits[t].astype("float64")) ** 2 for t in np.flatnonzero(mask)]
    return sum(values) / max(len(values), 1)


def _logsumexp(logits):
    return np.max(logits) + math.log(np.sum(np.exp(logits - np.max(logits))))


# The layer


def grouped_matmul(rows, kernels, sizes):
    """Rows of group e times kernel e; rows past the last group are zero."""
    output = np.zeros((len(rows), kernels.shape[2]))
    row = 0
    for kernel, size in zip(kernels, sizes):
        for _ in range(size):
            output[row] = rows[row].astype("float64") @ kernel
            row += 1
    return output


def grouped_matmul_gradients(rows, kernels, sizes, upstream):
    """Gradients of `sum(upstream * grouped_matmul(...))` for rows and kernels."""
    d_rows, d_kernels = np.zeros(rows.shape), np.zeros(kernels.shape)
    row = 0
    for e, size in enumerate(sizes):
        for _ in range(size):
            d_rows[row] = kernels[e] @ upstream[row].astype("float64")
            d_kernels[e] += np.outer(rows[row], upstream[row])
            row += 1
    return d_rows, d_kernels


def expert(x, weights, activation):
    """One token through one expert: `act(x U + b) V + c`, or `(act(x G + a) * (x U + b)) V + c`."""
    up = x @ weights["up_kernel"] + weights.get("up_bias", 0.0)
    if "gate_kernel" in weights:
        gate = x @ weights["gate_kernel"] + weights.get("gate_bias", 0.0)
        hidden = ACTIVATIONS[activation](gate) * up
    else:
        hidden = ACTIVATIONS[activation](up)
    return hidden @ weights["down_kernel"] + weights.get("down_bias", 0.0)


def expert_gradients(x, weights, activation, upstream):
    """Gradients of `sum(upstream * expert(...))` for the token and for each weight."""
    act = ACTIVATIONS[activation]
    up = x @ weights["up_kernel"] + weights.get("up_bias", 0.0)
    d_hidden = weights["down_kernel"] @ upstream
    if "gate_kernel" in weights:
        gate = x @ weights["gate_kernel"] + weights.get("gate_bias", 0.0)
        hidden = act(gate) * up
        d_pre = {"gate": d_hidden * up * _slope(act, gate), "up": d_hidden * act(gate)}
    else:
        hidden = act(up)
        d_pre = {"up": d_hidden * _slope(act, up)}
    gradients = {"down_kernel": np.outer(hidden, upstream), "down_bias": upstream}
    d_x = np.zeros(x.shape)
    for name, gradient in d_pre.items():
        d_x += weights[f"{name}_kernel"] @ gradient
        gradients[f"{name}_kernel"] = np.outer(x, gradient)
        gradients[f"{name}_bias"] = gradient
    return d_x, {name: gradients[name] for name in weights}


def _slope(function, x, step=1e-6):
    return (function(x + step) - function(x - step)) / (2 * step)


def moe(x, weights, activation, top_k, mask=None, capacity_factor=None):
    """The whole layer on tokens (T, D), with both router losses at weight 1.

    `weights` holds the router's "kernel" (D, E) and the stacked weights of the experts.
    """
    x, weights = x.astype("float64"), {k: v.astype("float64") for k, v in weights.items()}
    num_tokens, num_experts = len(x), weights["kernel"].shape[1]
    mask = np.ones(num_tokens, bool) if mask is None else mask
    # One product a token: what stands in a row of padding meets nothing.
    logits = np.zeros((num_tokens, num_experts))
    for t in np.flatnonzero(mask):
        logits[t] = x[t] @ weights["kernel"]
    routing = top_k_routing(logits, top_k, mask)
    capacity = None
    if capacity_factor is not None:
        capacity = expert_capacity(num_tokens, num_experts, top_k, capacity_factor)
    served = queues(routing.indices, mask, num_experts, capacity)
    outputs = np.zeros((num_tokens, weights["down_kernel"].shape[2]))
    for e, queue in enumerate(served):
        for t, choice in queue:
            outputs[t] += routing.weights[t, choice] * expert(
                x[t], _of_expert(weights, e), activation
            )
    num_dropped = np.sum(routing.counts) - sum(len(queue) for queue in served)
    return SimpleNamespace(
        outputs=outputs,
        loss=load_balance(routing) + router_z(logits, mask),
        routing=routing,
        logits=logits,
        served=served,
        dropped=num_dropped / max(np.sum(routing.counts), 1),
    )


def moe_gradients(x, weights, activation, top_k, upstream, mask=None, capacity_factor=None):
    """Gradients of `sum(upstream * outputs) + loss` for the tokens and for each weight."""
    result = moe(x, weights, activation, top_k, mask, capacity_factor)
    routing, logits = result.routing, result.logits
    x, weights = x.astype("float64"), {k: v.astype("float64") for k, v in weights.items()}
    d_x, d_weights = np.zeros(x.shape), {k: np.zeros(v.shape) for k, v in weights.items()}
    d_combine = np.zeros(routing.weights.shape)
    for e, queue in enumerate(result.served):
        of_expert = _of_expert(weights, e)
        for t, choice in queue:
            d_combine[t, choice] = upstream[t] @ expert(x[t], of_expert, activation)
            d_row, d_expert = expert_gradients(
                x[t], of_expert, activation, routing.weights[t, choice] * upstream[t]
            )
            d_x[t] += d_row
            for name, gradient in d_expert.items():
                d_weights[name][e] += gradient
    num_real, num_experts = np.sum(routing.mask), logits.shape[1]
    for t in np.flatnonzero(routing.mask):
        share = routing.counts / np.sum(routing.counts)
        d_probs = num_experts * share / num_real
        d_logits = logit_gradient(routing.probs[t], routing.indices[t], d_combine[t], d_probs)
        d_logits = d_logits + 2 * _logsumexp(logits[t]) * routing.probs[t] / num_real
        d_weights["kernel"] += np.outer(x[t], d_logits)
        d_x[t] += weights["kernel"] @ d_logits
    return d_x, d_weights


def _of_expert(weights, e):
    return {name: weight[e] for name, weight in weights.items() if name != "kernel"}


def finite_differences(function, x, step=1e-5):
    """Gradient of a scalar function of one array, by central differences."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient
