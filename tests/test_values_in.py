"""What is known before compute is checked there: every public function has its bad calls here.

Each is refused by a ValueError or TypeError that says what was received. A function without a row
fails the last test, unless it is one of those that take nothing but checked objects.
"""

import copy
import functools
import inspect
import json
import re
from fractions import Fraction

import keras
import numpy as np
import pytest
from layer_checks import (
    ABSTRACT,
    CASES,
    OF_KERAS,
    D,
    E,
    array,
    constructor_arguments,
    moe,
    normal,
    plain,
)

from keras_moe import (
    activations,
    callbacks,
    health,
    inspection,
    layers,
    losses,
    metrics,
    ops,
    optimizers,
    routers,
    visualization,
)
from keras_moe.routers import balancers

NAN, INF = float("nan"), float("inf")
T, K = 6, 2
LOGITS = np.array(normal(T, E))
BAD_SIZES = [0, -1, 1.5, True, "2", NAN]
BAD_NUMBERS = [0, -1.0, NAN, INF, 1e300, True, "1"]
BAD_WEIGHTS = [-0.1, NAN, INF, 1e300, True, "0.1", None]
BAD_COUNTS = [
    "counts",
    None,
    {0: 1},
    [-1, 2, 3, 4],
    [NAN, 1, 1, 1],
    [INF, 1, 1, 1],
    [[1, 2], [3, 4]],
    3,
    [],
    ["a", "b"],
]
NO_MASK = [None, np.ones(T, "float32"), np.ones(T - 1, bool), keras.layers.Dense(3)]
BAD_MASKS = [np.ones((1, T), "float32"), np.ones((1, 3), bool), [[True] * T], [["a"] * T]]
BAD_MASKS += [np.array([["a"] * T]), keras.layers.Dense(3)]
BAD_INDICES = [[[0, E]], [[-2, 0]], [[0.0, 1.0]], [0, 1], [[[0, 1]]]]
# Functions of one tensor that are no activations, and functions of other arguments.
NOT_ELEMENTWISE = [
    lambda: 1.0,
    lambda x, y: x,
    lambda x: None,
    lambda x: "a",
    lambda x: 1.0,
    lambda x: x[..., :1],
    lambda x: x > 0,
]


def tensor(values, dtype=None):
    return keras.ops.convert_to_tensor(values, dtype)


def routing(top_k=K):
    return ops.top_k_routing(tensor(LOGITS), top_k)


def logits():
    return tensor(LOGITS)


def mask():
    return keras.ops.ones((T,), "bool")


def product(rows=None, kernels=None, sizes=(1, 2, 3, 0)):
    rows = normal(T, D) if rows is None else rows
    return ops.grouped_matmul(rows, normal(E, D, 3) if kernels is None else kernels, sizes)


def fed(**wrong):
    plan = ops.plan_groups(routing())
    arguments = {
        "tokens": tensor(normal(T, D)),
        "weights": plan.weights,
        "groups": plan.groups,
        "activation": keras.ops.relu,
        "up_kernels": [tensor(normal(E, D, 3))],
        "down_kernel": tensor(normal(E, 3, D)),
    }
    return ops.grouped_feed_forward(**{**arguments, **wrong})


def of_integers():
    """A cache with keys that are none."""
    cache = decoder().make_cache(1, 4)
    return {**cache, "keys": keras.ops.cast(cache["keys"], "int32")}


def made(**wrong):
    """A routing of one's own."""
    arguments = {"indices": np.zeros((T, E), "int32"), "weights": LOGITS, "probs": LOGITS}
    return ops.make_routing(**{**arguments, "logits": LOGITS, "mask": mask(), **wrong})


class OfOnesOwn(routers.Router):
    top_k = K

    def __init__(self, num_experts=None, returned=None, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.returned = returned

    def route(self, tokens, mask, training):
        return self.returned


def takes_two(counts, others):
    return 1.0


def own(base, **members):
    """A class of one's own."""
    return type("OfOnesOwn", (base,), members)


def routed_by(**members):
    router = own(routers.TopKRouter, **members)(E, K, balancer="loss_free", use_bias=True)
    return router(normal(T, D), training=True)


def planned_by(plan):
    router = own(routers.TopKRouter, plan=plan)
    return moe(router=router(E, K))(normal(T, D))


def built_with(returned):
    loss = own(losses.LoadBalance, build=lambda self, layer: returned)
    return moe(router_losses=[loss()])(normal(T, D))


def served_by(call=lambda self, tokens, plan: tokens, shape=lambda self, shape: shape):
    bank = own(layers.ExpertBank, call=call, compute_output_shape=shape)
    return moe(bank(E), shared_expert=keras.layers.Identity())(normal(T, D))


def without_constructor(base, attribute=None):
    """An object of a class that forgets `super().__init__()`, and may set an attribute."""

    def initialize(self):
        if attribute:
            object.__setattr__(self, attribute, E)

    return own(base, __init__=initialize)()


def of_kind(module, base):
    """The exported classes of a kind."""
    exported = [getattr(module, name) for name in module.__all__]
    return [each for each in exported if inspect.isclass(each) and issubclass(each, base)]


def begun(callback):
    callback.set_model(keras.Sequential([keras.Input((D,)), moe()]))
    callback.on_train_begin()


def telling_its_shape(function):
    """A layer that tells the shape of its inputs for that of its outputs."""
    members = {
        "call": lambda self, inputs: function(inputs),
        "build": lambda self, shape: None,
        "compute_output_shape": lambda self, shape: shape,
    }
    return own(keras.layers.Layer, **members)()


def advised(**advice):
    """A layer whose parts give some advice, by the name of the part."""
    members = {
        name: {"balance_advice": lambda self, *weight, text=text: text}
        for name, text in advice.items()
    }
    balancer = own(balancers.LossFreeBias, **members.get("balancer", {}))()
    router = own(routers.TopKRouter, **members.get("router", {}))(balancer=balancer)
    loss = own(losses.LoadBalance, **members.get("loss", {}))()
    return moe(router=router, router_losses=[loss]).balance_advice()


def changing(function):
    """A layer of which Keras finds out what it returns."""
    return own(keras.layers.Layer, call=lambda self, inputs: function(inputs))()


class Measured(balancers.SelectionBalancer):
    def __init__(self, measured, updated):
        super().__init__()
        self.measure = lambda routing, scores, bias: measured
        self.update = lambda bias, measured: updated


class Loss(losses.RouterLoss):
    def __init__(self, value):
        super().__init__(1.0)
        self.compute = lambda routing: value


def balanced(measured, updated):
    router = routers.TopKRouter(E, K, balancer=Measured(measured, updated))
    return router(normal(T, D), training=True)


def monitored(metric):
    model = keras.Sequential([keras.Input((D,)), moe()])
    model.compile("sgd", "mse")
    x = normal(2, D)
    model.fit(x, x, callbacks=[callbacks.ExpertMonitor(metrics=[metric])], verbose=0)


def compiled_metric():
    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(D)])
    model.compile("sgd", "mse", metrics=[metrics.LoadEntropy(E)])
    model.evaluate(normal(2, D), normal(2, D), verbose=0)


def returning(value):
    def metric(counts):
        return value

    return metric


def decoder():
    block = layers.TransformerDecoderBlock(2, moe())
    block.build((None, 3, D))
    return block


def attending():
    """A decoder block that was built for a context of 6 features."""
    block = layers.TransformerDecoderBlock(2, moe(), cross_attention=True)
    block.build((None, 2, D), (None, 5, 6))
    return block


def fitted(block):
    block.build((None, 3, D))
    return block


