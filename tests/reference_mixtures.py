"""The oracle of whole mixtures: from public attributes and weights of a layer, in float64.

It puts together the formulas of `reference.py` and `reference_routers.py`, one token at a time.

Axes: T tokens, D features, E experts, K choices of a token.
"""

import math
from types import SimpleNamespace

import keras
import numpy as np
import reference
import reference_routers as oracle
from layer_checks import array
from reference import ACTIVATIONS, softmax

from keras_moe import layers, losses, routers


class Weights:
    """Values of variables in float64, some of them moved along a direction."""

    def __init__(self, directions=(), step=0.0):
        self.moved = {id(variable): step * each for variable, each in directions}

    def __call__(self, variable):
        return array(variable).astype("float64") + self.moved.get(id(variable), 0.0)


# Experts


def kernel_of(bank, name, read):
    """Float kernels (E, D, H) of a linear map: of integers and of low-rank corrections, too."""
    kernel = getattr(bank, f"{name}_kernel")
    scale, zero = getattr(bank, f"{name}_scale", None), getattr(bank, f"{name}_zero", None)
    if scale is None:
        kernel = read(kernel)
    elif zero is None:
        kernel = read(kernel) * read(scale)
    else:
        packed = keras.ops.convert_to_tensor(kernel)
        integers = array(keras.quantizers.unpack_int4(packed, scale.shape[2], axis=-1))
        group = np.arange(kernel.shape[1]) // -(-kernel.shape[1] // scale.shape[1])
        kernel = (integers - read(zero)[:, group]) * read(scale)[:, group]
    if getattr(bank, f"{name}_lora_a", None) is None:
        return kernel
    a, b = (read(getattr(bank, f"{name}_lora_{letter}")) for letter in "ab")
    config = bank.get_config()
    return kernel + (config["lora_alpha"] or config["lora_rank"]) / config["lora_rank"] * (a @ b)


def gated(bank, linear, act):
    gate, up = linear("gate"), linear("up")
    if bank.clip is not None:
        gate, up = np.minimum(gate, bank.clip), np.clip(up, -bank.clip, bank.clip)
    return linear("down", act(gate) * (up + bank.up_shift))


# The formula of one expert; `linear(name)` is a map of its input.
FORMULAS = {
    layers.FeedForwardExperts: lambda bank, linear, act: linear("down", act(linear("up"))),
    layers.GatedExperts: gated,
    layers.LinearExperts: lambda bank, linear, act: linear("up"),
}


def stacked(bank, read):
    base = bank.base if isinstance(bank, layers.LowRankExperts) else bank
    names = [*base.widths(1)]
    vectors = [name for name in names if len(base.widths(1)[name]) == 1]
    kernels = {n: kernel_of(base, n, read) for n in names if n not in vectors}
    if base is not bank:
        scale = (bank.alpha or bank.rank) / bank.rank
        for name in names:
            a, b = (read(getattr(bank, f"{name}_lora_{letter}")) for letter in "ab")
            kernels[name] = kernels[name] + scale * (a @ b)
    biases = {n: read(getattr(base, f"{n}_bias")) if base.use_bias else None for n in kernels}
    vectors = {name: read(getattr(base, name)) for name in vectors}
    act = ACTIVATIONS[getattr(base.activation, "__name__", "linear")]

    def expert(x, e):
        def linear(name, rows=None):
            if name in vectors:
                return vectors[name][e]
            outputs = (x if rows is None else rows) @ kernels[name][e]
            bias = biases[name]
            # A frozen base has one bias for all.
            return outputs if bias is None else outputs + bias[e if len(bias) > 1 else 0]

        linear.inputs = x
        return FORMULAS[type(base)](base, linear, act)

    return [lambda x, e=e: expert(x, e) for e in range(bank.num_experts)]


def of_layer(layer, x, read):
    """The output of a Keras layer."""
    if isinstance(layer, keras.Sequential):
        for part in layer.layers:
            x = of_layer(part, x, read)
        return x
    if isinstance(layer, layers.GatedFeedForward):
        gate, up = of_layer(layer.gate, x, read), of_layer(layer.up, x, read)
        return of_layer(layer.down, gate * up, read)
    assert isinstance(layer, keras.layers.Dense), layer
    outputs = x @ read(layer.kernel) + (read(layer.bias) if layer.use_bias else 0.0)
    return ACTIVATIONS[layer.activation.__name__](outputs)


def zero_computation(bank, read):
    experts = experts_of(bank.experts, read)
    experts += [np.zeros_like] * bank.num_zero + [np.array] * bank.num_identity

    def constant(x, number):
        a, b = softmax(x @ read(bank.mixing_kernel)[:, number])
        return a * x + b * read(bank.constant)[number]

    return experts + [lambda x, n=n: constant(x, n) for n in range(bank.num_constant)]


def experts_of(bank, read):
    """The experts of a bank, or of several, functions of a token."""
    if isinstance(bank, list):
        return [expert for each in bank for expert in experts_of(each, read)]
    if isinstance(bank, layers.LayerExperts):
        return [lambda x, each=each: of_layer(each, x, read) for each in bank.layers]
    if isinstance(bank, layers.ZeroComputationExperts):
        return zero_computation(bank, read)
    return stacked(bank, read)


# Routers


def logits_of(router, x, read):
    """Logits (T, E) of tokens (T, D), without noise; (T, E P) of a soft router."""
    if isinstance(router, routers.HashRouter):
        return np.zeros((len(x), router.num_experts))
    if isinstance(router, routers.DSelectKRouter):
        return read(router.bias) + (x @ read(router.kernel) if router.per_example else x[:, :1] * 0)
    if router.hidden_dim:
        x = np.maximum(x @ read(router.hidden_kernel) + read(router.hidden_bias), 0)
    kernel = read(router.kernel)
    if isinstance(router, routers.SoftRouter):
        z = read(router.scale) * _unit(x, 1) @ _unit(kernel, 0)
    else:
        z = x @ kernel
    if isinstance(router, routers.CosineRouter):
        scale = np.exp(min(read(router.log_scale), np.log(100)))
        z = scale * _unit(z, 1) @ _unit(read(router.directions), 0)
    z = z / router.temperature
    return z + read(router.bias) if getattr(router, "use_bias", False) else z


def _unit(x, axis):
    return x / np.sqrt(np.sum(x**2, axis=axis, keepdims=True) + 1e-6)


def route_of(router, read, length, training, token_ids=None):
    """A function from logits (T, E) and a mask to weights, scores and order, as in the oracle."""
    k, kind = router.top_k, type(router)
    if kind in (routers.TopKRouter, routers.CosineRouter, routers.GroupLimitedRouter):
        bias = 0.0 if router.balancer is None else read(router.selection_bias)
        is_limited = kind is routers.GroupLimitedRouter
        groups = (router.num_groups, router.top_groups) if is_limited else None
        parts = router.score, router.renormalize, router.scaling_factor, bias, groups
        return oracle.top_k(k, *parts)
    if kind in (routers.SinkhornRouter, routers.BalancedAssignmentRouter):
        if not training:
            score = "softmax" if k > 1 else "sigmoid"
            return oracle.top_k(k, score, renormalize=False)
        if kind is routers.SinkhornRouter:
            return oracle.sinkhorn(router.iterations, k)
        return oracle.balanced_assignment
    if kind is routers.HashRouter:
        return hashed(router, token_ids)
    if kind is routers.DSelectKRouter:
        return dselect(router)
    return {
        routers.NoisyTopKRouter: lambda: oracle.top_k(k),
        routers.VMoERouter: lambda: oracle.top_k(k, renormalize=False),
        routers.GShardRouter: lambda: oracle.top_k(k),
        routers.TopPRouter: lambda: oracle.top_p(router.threshold, k),
        routers.ReLURouter: lambda: oracle.relu(router.max_top_k),
        routers.DenseRouter: lambda: oracle.dense,
        routers.SoftRouter: lambda: oracle.soft_routing(router.slots),
        routers.ExpertChoiceRouter: lambda: oracle.expert_choice(router.capacity_factor, length),
    }[kind]()


def hashed(router, token_ids):
    table = array(router.table)[np.reshape(token_ids, -1) % router.vocabulary_size]

    def route(logits, mask):
        def choose(t):
            chosen = np.isin(np.arange(router.num_experts), table[t])
            return {e: 1 / len(table[t]) for e in table[t]}, chosen / len(table[t])

        return oracle.routed(logits, mask, choose)

    return route


def selectors_of(router, values):
    """Shares (K, E) of the experts in each selector, from the values of one token."""
    bits = values[router.top_k :].reshape(router.top_k, -1)
    return np.array([oracle.selector(each, router.num_experts, router.gamma) for each in bits])