def setting(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def decode(position):
    block = decoder()
    return block(normal(1, 2, D), cache=block.make_cache(1, 4), position=position)


def bank(num_experts=E):
    return layers.FeedForwardExperts(num_experts, 3)


def hashed():
    return moe(router=routers.HashRouter(E, 9))


def encoder(feedforward=None):
    return layers.TransformerEncoderBlock(2, feedforward or moe())


def weighted(index=0, weight=0.5, built=False):
    layer = moe(router_losses=["load_balance"])
    if built:
        layer.build((None, D))
    return layer.set_router_loss_weight(index, weight)


def scheduled(schedule):
    model = keras.Sequential([keras.Input((D,)), moe(router_losses=["load_balance"])])
    model.compile("sgd", "mse")
    x = normal(2, D)
    model.fit(x, x, callbacks=[callbacks.RouterLossSchedule(schedule)], verbose=0)


def replay(indices):
    return routers.TopKRouter(E, K)(normal(T, D), indices=indices)


def layer_replay(indices):
    return moe()(normal(T, D), indices=indices)


TEXTS = np.array([["a"] * E] * T)
# Scores must be floats, of one expert at least.
BAD_SCORES = [TEXTS, np.ones((T, E), "int32"), np.ones((T, E), bool), np.zeros((T, 0), "f4"), None]


def shaped(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


WRONG_FIELDS = {
    "indices": [None, "abc", shaped(T, K), shaped(T, dtype="int32")],
    "weights": [None, "abc", shaped(T, K, dtype="int32"), shaped(T)],
    "probs": [None, "abc", shaped(T, E, dtype="int32"), shaped(T), shaped(T - 1, E)],
    "logits": [None, "abc", shaped(T, E, dtype="int32"), shaped(T), shaped(T - 1, E)],
    "mask": [None, "abc", shaped(T), shaped(T, 1, dtype="bool"), shaped(T - 1, dtype="bool")],
    "counts": [None, "abc", shaped(E, 1), np.array(["a"] * E)],
    "load": [None, "abc", shaped(E, 1), shaped(E, dtype="int32")],
}


def forged(*fields, **kept):
    """Routings with one field that does not belong there."""
    return [
        routing()._replace(**kept, **{field: value})
        for field in fields
        for value in WRONG_FIELDS[field]
    ]


def forged_groups(groups):
    """Groups with one field that does not belong there."""
    return [
        groups._replace(**{field: value})
        for field in groups._fields
        for value in (None, "abc", shaped(2, 2, 2, 2, dtype="int32"), shaped())
    ]


DUPLICATED = [[0, 0]] * T
REPLAYED = [*BAD_INDICES, DUPLICATED, [[0, 1]], [[0.0, 1.0]] * T, [[0, E]] * T, [[-2, 0]] * T]
PATH = "visualization"


def built(layer):
    layer.build((None, D))
    return layer


def with_lora(cls, **config):
    """A layer as from a file that says so."""
    return cls.from_config({**plain(cls).get_config(), **config})


# The function, how it is called with a bad value, and bad values.
FUNCTIONS = {
    "enable_lora": [
        (lambda v: built(routers.TopKRouter(E)).enable_lora(v), BAD_SIZES),
        (lambda v: built(routers.TopKRouter(E)).enable_lora(2, lora_alpha=v), BAD_NUMBERS),
        (lambda v: built(layers.GatedExperts(E, 3)).enable_lora(v), BAD_SIZES),
        (lambda v: built(layers.GatedExperts(E, 3)).enable_lora(2, lora_alpha=v), BAD_NUMBERS),
        (lambda v: with_lora(layers.GatedExperts, lora_rank=v), BAD_SIZES),
        (lambda v: with_lora(routers.TopKRouter, lora_rank=2, lora_alpha=v), BAD_NUMBERS),
    ],
    "ops.grouped_matmul": [
        (lambda v: product(sizes=v), [[1, -1, 2, 1], [3, 3, 3, 3], [1.0, 2.0, 3.0, 0.0]]),
        (lambda v: product(sizes=v), [[NAN, 1, 1, 1], [[1, 2, 3, 0]], [True] * E, [1, 2]]),
        (lambda v: product(sizes=tensor(v)), [[1.0, 2.0, 3.0, 0.0]]),
        (lambda v: product(rows=v), [np.ones((T, D), "int32"), np.ones((T, D), bool)]),
        (lambda v: product(sizes=v), [None, "1230", [2, 0, 4, 10**12]]),
        (lambda v: product(rows=v), ["rows", [None]]),
        (lambda v: product(kernels=v), [np.ones((E, D, 3), "int32"), np.ones((E, D + 1, 3))]),
    ],
    "ops.top_k_routing": [
        (lambda v: ops.top_k_routing(logits(), v), [*BAD_SIZES, E + 1]),
        (lambda v: ops.top_k_routing(logits(), K, scale=v), BAD_NUMBERS),
        (lambda v: ops.top_k_routing(logits(), K, score=v), ["soft", None, ["softmax"], 1]),
        (lambda v: ops.top_k_routing(logits(), K, renormalize=v), ["yes", 2]),
        (lambda v: ops.top_k_routing(logits(), K, select=v), ["top", lambda scores: None]),
        (lambda v: ops.top_k_routing(logits(), K, select=v), [lambda: 1, lambda scores, k: scores]),
        (
            lambda v: ops.top_k_routing(logits(), K, select=lambda scores: v),
            [np.zeros((T, K + 1), "int32"), np.zeros((T - 1, K), "int32"), LOGITS[:, :K]],
        ),
        (lambda v: ops.top_k_routing(v, 1), [None, "logits"]),
        (lambda v: ops.top_k_routing(tensor(v), 1), [np.ones(E, "float32"), np.ones((T, E), int)]),
    ],
    "ops.top_k_indices": [
        (lambda v: ops.top_k_indices(logits(), v), [*BAD_SIZES, E + 1]),
        (lambda v: ops.top_k_indices(tensor(v), 1), [np.ones(E, "float32")]),
    ],
    "ops.group_limited_scores": [
        (lambda v: ops.group_limited_scores(logits(), v, 1), [*BAD_SIZES, 3]),
        (lambda v: ops.group_limited_scores(logits(), 2, v), [*BAD_SIZES, 3]),
    ],
    "ops.expert_choice_routing": [
        (lambda v: ops.expert_choice_routing(logits(), v), BAD_NUMBERS),
        (lambda v: ops.expert_choice_routing(logits(), 1.0, sequence_length=v), [*BAD_SIZES, 4]),
    ],
    "ops.soft_routing": [
        (lambda v: ops.soft_routing(logits(), v), [*BAD_SIZES, 3]),
        (lambda v: ops.soft_routing(logits(), E, sequence_length=v), [*BAD_SIZES, 4]),
    ],
    "ops.sequence_load_balance": [
        (lambda v: ops.sequence_load_balance(routing(), v), [*BAD_SIZES, 4]),
    ],
    "ops.sinkhorn_plan": [
        (lambda v: ops.sinkhorn_plan(logits(), mask(), v), BAD_SIZES),
        (lambda v: ops.sinkhorn_plan(logits(), v, 1), NO_MASK),
    ],
    "ops.balanced_assignment": [
        (lambda v: ops.balanced_assignment(logits(), v), NO_MASK),
        (lambda v: ops.balanced_assignment(tensor(v), mask()), [np.ones(T, "float32")]),
    ],
    "ops.noisy_load": [
        (lambda v: ops.noisy_load(logits(), logits(), 1.0, v, mask()), [*BAD_SIZES, E + 1]),
        (lambda v: ops.noisy_load(logits(), logits(), v, K, mask()), BAD_NUMBERS),
        (lambda v: ops.noisy_load(logits(), v, 1.0, K, mask()), [None, LOGITS[:, :3]]),
        (lambda v: ops.noisy_load(logits(), logits(), 1.0, K, v), [None, np.ones(5, bool)]),
    ],
    "ops.expert_capacity": [
        (lambda v: ops.expert_capacity(v, E, K, 1.0), [-1, 8.0, np.float32(8), True, "8", None]),
        (lambda v: ops.expert_capacity(v, E, K, 1.0), [int]),
        (lambda v: ops.expert_capacity(T, v, K, 1.0), BAD_SIZES),
        (lambda v: ops.expert_capacity(T, E, v, 1.0), [*BAD_SIZES, E + 1]),
        (lambda v: ops.expert_capacity(T, E, K, v), BAD_NUMBERS),
    ],
    "ops.plan_groups": [
        (lambda v: ops.plan_groups(routing(), v), BAD_SIZES),
        (lambda v: ops.plan_groups(routing(), tensor(v)), [1.5]),
        (lambda v: ops.plan_groups(routing(), 1, first=tensor(v)), [[0.5] * 3, [[0.5]] * T]),
        (lambda v: ops.plan_groups(routing(), 1, sequence_length=v), [*BAD_SIZES, 4]),
        (lambda v: ops.plan_groups(routing(), np.array(v)), [[1, 2]]),
        (lambda v: ops.plan_groups(routing()._replace(weights=v)), [None, LOGITS]),
        (lambda v: ops.plan_groups(routing()._replace(indices=v)), [np.zeros(T, "int32")]),
        (lambda v: ops.plan_groups(routing()._replace(indices=tensor(v))), [np.ones((T, K), "f4")]),
    ],
    "ops.make_routing": [
        (
            lambda v: ops.make_routing(tensor(v), logits(), logits(), logits(), mask()),
            [np.ones((T, E), "float32"), np.ones((T, E), bool), np.ones((T, K), "int32")],
        ),
        (lambda v: made(**v), [{"weights": LOGITS[:3]}, {"probs": LOGITS[:, :3]}, {"mask": None}]),
        (lambda v: made(**v), [{"counts": [1, 2]}, {"load": "x"}, {"logits": LOGITS[0]}]),
        (lambda v: made(details=v), [3, LOGITS]),
        (lambda v: made(indices=v), [None, np.full((T, E), E), np.full((T, E), -2)]),
    ],
    "ops.clean_logits": [
        (lambda v: ops.clean_logits(logits(), tensor(v)), [[True] * 5, [[True] * E] * T]),
        (lambda v: ops.clean_logits(logits(), tensor(v)), [[1.0] * T]),
        (ops.clean_logits, [LOGITS[0], LOGITS[None]]),
    ],
    "ops.take_scores": [
        (lambda v: ops.take_scores(logits(), v), [np.full((T, K), E), np.full((T, K), -2)]),
        (lambda v: ops.take_scores(logits(), v), [None, np.zeros((T - 1, K), "int32"), LOGITS]),
        (lambda v: ops.take_scores(v, np.zeros((T, K), "int32")), [None, np.ones(T, "float32")]),
    ],
    "ops.grouped_feed_forward": [
        (lambda v: fed(**v), [{"tokens": np.ones((T - 1, D), "f4")}, {"tokens": None}]),
        (lambda v: fed(**v), [{"weights": np.ones((T, K + 1), "f4")}, {"weights": None}]),
        (lambda v: fed(groups=v), [None, ops.plan_groups(routing())]),
        (lambda v: fed(activation=v), [None, "relu", lambda x: x[:, :2]]),
        (lambda v: fed(up_kernels=v), [[], np.ones((E, D, 3)), [np.ones((E - 1, D, 3), "f4")]]),
        (lambda v: fed(up_kernels=[np.ones(v, "f4")]), [(E, D + 1, 3), (E, D, 4), (E, D)]),
        (lambda v: fed(biases=v), [[np.ones((E, 3), "f4")], [np.ones((E, 2), "f4")] * 2]),
        (lambda v: fed(clip=v), [*BAD_NUMBERS, 1.0]),
        (lambda v: fed(up_shift=v), ["1", NAN]),
        (lambda v: fed(up_shift=v), [1.0]),
        (lambda v: fed(low_rank=v), [3]),
        (lambda v: fed(expert_axis=v), [3]),
        (lambda v: fed(biases=v), [3, "ab"]),
        (lambda v: fed(activation=v), [keras.layers.Dense(3), *NOT_ELEMENTWISE]),
        (lambda v: fed(**{v: np.ones((T, D), "int32")}), ["tokens"]),
        (lambda v: fed(down_kernel=v), [None, np.ones((E, 3, D), "int32")]),
    ],
    "ops.agreement": [
        (lambda v: ops.agreement(np.ones(v), tensor(LOGITS)), [E, (T, E - 1)]),
        (lambda v: ops.agreement(v, LOGITS), [TEXTS, np.ones((T, E), bool), None]),
        (lambda v: ops.agreement(LOGITS, v), [TEXTS, np.ones((T, E), "int32"), None]),
        (lambda v: ops.agreement(v, v), [np.float32(1)]),
    ],
    "ops.masked_mean": [
        (lambda v: ops.masked_mean(logits(), tensor(v)), [[True] * 5, [1.0] * T, [[True]] * T]),
        (lambda v: ops.masked_mean(logits(), v), ["no", [True] * T]),
        (lambda v: ops.masked_mean(v, mask()), [TEXTS, np.float32(3), None]),
    ],
    "ops.plan_expert_choice": [
        (ops.plan_expert_choice, [None, routing(), ops.soft_routing(logits(), E)]),
    ],
    "ops.plan_soft": [
        (ops.plan_soft, [None, routing(), ops.expert_choice_routing(logits(), 1.0)]),
    ],
    "ops.platform": [(ops.platform, ["xpu", None, 1, ["cpu"]])],
    "metrics.load_imbalance": [(metrics.load_imbalance, BAD_COUNTS)],
    "metrics.load_entropy": [(metrics.load_entropy, BAD_COUNTS)],
    "metrics.dead_experts": [(metrics.dead_experts, BAD_COUNTS)],
    "metrics.expert_share": [(metrics.expert_share, BAD_COUNTS)],
    "metrics.load_variation": [(metrics.load_variation, BAD_COUNTS)],
    "metrics.max_share": [(metrics.max_share, BAD_COUNTS)],
    "metrics.active_fraction": [(metrics.active_fraction, BAD_COUNTS)],
    "metrics.utilization_quantiles": [
        (metrics.utilization_quantiles, BAD_COUNTS),
        (lambda v: metrics.utilization_quantiles([1, 2], v), [None, "median", ["0.5"]]),
        (lambda v: metrics.utilization_quantiles([1, 2], v), [[], [[0.5]]]),
        (lambda v: metrics.utilization_quantiles([1, 2], v), [[-0.1], [1.1], [NAN], [25, 50]]),
    ],
    "metrics.dead_experts_over_window": [
        (metrics.dead_experts_over_window, [[1, 2], [[-1, 2]], [[NAN, 1]], 3]),
        (lambda v: metrics.dead_experts_over_window(np.ones((3, E)), v), BAD_SIZES),
    ],
    "metrics.dropped_fraction": [
        (lambda v: metrics.dropped_fraction(0, v), BAD_COUNTS),
        (lambda v: metrics.dropped_fraction(v, [1, 2]), [-1, NAN, INF, 7, [1], None, "1", 1j]),
    ],
    "metrics.count_table": [
        (lambda v: metrics.count_table(routing(), v, 2), [[0] * 5, [2] * T, [-1] * T, [0.0] * T]),
        (
            lambda v: metrics.count_table(routing(), v, 2),
            [[NAN] * T, ["a"] * T, [[0] * T], 0, None],
        ),
        (lambda v: metrics.count_table(routing(), [0] * T, v), BAD_SIZES),
    ],
    "metrics.mutual_information": [
        (metrics.mutual_information, [[1, 2], [[-1, 2]], [[NAN, 1]], 3, [[INF, 1]]]),
    ],
    "metrics.router_saturation": [
        (
            lambda v: metrics.router_saturation(routing(), v),
            [None, ops.top_k_routing(LOGITS[:3], 1), ops.top_k_routing(LOGITS[:, :3], 1)],
        ),
        (lambda v: metrics.router_saturation(v, routing()), [None]),
    ],
    "metrics.unserved_fraction": [
        (lambda v: metrics.unserved_fraction(v, ops.plan_groups(routing())), [None]),
        (lambda v: metrics.unserved_fraction(routing(), v), [None, routing()]),
        (
            lambda v: metrics.unserved_fraction(
                routing(), ops.plan_groups(routing())._replace(**v)
            ),
            [
                {"groups": None},
                {"groups": ops.plan_groups(ops.top_k_routing(LOGITS[:3], K)).groups},
            ],
        ),
    ],
    "metrics.expert_saliency": [
        (lambda v: metrics.expert_saliency(moe(router=v), normal(T, D)), ["soft", "expert_choice"]),
        (lambda v: metrics.expert_saliency(v, normal(T, D)), [None, keras.layers.Dense(3)]),
    ],
    "health.spread": [
        (lambda v: health.spread(v, K), BAD_COUNTS),
        (lambda v: health.spread([1, 2, 3], v), [*BAD_SIZES, 4]),
    ],
    "health.judge_load": [
        (lambda v: health.judge_load(v, K, ""), BAD_COUNTS),
        (lambda v: health.judge_load([100] * E, v, ""), [*BAD_SIZES, E + 1]),
        (lambda v: health.judge_load([100] * E, K, v), [None, 3]),
    ],
    "health.dead": [
        (lambda v: health.dead(v, E, ""), ["12", 3, None, [E], [0.5], [-1]]),
        (lambda v: health.dead([0], v, ""), BAD_SIZES),
        (lambda v: health.dead([0], E, v), [None, 3]),
        (lambda v: health.dead([0], E, "", v), [None, 3]),
    ],
    "health.exploded": [(health.exploded, [None, 3])],
    "health.judge_drops": [(health.judge_drops, [True, -0.1, 7.0, NAN, INF, None, "0.1"])],
    "health.judge_router": [
        (lambda v: health.judge_router(v, 1.0), [-0.1, 7.0, NAN, INF, None, "0.1"]),
        (lambda v: health.judge_router(0.5, v), [-1.0, None, "1"]),
    ],
    "health.judge_weak_loss": [
        (lambda v: health.judge_weak_loss(v, 0.1), [None, "load_balance"]),
        (lambda v: health.judge_weak_loss(losses.LoadBalance(), v), [None, "0.1", NAN, -1.0]),
    ],
    "health.judge_heavy_losses": [
        (lambda v: health.judge_heavy_losses(v, [0.1], 1.0), [[None], [], None]),
        (
            lambda v: health.judge_heavy_losses([losses.LoadBalance()], v, 1.0),
            [["a"], None, [NAN], [-1.0]],
        ),
        (lambda v: health.judge_heavy_losses([losses.LoadBalance()], [0.1], v), ["big"]),
    ],
    "health.collapsed": [
        (lambda v: health.collapsed(v, ""), [*BAD_COUNTS, [0, 0]]),
        (lambda v: health.collapsed([1, 2], v), [None, 3]),
    ],
    "health.is_enough": [(health.is_enough, BAD_COUNTS)],
}

OF_SCORES = {
    "ops.balanced_assignment": lambda v: ops.balanced_assignment(v, mask()),
    "ops.clean_logits": ops.clean_logits,
    "ops.expert_choice_routing": lambda v: ops.expert_choice_routing(v, 1.0),
    "ops.group_limited_scores": lambda v: ops.group_limited_scores(v, 2, 1),
    "ops.noisy_load": lambda v: ops.noisy_load(v, v, 1.0, K, mask()),
    "ops.sinkhorn_plan": lambda v: ops.sinkhorn_plan(v, mask(), 3),
    "ops.soft_routing": lambda v: ops.soft_routing(v, E),
    "ops.take_scores": lambda v: ops.take_scores(v, np.zeros((T, K), "int32")),
    "ops.top_k_indices": lambda v: ops.top_k_indices(v, 1),
    "ops.top_k_routing": lambda v: ops.top_k_routing(v, 1),
}
for name, function in OF_SCORES.items():
    FUNCTIONS[name].append((function, BAD_SCORES))

# What each function reads of a routing.
READS = {
    "ops.load_balance": (ops.load_balance, "probs mask counts"),
    "ops.plan_groups": (ops.plan_groups, "indices weights mask counts"),
    "ops.router_entropy": (ops.router_entropy, "probs mask"),
    "ops.router_z": (ops.router_z, "logits mask"),
    "ops.sequence_load_balance": (
        lambda v: ops.sequence_load_balance(v, 3),
        "indices probs mask counts",
    ),
    "ops.squared_importance_variation": (ops.squared_importance_variation, "probs mask"),
    "ops.squared_load_variation": (ops.squared_load_variation, "load"),
    "metrics.coactivation": (metrics.coactivation, "indices mask counts"),
    "metrics.count_table": (
        lambda v: metrics.count_table(v, [0] * T, 2),
        "indices mask counts",
    ),
    "metrics.router_confidence": (metrics.router_confidence, "probs mask"),
    "metrics.router_entropy": (metrics.router_entropy, "probs mask"),
    "metrics.router_saturation": (
        lambda v: metrics.router_saturation(routing(), v),
        "indices mask counts",
    ),
    "metrics.unserved_fraction": (
        lambda v: metrics.unserved_fraction(v, ops.plan_groups(routing())),
        "mask",
    ),
}
for name, (function, fields) in READS.items():
    FUNCTIONS.setdefault(name, []).append((function, forged(*fields.split())))

NO_ROUTING = [None, LOGITS, (LOGITS, None)]
for name in [
    *("load_balance", "plan_groups", "router_entropy", "router_z"),
    *("squared_importance_variation", "squared_load_variation"),
]:
    FUNCTIONS.setdefault(f"ops.{name}", []).append((getattr(ops, name), NO_ROUTING))
for name in ("coactivation", "router_confidence", "router_entropy"):
    FUNCTIONS[f"metrics.{name}"].append((getattr(metrics, name), NO_ROUTING))

visualized = [
    *BAD_INDICES[1:],
    [["a"]],
]
PLOTS = {
    "visualization.specialization": [
        (lambda v: visualization.specialization(np.array(v), [0]), visualized),
        (lambda v: visualization.specialization(np.array([[0], [1]]), v), [[0, 1, 2], [], 3]),
        (lambda v: visualization.specialization(np.array([[0], [1]]), [0, 2], v), [["a", "b"]]),
        (lambda v: visualization.specialization(np.array([[0], [1]]), ["a", "b"], v), [["a"]]),
        (
            lambda v: visualization.specialization(np.array([[0], [1]]), v),
            [[0.5, 1.5], [None, None], [NAN, 0], ["a", 1], [-1, -1], [0, 10**9], {0: 1}],
        ),
        (
            lambda v: visualization.specialization(np.array([[0], [1]]), [0, 1], v),
            ["ab", 3, [None, "b"]],
        ),
        (lambda v: visualization.specialization(np.array([[0], [1]]), [0, 1], num_experts=v), [1]),
    ],
    "visualization.coactivation": [
        (
            lambda v: visualization.coactivation(routing()._replace(**v)),
            [{"indices": tensor([[0, E]] * T)}, {"counts": tensor([-1] * E)}],
        ),
        (visualization.coactivation, [[routing(), ops.top_k_routing(LOGITS[:, :3], K)]]),
        (lambda v: visualization.coactivation(np.array(v)), visualized),
        (lambda v: visualization.coactivation(np.array([[0, 1]]), v), [*BAD_SIZES, 1, 10**9]),
        (visualization.coactivation, [[[0, 1], [2]], np.zeros((0, 2), int), [[0, 10**9]]]),
        (lambda v: visualization.coactivation([routing()], v), [E - 1, E + 1, "4", LOGITS]),
    ],
    "visualization.confidence": [
        (lambda v: visualization.confidence(np.array(v)), [[0.5, 0.5], [[NAN, 1.0]], [[7.0]]]),
        (lambda v: visualization.confidence(np.array(v)), [[[-0.5, 0.5]], [[1, 0]], [["a"]]]),
        (visualization.confidence, forged("probs", "mask")),
        (
            lambda v: visualization.confidence(routing()._replace(probs=tensor(LOGITS * 0 + v))),
            [NAN, 2.0, -1.0],
        ),
        (visualization.confidence, [keras.Input((E,))]),
    ],
    "visualization.shares_over_time": [
        (visualization.shares_over_time, [[1, 2], [[-1, 2]], [[NAN, 1.0]], [], {}]),
        (lambda v: visualization.shares_over_time([[1, 2]], v), [-1, 0.5, None, "1", True]),
    ],
    "visualization.settling": [
        (visualization.settling, [None, {"moe": [1, 2]}, np.zeros((2, 2), int)]),
        (visualization.settling, [[], [np.zeros((2, 1), int)]]),
        (visualization.settling, [[np.zeros((2, 1), int), np.zeros((3, 1), int)]]),
        (visualization.settling, [[{"a": np.zeros((2, 1), int)}, {"b": np.zeros((2, 1), int)}]]),
    ],
}

GROUPED = ops.plan_groups(routing())
TO_ONE_EXPERT = ops.plan_groups(ops.top_k_routing(LOGITS[:, :1], 1))
CHOSEN = ops.plan_expert_choice(ops.expert_choice_routing(logits(), 1.0))
CHOICES = ops.expert_choice_routing(logits(), 1.0).details
SLOTS = ops.plan_soft(ops.soft_routing(logits(), E))
FEW_ROWS = shaped(3, dtype="int32")
WRONG_WEIGHTS = [None, "w", shaped(T, K + 1), shaped(T - 1, K), shaped(T, K, dtype="int32")]
BANKS = [
    bank,
    lambda: layers.LayerExperts([keras.layers.Dense(D)]),
    lambda: layers.ZeroComputationExperts(bank(), num_zero=1),
]
BAD_SHAPES = [5, "x", (None, None), (None, 0), (None, 2.5), (None, -8)]
A_LAYER = keras.layers.Dense(3)  # It has a dtype, as tensors have.
BAD_TRAINING = ["yes", "", 3, 0.0, [True], A_LAYER, tensor([True, False])]
BAD_LENGTHS = [0, -1, 2.5, "2", True, 4, tensor(1.5), int, np.array([3]), TEXTS]
ROUTERS = [
    router
    for name in routers.__all__
    if inspect.isclass(router := getattr(routers, name))
    and issubclass(router, routers.Router)
    and router not in ABSTRACT
]


def routed(cls, name, value):
    """A call of any router with an argument that it may ignore."""
    arguments = {"token_ids": np.zeros(T, "int32"), name: value}
    return plain(cls)(normal(T, D), **arguments)


def dispatched(plan, groups):
    return plan._replace(groups=groups).dispatch(normal(T, D))


def combined(plan, groups):
    return plan._replace(groups=groups).combine(normal(T * K, D))


def served_by_a_bank(plan, groups):
    return bank()(normal(T, D), plan._replace(groups=groups))


def measured(balancer, place, value):
    arguments = [routing(), LOGITS, shaped(E)]
    arguments[place] = value
    return balancer.measure(*arguments)


# Neither activations nor initializers nor regularizers.
OTHER_OBJECTS = [5, ["l2"], {}, {"class_name": "Foo"}, True, "", "deserialize", b"relu"]
OTHER_OBJECTS += [keras.layers.Dense(3), keras.layers.Dense]
BAD_ACTIVATIONS = [*NOT_ELEMENTWISE, *OTHER_OBJECTS, "sillu", np.ones(3)]
BAD_INITIALIZERS = [
    *OTHER_OBJECTS,
    "glorot",
    lambda: 1.0,
    lambda shape: np.ones(shape),
    lambda shape, dtype=None: np.ones(3, "f4"),
    lambda shape, dtype=None: None,
    lambda shape, dtype=None: "a",
    lambda shape, dtype=None: np.full(shape, "a"),
    keras.regularizers.L2(),
]
BAD_REGULARIZERS = [*OTHER_OBJECTS, "l3", lambda: 1.0, keras.initializers.Zeros(), np.ones(3)]
# What a layer of tokens is not.
NOT_OF_TOKENS = [
    keras.layers.Dense,
    "dense",
    lambda x: x,
    keras.layers.Embedding(5, D),
    keras.layers.LSTM(D),
    keras.layers.Conv2D(D, 3),
    keras.layers.MultiHeadAttention(2, 4),
    routers.TopKRouter(E),
    *map(changing, [lambda x: [x, x], lambda x: x[..., 0], lambda x: x[:, :1]]),
]
OF_A_LAYER = ["inputs", "mask", "training", "return_routing", "token_ids", "indices"]
OF_A_LAYER.append("router_inputs")
OF_A_BLOCK = ["inputs", "mask", "training", "token_ids"]
OF_A_ROUTER = ["tokens", "mask", "training", "sequence_length", "token_ids", "indices"]
# Not what a layer returns that tells the shape of its inputs.
NOT_AS_TOLD = [
    lambda x: keras.ops.cast(x, "int32"),
    lambda x: x > 0,
    lambda x: None,
    lambda x: [x],
    lambda x: 1.0,
    lambda x: x[:0],
    lambda x: x[..., :1],
]
NO_FLOATS = [None, "a", [1.0], True, np.ones((), "int32")]
NO_SCALARS = [*NO_FLOATS, np.ones(2, "f4")]
LARGE = np.arange(10000.0).reshape(100, 100)
BAD_FLAGS = ["no", "False", 1, 0, 0.0, [True], NAN]
BAD_SEEDS = ["0", 1.5, -1, True, NAN, [1], 2**40]
FLAGS = {
    "use_bias": lambda v: layers.FeedForwardExperts(E, 2, use_bias=v),
    "use_bias of gated experts": lambda v: layers.GatedExperts(E, 2, use_bias=v),
    "use_bias of a gated feed-forward": lambda v: layers.GatedFeedForward(2, use_bias=v),
    "use_bias of a router": lambda v: routers.TopKRouter(E, use_bias=v),
    "gated_shared_expert": lambda v: moe(
        shared_expert=keras.layers.Dense(D), gated_shared_expert=v
    ),
    "per_sequence": lambda v: layers.Capacity(1.0, per_sequence=v),
    "cross_attention": lambda v: layers.TransformerDecoderBlock(2, moe(), cross_attention=v),
    "rotary": lambda v: layers.TransformerDecoderBlock(2, moe(), rotary=v),
    "renormalize": lambda v: routers.TopKRouter(E, renormalize=v),
    "stop": lambda v: callbacks.ExpertHealth(stop=v),
    "rebalance": lambda v: callbacks.ExpertHealth(rebalance=v),
    "expert_shares": lambda v: callbacks.ExpertMonitor(expert_shares=v),
}
METHODS = {
    **{name: [(make, BAD_FLAGS)] for name, make in FLAGS.items()},
    "training": [
        *((functools.partial(routed, cls, "training"), BAD_TRAINING) for cls in ROUTERS),
        (lambda v: moe()(normal(T, D), training=v), BAD_TRAINING),
        (lambda v: encoder()(normal(1, T, D), training=v), BAD_TRAINING),
        (lambda v: decoder()(normal(1, T, D), training=v), BAD_TRAINING),
        (lambda v: layers.Capacity(1.0).limits(routing(), None, v, None), BAD_TRAINING),
    ],
    # Whether a router uses them or not.
    "sequence_length": [
        *((functools.partial(routed, cls, "sequence_length"), BAD_LENGTHS) for cls in ROUTERS),
        (lambda v: layers.Capacity(1.0).limits(routing(), v, True, None), BAD_LENGTHS),
        (lambda v: losses.SequenceLoadBalance()(routing(), sequence_length=v), BAD_LENGTHS),
        (lambda v: losses.SequenceLoadBalance().compute(v), NO_ROUTING),
    ],
    "token_ids": [
        (functools.partial(routed, cls, "token_ids"), [np.ones(T, "f4"), np.ones(3, int), "ids"])
        for cls in ROUTERS
    ],
    "fields of a routing": [
        (lambda v: metrics.LoadEntropy(E).update_state(v), forged("counts")),
        (
            lambda v: metrics.LoadEntropy(E).update_state(routing()._replace(dropped=v)),
            [None, "0", 0.5],
        ),
    ],
    "a routing for a router": [
        (lambda v: routers.TopKRouter(E, K).plan(v), forged("indices", "weights")),
        (lambda v: routers.SoftRouter(E).plan(v), [routing()]),
        (lambda v: routers.SoftRouter(E).plan(routing(), capacity=v), [1]),
        (lambda v: routers.ExpertChoiceRouter(E).plan(routing(), capacity=v), [1]),
        (lambda v: routers.ExpertChoiceRouter(E).plan(v), [routing()]),
    ],
    "groups of a plan": [
        *(
            (functools.partial(call, plan), [None, "groups", *forged_groups(plan.groups)])
            for plan in (GROUPED, CHOSEN)
            for call in (dispatched, combined, served_by_a_bank)
        ),
        (lambda v: fed(groups=v), forged_groups(GROUPED.groups)),
        (lambda v: v.sort(), forged_groups(ops.Assignments.of(routing().indices, E))),
        (lambda v: v.sort(), forged_groups(ops.Choices(*CHOICES, mask()))),
        (lambda v: dispatched(GROUPED, GROUPED.groups._replace(assignment_of_row=v)), [FEW_ROWS]),
    ],
    "weights of a plan": [
        (lambda v: combined(GROUPED._replace(weights=v), GROUPED.groups), WRONG_WEIGHTS),
        (lambda v: bank()(normal(T, D), GROUPED._replace(weights=v)), WRONG_WEIGHTS),
    ],
    "rows of a plan": [
        (GROUPED.combine, [normal(3, D), np.ones((T * K, D), "int32"), np.array([["a"] * D] * 12)]),
        (GROUPED.dispatch, [np.ones((T, D), "int32"), np.array([["a"] * D] * T)]),
    ],
    "slots of a plan": [
        (lambda v: SLOTS._replace(back=v).run(bank(), normal(T, D)), [None, shaped(1, T, 3)]),
        (lambda v: SLOTS.run(bank(v), normal(T, D)), [3]),
        (SLOTS.dropped_fraction, [None, shaped(E, 1)]),
    ],
    "assignments": [
        (lambda v: ops.Assignments.of(v, E), [None, shaped(T, K), shaped(T, dtype="int32")]),
        (lambda v: ops.Assignments.of(routing().indices, v), BAD_SIZES),
    ],
    "a balancer of the package": [
        call
        for balancer in (balancers.LossFreeBias(), balancers.QuantileBias())
        for call in (
            (functools.partial(measured, balancer, 0), [*NO_ROUTING, *forged("indices", "counts")]),
            (functools.partial(measured, balancer, 1), [None, "s", shaped(T, E - 1), shaped(E)]),
            (functools.partial(measured, balancer, 2), [None, "b", shaped(E - 1), shaped(1, E)]),
            (functools.partial(balancer.update, shaped(E)), [None, "m", shaped(E - 1)]),
            (lambda v, b=balancer: b.update(v, shaped(E)), [None, "b", shaped(1, E)]),
        )
    ],
    "a layer for a loss": [
        (losses.GlobalLoadBalance().build, [None, "moe", keras.layers.Dense(3)])
    ],
    "weight for advice": [(losses.LoadBalance().balance_advice, BAD_WEIGHTS)],
    "top_k of a capacity": [(layers.Capacity(1.0).is_causal, [*BAD_SIZES, None])],
    "num_experts of a layer": [(lambda v: routers.get("top_k", v), [*BAD_SIZES, None])],
    "vocabulary_size": [(lambda v: routers.HashRouter(E, v), [*BAD_SIZES, 10**12])],
    "shape for a bank": [
        (
            lambda v, make=make, name=name: getattr(make(), name)(v),
            [5, "x", (None, None), (None, 0)],
        )
        for make in BANKS
        for name in ("build", "compute_output_shape")
    ],
    "engine of a bank": [
        (lambda v: built(bank()).engine_on(v, True), ["xpu", None]),
        (lambda v: built(bank()).engine_on("cpu", v), BAD_FLAGS),
        (
            lambda v: v.engine_on("cpu", True),
            [bank(), layers.LayerExperts([keras.layers.Dense(D)])],
        ),
    ],
    "kernel of a bank": [(lambda v: built(bank()).merged_kernel(v), ["side", None, 0])],
    "inputs of a gated feed-forward": [
        (lambda v: layers.GatedFeedForward(2)(v), [np.ones((T, D), "int32")]),
    ],
    "inputs of an activation": [(activations.quick_gelu, [None, "x", np.ones(3, "int32")])],
    "seed": [
        (lambda v: routers.TopKRouter(E, seed=v), BAD_SEEDS),
        (lambda v: routers.HashRouter(E, 9, seed=v), BAD_SEEDS),
        (lambda v: routers.ForcedRouter(E, seed=v), BAD_SEEDS),
    ],
    "mask": [
        (lambda v: moe()(normal(1, T, D), mask=v), BAD_MASKS),
        (
            lambda v: routers.TopKRouter(E)(normal(T, D), mask=v[0]),
            BAD_MASKS[:-1],
        ),
        (lambda v: encoder()(normal(1, T, D), mask=v), BAD_MASKS),
    ],
    "dtype": [
        (lambda v: layers.FeedForwardExperts(E, 2, dtype=v), ["int32", "bool"]),
        (lambda v: layers.GatedFeedForward(2, dtype=v), ["int32"]),
        (lambda v: moe(dtype=v), ["int32"]),
        (lambda v: layers.TransformerEncoderBlock(2, moe(), dtype=v), ["int32"]),
    ],
    "return_routing": [
        (lambda v: moe()(normal(T, D), return_routing=v), BAD_FLAGS),
    ],
    "compute_output_shape": [(lambda v: moe().compute_output_shape(v), [5, "abc", (3,)])],
    "build": [(lambda v: routers.TopKRouter(E).build(v), [5, (3,), (None, None)])],
    "shape for a layer of tokens": [
        (lambda v, make=make, name=name: getattr(make(), name)(v), [5, "x", (None, 3, None)])
        for make in (
            encoder,
            lambda: layers.TransformerDecoderBlock(2, moe()),
            lambda: layers.GatedFeedForward(2),
        )
        for name in ("build", "compute_output_shape")
    ],
    "limits": [(lambda v: layers.Capacity(1.0).limits(v, None, True, None), [None, "x"])],
    "set_router_loss_weight": [
        (lambda v: weighted(weight=v), BAD_WEIGHTS),
        (lambda v: weighted(weight=v, built=True), BAD_WEIGHTS),
        (lambda v: weighted(index=v), [-1, 1, 0.0, True, "0", None]),
        (lambda v: weighted(index=v, built=True), [-1, 1, 0.0, True, "0", None]),
    ],
    "RouterLossSchedule": [
        (lambda v: scheduled(lambda epoch, weight: v), BAD_WEIGHTS),
        (callbacks.RouterLossSchedule, [None, 0.1, lambda epoch: 0.1, lambda: 0.1]),
        (lambda v: callbacks.RouterLossSchedule(lambda e, w: w, v), ["balance", None, 3]),
    ],
    "name of a metric": [(lambda v: metrics.LoadImbalance(E, name=v), [3, "", ["a"]])],
    "a routing of one's own router": [
        (
            lambda v: OfOnesOwn(E, v)(normal(T, D)),
            [None, (1, 2), ops.top_k_routing(LOGITS[:3], K), ops.top_k_routing(LOGITS[:, :3], K)],
        ),
    ],
    "a balancer of one's own": [
        (lambda v: balanced(v, np.zeros(E, "f4")), [None, LOGITS]),
        (lambda v: balanced(np.zeros(E, "f4"), v), [None, np.zeros(E - 1, "f4")]),
    ],
    "a loss of one's own": [
        (lambda v: Loss(v)(routing()), [None, "big", LOGITS[0], np.zeros((1,))]),
        (lambda v: Loss(v)(routing()), [True, np.ones((), "int32")]),
        (built_with, [None, 3]),
        (lambda v: moe(router_losses=[Loss(v)])(normal(T, D), training=True), [None, LOGITS[0]]),
    ],
    "a bank and its plan": [
        (lambda v: bank()(normal(T, D), v), [None, routing(), "plan"]),
        (lambda v: bank()(normal(v, D), ops.plan_groups(routing())), [T - 1]),
        (lambda v: bank(v)(normal(T, D), ops.plan_groups(routing())), [E + 1]),
        (lambda v: ops.plan_groups(routing()).run(v, normal(T, D)), [None, keras.layers.Dense(2)]),
        (lambda v: ops.plan_groups(routing()).dispatch(v), [None, normal(T), normal(T - 1, D)]),
        (lambda v: ops.plan_groups(routing()).combine(v), [None, normal(T)]),
        (lambda v: ops.plan_groups(routing()).dropped_fraction(v), [None, np.ones(E - 1)]),
        (lambda v: moe(shared_expert=v), [bank()]),
        (lambda v: layers.LayerExperts([v]), [bank(), keras.layers.LSTM(D)]),
        (lambda v: moe(layers.LayerExperts([v]))(normal(T, D)), [keras.layers.Embedding(4, D)]),
    ],
    "arguments of a layer in arrays of texts": [
        (lambda v: moe()(**{"inputs": normal(T, D), v: TEXTS}), OF_A_LAYER),
        (lambda v: encoder()(**{"inputs": normal(1, T, D), v: TEXTS}), OF_A_BLOCK),
        (lambda v: routers.TopKRouter(E)(**{"tokens": normal(T, D), v: TEXTS}), OF_A_ROUTER),
    ],
    "mask of a context and a cache": [
        (
            lambda v: decoder()(
                normal(1, 2, D), cache=decoder().make_cache(1, 4), position=0, context_mask=v
            ),
            [np.ones((1, 2), bool)],
        ),
    ],
    "inputs": [
        (lambda v: moe()(v), [None, [normal(T, D), normal(T, D)], np.zeros((T, 0), "f4")]),
        (lambda v: moe()(v), [np.array([["a"] * D])]),
        (lambda v: encoder()(v), [np.array([[["a"] * D]])]),
        (lambda v: moe()(normal(T, D), router_inputs=v), [normal(T - 1, D), normal(T), "x"]),
        (lambda v: moe()(normal(T, D), router_inputs=v), [np.ones((T, D), "int32")]),
        (lambda v: routers.TopKRouter(E)(v), [None, "x", np.ones((T, D), "int32")]),
        (lambda v: routers.TopKRouter(E)(normal(T, D), indices=v), ["0 1"]),
    ],
    "metrics of a monitor": [
        (lambda v: callbacks.ExpertMonitor(metrics=v), [None, np.max, "max", [lambda c: 1.0]]),
        (lambda v: callbacks.ExpertMonitor(metrics=[v]), [metrics.load_imbalance, "max"]),
        (lambda v: callbacks.ExpertMonitor(metrics=[v]), [takes_two]),
        (lambda v: callbacks.ExpertMonitor(metrics=[returning(0), v]), [returning(1)]),
        (lambda v: monitored(returning(v)), [None, "big", np.ones(2)]),
        (lambda v: compiled_metric(), [None]),
    ],
    "a folder as a flag": [(callbacks.ExpertMonitor, ["logs"])],
    "activation": [
        (lambda v: moe(layers.FeedForwardExperts(E, 2, v))(normal(T, D)), BAD_ACTIVATIONS),
        (lambda v: moe(layers.GatedExperts(E, 2, v))(normal(T, D)), BAD_ACTIVATIONS),
        (lambda v: layers.GatedFeedForward(2, v)(normal(T, D)), BAD_ACTIVATIONS),
    ],
    "initializer": [
        (
            lambda v, name=name: moe(layers.FeedForwardExperts(E, 2, **{name: v}))(normal(T, D)),
            [None, *BAD_INITIALIZERS],
        )
        for name in ("kernel_initializer", "bias_initializer")
    ]
    + [
        (lambda v, cls=cls: cls(E, kernel_initializer=v)(normal(T, D)), BAD_INITIALIZERS)
        for cls in (routers.TopKRouter, routers.CosineRouter)
    ]
    + [
        (lambda v, make=make: built(make()).enable_lora(2, a_initializer=v), BAD_INITIALIZERS)
        for make in (bank, lambda: routers.TopKRouter(E))
    ],
    "regularizer": [
        (lambda v: layers.FeedForwardExperts(E, 2, kernel_regularizer=v), BAD_REGULARIZERS),
        (lambda v: layers.FeedForwardExperts(E, 2, bias_regularizer=v), BAD_REGULARIZERS),
        (lambda v: routers.TopKRouter(E, kernel_regularizer=v), BAD_REGULARIZERS),
    ],
    "what a regularizer returns": [
        (
            lambda v, make=make, name=name: built(make(E, 3, **{name: returning(v)})).losses,
            NO_FLOATS,  # Keras adds up several
        )
        for make, name in (
            (layers.FeedForwardExperts, "kernel_regularizer"),
            (layers.FeedForwardExperts, "bias_regularizer"),
            (routers.TopKRouter, "kernel_regularizer"),
        )
    ],
    "what a layer of tokens returns": [
        (lambda v: moe(shared_expert=telling_its_shape(v))(normal(2, 3, D)), NOT_AS_TOLD),
        (lambda v: encoder(telling_its_shape(v))(normal(2, 3, D)), NOT_AS_TOLD),
        (
            lambda v: layers.LayerExperts([telling_its_shape(v)])(normal(T, D), TO_ONE_EXPERT),
            NOT_AS_TOLD,
        ),
    ],
    "a constructor that calls no other": [
        (lambda v: moe(router=without_constructor(v)), of_kind(routers, routers.Router)),
        (lambda v: moe(without_constructor(v)), of_kind(layers, layers.ExpertBank)),
        (lambda v: moe(without_constructor(v, "num_experts")), [layers.ExpertBank]),
        (lambda v: losses.get(without_constructor(v)), of_kind(losses, losses.RouterLoss)),
        (
            lambda v: balancers.get(without_constructor(v)),
            of_kind(routers, routers.SelectionBalancer),
        ),
        (lambda v: moe(capacity_factor=without_constructor(v)), [layers.Capacity]),
        (lambda v: begun(without_constructor(v)), of_kind(callbacks, keras.callbacks.Callback)),
        (
            lambda v: without_constructor(v).update_state(routing()),
            of_kind(metrics, keras.metrics.Metric),
        ),
    ],
    "advice of a part of one's own": [
        (lambda v: advised(loss=v), [None, 3, ["a"]]),
        (lambda v: advised(router=v), [3, ["a"]]),
        (lambda v: advised(balancer=v), [3, ["a"]]),
    ],
    "logits of a router of one's own": [
        (
            lambda v, base=base: own(base, logits=v)(E)(normal(T, D)),
            [
                lambda self, tokens: None,
                lambda self, tokens, mask, training: None,
                lambda self, tokens, mask, training: logits(),
                lambda self, tokens, mask, training: (1, 2),
                lambda self, tokens, mask, training: (logits(), None),
                lambda self, tokens, real, training: (logits()[:, :3], mask()),
            ],
        )
        for base in of_kind(routers, routers.LogitRouter)
        if base not in ABSTRACT
    ],
    "kernel_shape of a router of one's own": [
        (
            lambda v: own(routers.TopKRouter, kernel_shape=v)(E)(normal(T, D)),
            [
                lambda self: (D, E),
                lambda self, features: None,
                lambda self, features: "ab",
                lambda self, features: (E, features),
                lambda self, features: (features, 4.0),
                lambda self, features: (features, 0),
            ],
        ),
    ],
    "build of a bank of one's own": [
        (
            lambda v: built(own(layers.FeedForwardExperts, build=v)(E, 3)),
            [lambda self, shape: None],
        ),
    ],
    "shape that a bank of one's own tells": [
        (
            lambda v: served_by(shape=lambda self, shape: v(shape)),
            [
                lambda shape: None,
                lambda shape: 5,
                lambda shape: "ab",
                lambda shape: (2,),
                lambda shape: (*shape[:-1], None),
                lambda shape: (*shape[:-1], D + 1),
            ],
        ),
        (
            lambda v: built(own(layers.FeedForwardExperts, compute_output_shape=v)(E, 3))(
                normal(T, D), ops.plan_groups(routing())
            ),
            [lambda self, shape: (*shape[:-1], D + 1)],
        ),
    ],
    "layers of tokens": [
        (lambda v: moe(shared_expert=v)(normal(2, 3, D)), NOT_OF_TOKENS),
        (lambda v: encoder(v)(normal(2, 3, D)), NOT_OF_TOKENS),
        (
            lambda v: moe(layers.LayerExperts([v, keras.layers.Dense(D)]))(normal(T, D)),
            [v for v in NOT_OF_TOKENS if v not in NOT_OF_TOKENS[-1:]],
        ),
    ],
    "methods of a router of one's own": [
        (lambda v: routed_by(build=v), [lambda self, s: None, routers.LogitRouter.build]),
        (lambda v: routed_by(project=v), [lambda self: 1, lambda self, tokens: None]),
        (lambda v: routed_by(project=v), [lambda self, x: x, lambda self, x: x[:3, :E]]),
        (lambda v: routed_by(select=v), [lambda self: 1, lambda self, s: None, lambda self, s: s]),
        (lambda v: routed_by(call=lambda self, tokens, **kwargs: v), [None, "x", (1, 2)]),
        (lambda v: own(routers.Router, route=v)(E), [lambda self, tokens: routing()]),
        (lambda v: own(OfOnesOwn, top_k=v)(E, routing())(normal(T, D)), [None, 9, "a"]),
        (lambda v: built(own(OfOnesOwn, max_top_k=v)(E)), [None, 9, "a"]),
        (lambda v: built(own(OfOnesOwn, min_top_k=v)(E)), [None, 9, "a"]),
        (lambda v: built(own(OfOnesOwn, mean_top_k=v)(E)), [None, 0, "a"]),
        (lambda v: built(own(OfOnesOwn, causal=v)(E)), [None, "no", 1]),
        (
            lambda v: moe(router=own(OfOnesOwn, takes_capacity=v)(E), capacity_factor=1.0),
            [None, "no", 1],
        ),
        (lambda v: own(OfOnesOwn, top_k=v)(E, routing())(normal(T, D)), [K + 1]),
        (planned_by, [lambda self, routing: None, lambda self, routing: routing]),
    ],
    "call of a bank of one's own": [
        (served_by, [lambda self, tokens: tokens, lambda self, tokens, plan: None]),
        (served_by, [lambda self, tokens, plan: tokens[:2], lambda self, tokens, plan: [tokens]]),
        (served_by, [lambda self, x, plan: x[:, 0], lambda self, x, plan: x > 0]),
    ],
    "limits of a capacity of one's own": [
        (
            lambda v: moe(capacity_factor=own(layers.Capacity, limits=v)(1.0))(normal(T, D)),
            [lambda self, routing: {}, lambda self, *args: None, lambda self, *args: "3"],
        ),
    ],
    "a loss of a layer given to compile": [
        (lambda v: losses.LoadBalance()(normal(T, 1), v), [normal(T, 1)]),
    ],
    "compute of a loss of one's own": [
        (lambda v: losses.get(own(losses.RouterLoss, compute=v)(0.1)), [lambda self: 1.0]),
    ],
    "methods of a balancer of one's own": [
        (lambda v: balancers.get(own(balancers.LossFreeBias, **{v: lambda self: 1})()), ["update"]),
    ],
    "kernel of a bank that is not built": [(lambda v: bank().merged_kernel(v), ["up"])],
    "large arrays": [
        (lambda v, cls=cls, name=name: cls(**{**CASES[cls].required(), name: v}), [LARGE])
        for cls in CASES
        for name in constructor_arguments(cls)
        # Values of an initializer may be such, and of a dtype Keras says it.
        if name != "dtype" and not name.endswith("initializer")
    ],
    "replay of a router": [(lambda v: replay(np.array(v)), REPLAYED)],
    "replay of a layer": [(lambda v: layer_replay(np.array(v)), REPLAYED)],
    "num_experts of a bank of one's own": [(layers.ExpertBank, BAD_SIZES)],
    "moe_layers": [(inspection.moe_layers, [None, "model", 3])],
    "update_state": [(metrics.LoadEntropy(E).update_state, [*NO_ROUTING, [1, 2, 3, 4]])],
    "token ids": [
        (
            lambda v: routers.HashRouter(E, 9)(normal(2, D), token_ids=np.array(v)),
            [[0.0, 1.0], [0], [True, False], ["a", "b"]],
        ),
        (lambda v: hashed()(normal(1, 2, D), token_ids=np.array([v])), [[0.0, 1.0], ["a", "b"]]),
        (lambda v: encoder(hashed())(normal(1, 2, D), token_ids=np.array([v])), [["a", "b"]]),
    ],
    "cache": [
        (
            lambda v: decoder()(normal(1, 2, D), cache=v, position=0),
            [{}, {"mask": np.ones((1, 4), bool)}, [1], decoder().make_cache(2, 4), of_integers()],
        ),
    ],
    "context": [
        (lambda v: decoder()(normal(1, 2, D), context_mask=v), [np.ones((1, 2), bool)]),
        (
            lambda v: layers.TransformerDecoderBlock(2, moe(), cross_attention=True)(
                normal(1, 2, D), context=v
            ),
            ["x", normal(2, 2, D), normal(1, D), np.ones((1, 2, D), "int32")],
        ),
        (
            lambda v: attending()(normal(1, 2, D), context=normal(1, 5, 6), context_mask=v),
            [np.ones((1, 4), bool), np.ones((1, 5), "f4")],
        ),
        (lambda v: attending()(normal(1, 2, D), context=v), [normal(1, 5, D), keras.Input((6,))]),
        (lambda v: attending().make_cache(1, 4, context=v), [normal(1, 5, D)]),
    ],
    "attributes of a layer that is built": [
        (
            lambda v, name=name: setattr(built(moe()), name, v),
            [None, "x", keras.layers.Dense(3), make()],
        )
        for name, make in (("router", lambda: routers.TopKRouter(E)), ("experts", bank))
    ]
    + [
        (
            lambda v: built(moe()).__setattr__(*v),
            [("router_losses", ["load_balance"]), ("top_k", 2)],
        ),
        (
            lambda v: built(moe()).__setattr__(*v),
            [("gated_shared_expert", True), ("num_experts", E)],
        ),
        (lambda v: setattr(built(moe()).experts, "hidden_dim", v), [5]),
        (lambda v: setattr(built(moe()).router, "top_k", v), [0, E + 1, "2"]),
        (lambda v: setattr(built(moe()).router, "num_experts", v), [E + 1]),
        (lambda v: setattr(built(moe()).router, "balancer", v), ["loss_free"]),
        (lambda v: setattr(built(moe()).router, "causal", v), ["no"]),
        (lambda v: setattr(built(moe()).experts, "kernel_regularizer", v), ["l2"]),
        (lambda v: setattr(built(moe()).router_losses[0], "weight", v), [5.0]),
    ],
    "attributes that others are computed from": [
        (lambda v: setattr(moe(), "gated_shared_expert", v), [True]),
        (lambda v: setattr(built(moe()).router, "seed", v), [3]),
        (
            lambda v: setattr(layers.LayerExperts([keras.layers.Dense(D)]), "layers", v),
            [[keras.layers.Dense(D), keras.layers.Dense(D)]],
        ),
        (lambda v: setattr(layers.ZeroComputationExperts(bank(), 1), "num_zero", v), [2]),
        (lambda v: setattr(metrics.LoadImbalance(E), "num_experts", v), [E + 1]),
    ],
    "attributes that are weights": [
        (lambda v: setattr(built(moe()).router, "kernel", v), [np.ones((D, E), "f4")]),
        (lambda v: setattr(built(moe()), "expert_counts", v), [np.zeros(E)]),
    ],
    "a loss in place of a function of Keras": [
        (
            lambda v: layers.FeedForwardExperts(E, 3, **{v: losses.RouterZ()}),
            ["activation", "kernel_initializer", "kernel_regularizer"],
        ),
    ],
    "flags of a loss": [
        (
            lambda v: moe(router_losses=[own(losses.LoadBalance, **v)()]),
            [{"per_sequence": "x"}, {"balances": 1}, {"usual_weight": "x"}],
        ),
        (
            lambda v: moe(router_losses=[own(losses.LoadBalance, **v)()]),
            [{"value_at_balance": "x"}],
        ),
    ],
    "layers without their constructor, alone": [
        (
            lambda v: without_constructor(v)(normal(2, D)),
            [layers.MixtureOfExperts, layers.GatedFeedForward, routers.TopKRouter],
        ),
        (lambda v: without_constructor(v)(normal(1, 2, D)), [layers.TransformerEncoderBlock]),
    ],
    "whether a capacity is causal": [
        (
            lambda v: layers.TransformerDecoderBlock(
                2, moe(capacity_factor=own(layers.Capacity, is_causal=lambda self, top_k: v)(1.0))
            ),
            ["no", None, 1],
        ),
    ],
    "draws of a layer that was made without": [
        (
            lambda v: setting(moe(), capacity=v)(normal(2, D), training=True),
            [layers.Capacity(1.0, priority="random")],
        ),
        (lambda v: setting(encoder(), dropout=v)(normal(1, 2, D), training=True), [0.5]),
    ],
    "gated feed-forward": [
        (layers.GatedFeedForward(3), [None, "x", [[1.0] * D], np.full((2, D), "a"), normal(D)]),
    ],
    "position": [
        (decode, [True, -2, 1.5, 3, 4, NAN, "0"]),
        (decode, [np.int64(3), np.array(-2), np.float32(0), np.bool_(True)]),
    ],
    "inputs of a block": [
        (lambda v: encoder()(v), [None, normal(T, D), "x"]),
        (lambda v: fitted(encoder())(v), [normal(1, 3, D + 2), keras.Input((3, D + 2))]),
        (lambda v: decoder()(v), [None, normal(1, 3, D + 2), keras.Input((3, D + 2))]),
    ],
    "symbols": [
        (lambda v, make=make: make()(v), [keras.Input((3, D), dtype="int32")])
        for make in (moe, encoder)
    ]
    + [
        (
            lambda v, make=make: make()(keras.Input((3, D)), mask=v),
            [keras.Input((4,), dtype="bool"), keras.Input((3,))],
        )
        for make in (moe, encoder)
    ]
    + [
        (lambda v: moe()(keras.Input((3, D)), router_inputs=v), [keras.Input((3, D + 1))]),
        (lambda v: moe()(keras.Input((3, D)), indices=v), [keras.Input((3, K), dtype="int32")]),
        (lambda v: routers.TopKRouter(E)(v), [keras.Input((D,), dtype="int32")]),
    ],
    "position in a tensor": [(lambda v: decode(tensor(v)), [0.0, 1.5, [0, 1]])],
    "make_cache": [
        (lambda v: decoder().make_cache(v, 4), BAD_SIZES),
        (lambda v: decoder().make_cache(1, v), BAD_SIZES),
    ],
    "scaling_factor": [(lambda v: routers.TopKRouter(E, scaling_factor=v), BAD_NUMBERS)],
    "capacity_factor": [(lambda v: moe(capacity_factor=v), BAD_NUMBERS)],
    "evaluation_factor": [(lambda v: layers.Capacity(1.0, evaluation_factor=v), BAD_NUMBERS)],
    "capacity of experts that choose": [
        (lambda v: routers.ExpertChoiceRouter(E, capacity_factor=v), BAD_NUMBERS),
    ],
    "priority": [(lambda v: layers.Capacity(1.0, priority=v), [None, ["random"], 1])],
    "iterations": [(lambda v: routers.SinkhornRouter(E, iterations=v), BAD_SIZES)],
    "growth": [(lambda v: routers.ReLURouter(E, growth=v), [*BAD_NUMBERS, 1.0])],
    "accumulation_steps": [
        (lambda v: losses.GlobalLoadBalance(accumulation_steps=v), BAD_SIZES),
        (lambda v: balancers.LossFreeBias(accumulation_steps=v), BAD_SIZES),
    ],
    "weight": [
        (loss, BAD_WEIGHTS) for _, loss in sorted(losses.BY_NAME.items()) if inspect.isclass(loss)
    ],
}


def cases(table):
    return [
        # Without addresses, which are others in each worker.
        pytest.param(
            call, value, id=f"{name}-{number}-{re.sub('0x[0-9a-f]+', '', repr(value)):.30}"
        )
        for name, calls in table.items()
        for number, (call, values) in enumerate(calls)
        for value in values
    ]


def is_refused(call, value):
    with pytest.raises((ValueError, TypeError)) as error:
        call(value)
    assert "Received" in str(error.value), error.value
    assert any(word in str(error.value) for word in ("must", "takes", "needs", "is a mean"))
    assert len(_said(error.value)) < 600, error.value


def _said(error):
    """What an error says without what Keras adds of the call."""
    return str(error).partition("Arguments received by")[0]


@pytest.mark.parametrize("call, value", cases(FUNCTIONS))
def test_a_function_refuses(call, value):
    is_refused(call, value)


@pytest.mark.parametrize("call, value", cases(METHODS))
def test_a_class_refuses(call, value):
    is_refused(call, value)


@pytest.mark.parametrize("call, value", cases(PLOTS))
def test_a_plot_refuses(call, value):
    pytest.importorskip("matplotlib")
    is_refused(call, value)


@pytest.mark.parametrize("cls", CASES)
def test_a_misspelt_argument_is_answered_with_the_one_that_was_meant(cls):
    for name in constructor_arguments(cls):
        with pytest.raises(TypeError, match=f"takes no argument.*Did you mean `{name}`"):
            cls(**{name[:-1]: 1})


@pytest.mark.parametrize("cls", CASES)
def test_an_attribute_keeps_the_rules_of_its_argument(cls):
    for name in constructor_arguments(cls).keys() - {*OF_KERAS}:
        is_refused(lambda v, name=name: setattr(plain(cls), name, v), object())


SAVED = [cls for cls in (*CASES, *ABSTRACT, optimizers.Muon) if hasattr(cls, "from_config")]


@pytest.mark.parametrize("cls", SAVED)
@pytest.mark.parametrize("config", [None, [1], "config", 3])
def test_a_config_is_a_dict(cls, config):
    is_refused(cls.from_config, config)


def test_a_subclass_has_attributes_of_its_own():
    class Mine(layers.MixtureOfExperts):
        def __init__(self, top_k=2, capacity_factor=None, **kwargs):
            super().__init__(layers.FeedForwardExperts(E, 3), **kwargs)
            self.top_k, self.num_experts, self.capacity_factor = top_k, E, capacity_factor

    class Router(routers.TopKRouter):
        def __init__(self, num_experts=None, **kwargs):
            super().__init__(num_experts, **kwargs)
            self.top_k, self.hidden_dim = np.int64(3), 9

    layer = Mine(router=Router())
    layer(normal(2, D))
    assert layer.router.top_k == 3
    layer.router.logit_noise = layer.router.input_jitter = 0
    layer.router.top_k, layer.capacity, layer.experts.activation = 1, 2.0, "relu"
    layer.capacity.factor, layer.note = 1.5, "any other attribute"
    assert layer(normal(2, D)).shape == (2, D)
    assert layer.router.get_config()["top_k"] == 1 and layer.capacity.factor == 1.5


def test_a_copy_of_a_loss_in_a_layer_is_free():
    own = losses.LoadBalance()
    layer = moe(router_losses=[own])
    layer.set_router_loss_weight(0, 0.5)
    assert layer.loss_weights_in_force == [0.5]
    layer.router_losses = [own, "router_z"]
    built(layer)
    np.testing.assert_allclose(layer.loss_weights_in_force, [0.01, 0.001])
    is_refused(lambda v: setattr(own, "weight", v), 0.3)
    for free in (copy.copy(own), copy.deepcopy(layer.router_losses[0])):
        free.weight = 0.3
        assert free.get_config()["weight"] == 0.3


def test_parts_are_changed_before_the_layer_is_built():
    layer = moe(router_losses=())
    layer.router = routers.TopKRouter(top_k=1)
    layer.shared_expert = keras.layers.Dense(D)
    layer.router_losses = [losses.RouterZ(0.5), "load_balance"]
    layer.router_losses[1].weight = 0.25
    block = layers.TransformerEncoderBlock(2, moe())
    block.feedforward = layer
    assert block(normal(2, 3, D), training=True).shape == (2, 3, D)
    assert layer.router.num_experts == E
    np.testing.assert_allclose(layer.loss_weights_in_force, [0.5, 0.25])
    assert len(block.losses) == 2


def test_a_subclass_takes_arguments_of_its_own():
    class Wide(layers.MixtureOfExperts):
        def __init__(self, width=3, **kwargs):
            super().__init__(layers.FeedForwardExperts(E, kwargs.pop("height", width)), **kwargs)

    assert Wide(height=5, name="wide").experts.hidden_dim == 5
    with pytest.raises(TypeError, match="`top_k` is an argument of the router"):
        Wide(top_k=1)


# What cannot be known before compute is harmless.


@pytest.mark.parametrize("sizes", [[9, 0, 0, 0], [-3, 2, 2, 2], [2**30] * 3 + [0], [-1] * 4])
def test_sizes_in_a_tensor_stay_within_the_rows(sizes):
    rows, kernels = normal(T, D), normal(E, D, 3)
    given = tensor(np.array(sizes, "int32"))
    within = np.diff(np.minimum(np.cumsum(np.maximum(np.array(sizes), 0)), T), prepend=0)
    expected = array(ops.grouped_matmul(rows, kernels, within.tolist()))
    np.testing.assert_allclose(array(ops.grouped_matmul(rows, kernels, given)), expected)


@pytest.mark.parametrize("index", [E, 10**6, -7])
def test_experts_in_a_tensor_that_do_not_exist_serve_nobody(index):
    layer, x = moe(), normal(T, D)
    known = np.array([[0, -1]] * T, "int32")
    unknown = np.array([[0, index]] * T, "int32")
    expected = array(layer(x, indices=tensor(known)))
    np.testing.assert_allclose(array(layer(x, indices=tensor(unknown))), expected)


@pytest.mark.parametrize("index", [E, 10**6, -7])
def test_a_routing_of_ones_own_cannot_reach_out_of_range(index):
    made = routing()
    indices = np.array([[0, index]] * T, "int32")
    plan = ops.plan_groups(made._replace(indices=tensor(indices)))
    tokens = tensor(normal(T, D))
    alone = made._replace(indices=tensor(np.array([[0, -1]] * T, "int32")))
    expected = ops.plan_groups(alone).combine(ops.plan_groups(alone).dispatch(tokens))
    np.testing.assert_allclose(array(plan.combine(plan.dispatch(tokens))), array(expected))


@pytest.mark.parametrize("position, nearest", [(-2, 0), (9, 2)])
def test_a_position_in_a_tensor_is_moved_to_where_there_is_room(position, nearest):
    block, x = decoder(), normal(1, 2, D)
    cache = block.make_cache(1, 4)
    outputs, moved = block(x, cache=cache, position=tensor(position, "int32"))
    seen = array(moved["mask"])[0]
    np.testing.assert_array_equal(np.flatnonzero(seen), [nearest, nearest + 1])
    expected, _ = block(x, cache=cache, position=nearest)
    np.testing.assert_allclose(array(outputs), array(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "capacity",
    [
        1e6,
        1e30,
        layers.Capacity(1.0, minimum=2**31),
        layers.Capacity(1.0, multiple_of=2**31 - 1),
        layers.Capacity(1.0, minimum=2**40, multiple_of=2**40),
    ],
    ids=str,
)
def test_a_capacity_of_any_size_is_no_limit(capacity):
    layer = moe(capacity_factor=capacity)
    _, chosen = layer(normal(8192, D), training=True, return_routing=True)
    assert float(array(chosen.dropped)) == 0
    tokens = 2**20  # an int32, as where a compiled step does not know its batch
    known = ops.expert_capacity(tokens, E, K, 1e6)
    assert int(array(ops.expert_capacity(tensor(tokens, "int32"), E, K, 1e6))) == known
    plan = ops.plan_groups(routing(), capacity=2**40)
    np.testing.assert_array_equal(array(plan.groups.sizes), array(routing().counts))


# NumPy arrays do where tensors do: `c` makes the one or the other of arrays.
OF_ARRAYS = {
    "agreement": lambda c: ops.agreement(c(LOGITS), c(np.abs(LOGITS))),
    "balanced_assignment": lambda c: ops.balanced_assignment(c(LOGITS), c(REAL)),
    "clean_logits": lambda c: ops.clean_logits(c(LOGITS), c(REAL)),
    "expert_choice_routing": lambda c: ops.expert_choice_routing(c(LOGITS), 1.0, c(REAL)),
    "group_limited_scores": lambda c: ops.group_limited_scores(c(LOGITS), 2, 1),
    "grouped_feed_forward": lambda c: fed(
        tokens=c(normal(T, D)),
        weights=c(array(ops.plan_groups(routing()).weights)),
        up_kernels=[c(normal(E, D, 3))],
        down_kernel=c(normal(E, 3, D)),
        biases=[c(normal(E, 3)), c(normal(E, D))],
    ),
    "grouped_matmul": lambda c: ops.grouped_matmul(
        c(normal(T, D)), c(normal(E, D, 3)), [6, 0, 0, 0]
    ),
    "make_routing": lambda c: ops.make_routing(*map(c, (FIRST, *[LOGITS] * 3, REAL))),
    "masked_mean": lambda c: ops.masked_mean(c(LOGITS), c(REAL)),
    "noisy_load": lambda c: ops.noisy_load(c(LOGITS), c(LOGITS), c(np.abs(LOGITS)), K, c(REAL)),
    "plan_expert_choice": lambda c: ops.plan_expert_choice(
        recorded(c, ops.expert_choice_routing(logits(), 1.0))
    ).dropped_fraction(np.ones(E)),
    "plan_groups": lambda c: ops.plan_groups(
        recorded(c), 2, first=c(LOGITS[:, 0]), sequence_length=3
    ).combine(c(normal(T * K, D))),
    "plan_soft": lambda c: ops.plan_soft(recorded(c, ops.soft_routing(logits(), E))),
    "sequence_load_balance": lambda c: ops.sequence_load_balance(recorded(c), 3),
    "sinkhorn_plan": lambda c: ops.sinkhorn_plan(c(LOGITS), c(REAL), 3),
    "soft_routing": lambda c: ops.soft_routing(c(LOGITS), E, c(REAL)),
    "take_scores": lambda c: ops.take_scores(c(LOGITS), c(FIRST)),
    "top_k_indices": lambda c: ops.top_k_indices(c(LOGITS), K),
    "top_k_routing": lambda c: ops.top_k_routing(c(LOGITS), K, c(REAL)),
    **{
        name: lambda c, name=name: getattr(ops, name)(recorded(c))
        for name in (
            *("load_balance", "router_entropy", "router_z"),
            *("squared_importance_variation", "squared_load_variation"),
        )
    },
}
REAL = np.array([True] * (T - 1) + [False])
FIRST = np.zeros((T, E), "int32") + np.arange(E, dtype="int32")


def recorded(convert, made=None):
    """A routing of arrays, as `inspection.record_routings` has them, or of tensors."""
    return keras.tree.map_structure(lambda each: convert(array(each)), made or routing())


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_arrays_are_as_good_as_tensors(name):
    of_tensors, of_arrays = (OF_ARRAYS[name](convert) for convert in (tensor, np.asarray))
    for expected, found in zip(keras.tree.flatten(of_tensors), keras.tree.flatten(of_arrays)):
        np.testing.assert_allclose(array(found), array(expected), rtol=1e-6)


def test_every_function_of_tensors_takes_arrays():
    names = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert names == OF_ARRAYS.keys() | {"expert_capacity", "platform"}


NUMBERS = [Fraction(5, 4), np.float32(1.25), np.float64(1.25), 1.25]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda n: moe(capacity_factor=n),
        lambda n: moe(capacity_factor=layers.Capacity(n, evaluation_factor=n)),
        lambda n: moe(router=routers.TopKRouter(E, scaling_factor=n, logit_noise=n)),
        lambda n: moe(router=routers.ExpertChoiceRouter(E, capacity_factor=n)),
        lambda n: moe(router_losses=[losses.LoadBalance(n)]),
    ],
)
def test_any_number_is_saved_as_a_plain_one(make, number, tmp_path):
    layer = make(number)
    json.dumps(layer.get_config())
    model = keras.Sequential([keras.Input((D,)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert "1.25" in json.dumps(loaded.layers[0].get_config())


# They take routings and plans, which other functions have checked, or tensors of any values.
TAKE_NO_VALUES = {
    "health.not_a_number",
}


@pytest.mark.parametrize("module", [ops, metrics, health, visualization])
def test_every_public_function_has_its_bad_calls(module):
    if module is visualization:
        pytest.importorskip("matplotlib")
    part = module.__name__.rpartition(".")[2]
    functions = {
        f"{part}.{name}" for name in module.__all__ if inspect.isfunction(getattr(module, name))
    }
    assert functions <= FUNCTIONS.keys() | PLOTS.keys() | TAKE_NO_VALUES