def dselect(router):
    def route(logits, mask):
        def choose(t):
            weights = softmax(logits[t, : router.top_k]) @ selectors_of(router, logits[t])
            return {e: weight for e, weight in enumerate(weights) if weight > 0}, weights

        shape = np.zeros((len(logits), router.num_experts))
        weights, probs, places = oracle.routed(shape, mask, choose)
        return weights, probs, np.where(places < 99, np.arange(router.num_experts), 99)

    return route


# Capacity


def served_of(layer, routed, length, training):
    """Which experts serve which tokens, (T, E) bool: those with weights that find a slot."""
    chosen, capacity, router = routed.chosen, layer.capacity, layer.router
    factor = capacity and (capacity.factor if training else capacity.evaluation_factor)
    if not factor:
        return chosen
    num_tokens, num_experts = chosen.shape
    length = length if capacity.per_sequence and length else num_tokens
    slots = reference.expert_capacity(length, num_experts, router.max_top_k or router.top_k, factor)
    slots = -(-max(slots, capacity.minimum) // capacity.multiple_of) * capacity.multiple_of
    first = np.arange(num_tokens)
    if capacity.priority == "probability":
        first = np.argsort(-np.max(routed.probs, axis=1), kind="stable")
    served, taken = np.zeros_like(chosen), {}
    limited = layer.experts
    limited = getattr(limited, "experts", limited).num_experts
    for place in range(num_experts):
        for t in first:
            for e in np.flatnonzero(chosen[t] & (routed.place[t] == place)):
                queue = e, t // max(length, 1)
                taken[queue] = taken.get(queue, 0) + 1
                served[t, e] = e >= limited or taken[queue] <= slots
    return served


# Losses


def mean(values, mask):
    return np.sum(values[mask], axis=0) / max(np.sum(mask), 1)


def entropy(probs):
    return -np.sum(probs * np.log(np.maximum(probs, 1e-30)), axis=-1)


def balance(counts, mean_probs):
    return len(counts) * np.sum(counts / max(np.sum(counts), 1) * mean_probs)


def variation(values):
    return np.var(values) / max(np.mean(values) ** 2, 1e-10)


def loss_of(loss, router, routed, length):
    """A router loss before its weight."""
    probs, mask = routed.probs, routed.mask
    if isinstance(loss, losses.LoadBalance):
        if loss.scope != "sequence" or length is None:
            return balance(routed.counts, mean(probs, mask))
        by = routed.counted
        parts = [slice(start, start + length) for start in range(0, len(mask), length)]
        parts = [part for part in parts if np.any(mask[part])]
        values = [
            balance(np.sum(by[part][mask[part]], axis=0), mean(probs[part], mask[part]))
            for part in parts
        ]
        return sum(values) / max(len(parts), 1)
    return {
        losses.ImportanceVariation: lambda: variation(mean(probs, mask)),
        losses.LoadVariation: lambda: variation(routed.counts),
        losses.RouterZ: lambda: mean(np.array([_logsumexp(z) ** 2 for z in routed.logits]), mask),
        losses.RouterEntropy: lambda: mean(entropy(probs), mask),
        losses.SelectorEntropy: lambda: mean(routed.selector_entropy, mask),
    }[type(loss)]()


def _logsumexp(z):
    return np.max(z) + np.log(np.sum(np.exp(z - np.max(z))))


# The layer


def routing(layer, x, mask, training=False, read=None, length=None, token_ids=None, logits=None):
    """The routing of tokens (T, D): weights, scores and what is served (T, E), counts (E,)."""
    router, read = layer.router, read or Weights()
    tokens = np.where(mask[:, None], x.reshape(len(x), math.prod(x.shape[1:])), 0.0)
    if logits is None:
        logits = logits_of(router, tokens, read)
    weights, probs, place = route_of(router, read, length or len(x), training, token_ids)(
        logits, mask
    )
    routed = SimpleNamespace(weights=weights, probs=probs, place=place, mask=mask)
    routed.raw_logits, routed.logits = logits, logits
    routed.chosen = place < 99
    routed.counts, routed.counted = np.sum(routed.chosen, axis=0), routed.chosen
    routed.selector_entropy = entropy(probs)
    if isinstance(router, routers.SoftRouter):
        sequences = len(x) // max(length or len(x), 1)
        routed.counts = np.full(router.num_experts, sequences * router.slots)
        slots = logits.reshape(len(x), router.num_experts, router.slots)
        routed.logits = np.array([[_logsumexp(z) for z in each] for each in slots])
        routed.logits = routed.logits.reshape(probs.shape)
    if isinstance(router, routers.DSelectKRouter):
        routed.logits = weights
        each = [np.sum(entropy(selectors_of(router, values))) for values in logits]
        routed.selector_entropy = np.array(each)
    if router.counted_by_weight:
        factor = np.sum(routed.chosen) / max(np.sum(weights), 1e-7)
        routed.counts, routed.counted = np.sum(weights, axis=0) * factor, weights
    routed.served = served_of(layer, routed, length, training)
    return routed


def mixture(
    layer, x, mask, training=False, read=None, length=None, still=None, token_ids=None, seen=None
):
    """Outputs (T, ...) of tokens (T, ...), the routing, and the router losses with their weights.

    `length` is that of sequences; `seen` (T, D'') is what the router sees instead of the tokens.
    Counts, which have no gradient, are those of the routing `still`.
    """
    read = read or Weights()
    routed = routing(layer, x if seen is None else seen, mask, training, read, length, token_ids)
    if still is not None:
        routed.counts, routed.counted = still.counts, still.counted
    experts, router = experts_of(layer.experts, read), layer.router
    x = np.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)
    size = 0.0  # of the largest term of a sum
    if isinstance(router, routers.SoftRouter):
        outputs = soft(layer, x, mask, length or len(x), experts, routed.raw_logits)
    else:
        outputs = np.zeros((len(x), *np.shape(experts[0](np.zeros(x.shape[1:])))))
        for t, e in np.argwhere(routed.served):
            each = routed.weights[t, e] * experts[e](x[t])
            outputs[t] += each
            size = max(size, np.max(np.abs(each)))
    if layer.shared_expert is not None:
        for t in np.flatnonzero(mask):
            each = of_layer(layer.shared_expert, x[t], read)
            if layer.shared_gate is not None:
                each = each * oracle.SCORES["sigmoid"](x[t] @ read(layer.shared_gate.kernel))
            outputs[t] += each
    values = [loss_of(loss, router, routed, length) for loss in layer.router_losses]
    total = sum(weight * each for weight, each in zip(layer.loss_weights_in_force, values))
    if isinstance(router, routers.ReLURouter):
        load = np.sum((routed.logits > 0) & mask[:, None], axis=0) / max(np.sum(mask), 1)
        share = load * router.num_experts / router.top_k
        strength = read(router.strength)
        total += strength * np.sum(share * mean(np.maximum(routed.logits, 0), mask))
    size = max(size, np.max(np.abs(outputs), initial=0.0))
    return SimpleNamespace(outputs=outputs, size=size, routed=routed, losses=values, total=total)


def soft(layer, x, mask, length, experts, logits):
    """A soft mixture of sequences of samples, by logits (T, E P)."""
    outputs = np.zeros((len(x), *np.shape(experts[0](np.zeros(x.shape[1:])))))
    for first in range(0, len(x), max(length, 1)):
        own = slice(first, first + length)
        made = oracle.soft_of_logits(x[own], logits[own], experts, layer.router.slots, mask[own])
        outputs[own] = made
    return outputs


def next_state(layer, routed, read=None):
    """The state of a router after a training step, by the names of its weights."""
    router, read = layer.router, read or Weights()
    balancer = getattr(router, "balancer", None)
    if isinstance(router, routers.ReLURouter):
        load = np.sum((routed.logits > 0) & routed.mask[:, None]) / max(np.sum(routed.mask), 1)
        error = np.sign(load - router.top_k) if np.any(routed.mask) else 0
        strength = read(router.strength) * router.growth ** (error / router.accumulation_steps)
        return {"strength": np.maximum(strength, router.initial_strength)}
    if balancer is None:
        return {}
    bias = read(router.selection_bias)
    if isinstance(balancer, routers.LossFreeBias):
        new = bias + balancer.rate * np.sign(np.mean(routed.counts) - routed.counts)
    else:
        scores = [oracle.SCORES[router.score](z) for z in routed.logits]
        new = bias if router.top_k < len(bias) else np.zeros(len(bias))
        if router.top_k < len(bias) and np.any(routed.mask):
            new = oracle.quantile_bias(np.array(scores), bias, router.top_k, routed.mask)
        new = balancer.momentum * bias + (1 - balancer.momentum) * new
    return {"selection_bias": new - np.mean(new)}
