"""Every error a wrong argument is promised, in whole sentences."""

import keras
import numpy as np
import pytest
from layer_checks import D, E, moe, normal, one_hot

from keras_moe import callbacks, layers, losses, metrics, ops, routers
from keras_moe.routers import balancers

CALLED = "Exception encountered when calling "


def positive_integer(name, value):
    return (
        f"`{name}` must be a positive integer. Received: {name}={value!r}. "
        "Pass an integer of at least 1."
    )


def fraction(name, value):
    return (
        f"`{name}` must be a number from 0 to below 1. Received: {name}={value!r}. "
        "Pass 0 to turn it off."
    )


def not_negative(name, value):
    return (
        f"`{name}` must be a finite number of at least 0. Received: {name}={value!r}. "
        "Pass 0 to turn it off."
    )


def positive_number(name, value):
    return (
        f"`{name}` must be a finite number above 0. Received: {name}={value!r}. "
        "Pass, for example, 1.25."
    )


def names_of(module):
    return " or one of the names " + ", ".join(map(repr, sorted(module.BY_NAME)))


USAGE_METRICS = [
    metrics.LoadImbalance,
    metrics.LoadEntropy,
    metrics.DeadExperts,
    metrics.DeadExpertsOverWindow,
    metrics.DroppedFraction,
    metrics.ExpertShare,
]

# Argument, and what to do with its value.
RANGES = [
    (positive_integer, "num_experts", lambda value: layers.FeedForwardExperts(value, 8)),
    (positive_integer, "num_experts", lambda value: layers.GatedExperts(value, 8)),
    (positive_integer, "hidden_dim", lambda value: layers.FeedForwardExperts(E, value)),
    (positive_integer, "hidden_dim", lambda value: layers.GatedExperts(E, value)),
    (positive_integer, "num_experts", routers.TopKRouter),
    (positive_integer, "top_k", lambda value: routers.TopKRouter(E, value)),
    (positive_integer, "every", callbacks.ExpertHealth),
    (positive_integer, "patience", lambda value: callbacks.ExpertHealth(patience=value)),
    (positive_integer, "num_heads", lambda v: layers.TransformerEncoderBlock(v, moe())),
    *((positive_integer, "num_experts", metric) for metric in USAGE_METRICS),
    (positive_integer, "window", lambda value: metrics.DeadExpertsOverWindow(E, value)),
    (fraction, "input_jitter", lambda value: routers.TopKRouter(E, input_jitter=value)),
    (fraction, "dropout", lambda v: layers.TransformerEncoderBlock(1, moe(), dropout=v)),
    (not_negative, "logit_noise", lambda value: routers.TopKRouter(E, logit_noise=value)),
    (not_negative, "weight", losses.LoadBalance),
    (not_negative, "weight", losses.RouterZ),
    (positive_number, "capacity_factor", lambda value: moe(capacity_factor=value)),
]
NAN, INF = float("nan"), float("inf")
OUTSIDE = {
    positive_integer: [0, -1, 2.0, True, "4", None, [4]],
    fraction: [-0.1, 1, 1.5, NAN, True, "0.1", None],
    not_negative: [-0.1, INF, NAN, True, "0.1", None],
    positive_number: [0, -1, INF, NAN, True, "1.25"],
}
WRONG_VALUES = [
    (message, name, make, value)
    for message, name, make in RANGES
    for value in OUTSIDE[message]
    # A router without a number of experts takes that of its layer.
    if not (make is routers.TopKRouter and value is None)
]


@pytest.mark.parametrize("message, name, make, value", WRONG_VALUES)
def test_a_value_out_of_range_is_refused(message, name, make, value):
    with pytest.raises(ValueError) as error:
        make(value)
    assert str(error.value) == message(name, value)


@pytest.mark.parametrize("number", [np.int64(4), np.int32(4)])
def test_numpy_numbers_are_numbers(number):
    experts = layers.FeedForwardExperts(number, number)
    layer = moe(experts, capacity_factor=np.float32(1.5))
    assert layer.experts.num_experts == 4
    assert layers.ZeroComputationExperts(experts, num_zero=number).num_experts == 8


def dense(units=D, **kwargs):
    return keras.layers.Dense(units, **kwargs)


SAME = dense(name="same")


class Routeless(routers.Router):
    top_k = 1


class Weightless(losses.RouterLoss):
    def __init__(self):
        pass


CONSTRUCTORS = {
    "experts": (
        lambda: layers.MixtureOfExperts("ffn"),
        TypeError,
        "`experts` must be a bank of experts. Received: experts='ffn'. Pass, for example, "
        "`layers.FeedForwardExperts(num_experts=8, hidden_dim=256)`, or Keras layers in "
        "`layers.LayerExperts([...])`.",
    ),
    "a balancer as router": (
        lambda: moe(router="loss_free"),
        ValueError,
        "A balancer is a part of a router. Received: router='loss_free'. "
        "Pass `router=routers.TopKRouter(balancer='loss_free')`.",
    ),
    "a balancer of a rate as router": (
        lambda: moe(router=routers.LossFreeBias(rate=0.01)),
        ValueError,
        "A balancer is a part of a router. Received: router=LossFreeBias(rate=0.01). "
        "Pass `router=routers.TopKRouter(balancer=LossFreeBias(rate=0.01))`.",
    ),
    "a loss without a weight": (
        lambda: moe(router_losses=[Weightless()]),
        TypeError,
        "`__init__` of `Weightless` must call that of its base class, `RouterLoss`. Received: an "
        "object for which it was not called. Call `super().__init__(weight, ...)` in it, first of "
        "all.",
    ),
    "experts is a class": (
        lambda: layers.MixtureOfExperts(layers.LayerExperts),
        ValueError,
        "`experts` must be an instance of `ExpertBank`. Received: "
        f"experts={layers.LayerExperts!r} (of type type). "
        "Make an instance of it, `LayerExperts(...)`.",
    ),
    "router": (
        lambda: moe(router="top-2"),
        ValueError,
        f"`router` must be an instance of `Router`{names_of(routers)}. "
        "Received: router='top-2' (of type str). Did you mean 'top_p'?",
    ),
    "router is None": (
        lambda: moe(router=None),
        ValueError,
        f"`router` must be an instance of `Router`{names_of(routers)}. "
        "Received: router=None (of type NoneType). Pass one of them.",
    ),
    "router and bank": (
        lambda: moe(router=routers.TopKRouter(3)),
        ValueError,
        "Router and experts must have the same number of experts. Received: "
        "router.num_experts=3, experts.num_experts=4. "
        "Leave `num_experts`, the first argument of the router, out, or give both the same number. "
        "How many experts serve a token is `top_k`.",
    ),
    "an argument of the router": (
        lambda: moe(top_k=1),
        TypeError,
        "`top_k` is an argument of the router. Received: MixtureOfExperts(..., top_k=1). Pass "
        "`router=routers.TopKRouter(top_k=1)`.",
    ),
    "arguments of the bank": (
        lambda: layers.MixtureOfExperts(num_experts=8, hidden_dim=64),
        TypeError,
        "`num_experts` is an argument of the bank of experts. Received: MixtureOfExperts(..., "
        "num_experts=8). Pass `layers.FeedForwardExperts(num_experts=8, hidden_dim=...)`.",
    ),
    "no bank": (
        lambda: layers.MixtureOfExperts(),
        TypeError,
        "`experts` must be a bank of experts. Received: none. Pass, for example, "
        "`layers.FeedForwardExperts(num_experts=8, hidden_dim=256)`, or Keras layers in "
        "`layers.LayerExperts([...])`.",
    ),
    "a router without experts": (
        lambda: routers.TopKRouter(top_k=1)(normal(3, D)),
        ValueError,
        "A router must know the number of experts before it is called. Received: `TopKRouter` "
        "without `num_experts`. Pass `num_experts`, or give the router to a `MixtureOfExperts` and "
        "use `layer.router`.",
    ),
    "a router that does not fit the experts": (
        lambda: moe(router=routers.TopKRouter(top_k=5)),
        ValueError,
        "`top_k` must be at most `num_experts`: a token cannot go to more experts than there are. "
        "Received: top_k=5, num_experts=4. Choose `top_k=4` or fewer for the `TopKRouter`.",
    ),
    "default router, one expert": (
        lambda: moe(layers.FeedForwardExperts(1, 8)),
        ValueError,
        "`top_k` must be at most `num_experts`: a token cannot go to more experts than there are. "
        "Received: top_k=2, num_experts=1. Choose `top_k=1` or fewer for the `TopKRouter`.",
    ),
    "top_k": (
        lambda: routers.TopKRouter(E, 5),
        ValueError,
        "`top_k` must be at most `num_experts`: a token cannot go to more experts than there are. "
        "Received: top_k=5, num_experts=4. Choose `top_k=4` or fewer for the `TopKRouter`.",
    ),
    "max_top_k of a top-p router": (
        lambda: routers.TopPRouter(E, max_top_k=5),
        ValueError,
        "`max_top_k` must be at most `num_experts`: a token cannot go to more experts than there "
        "are. Received: max_top_k=5, num_experts=4. "
        "Choose `max_top_k=4` or fewer for the `TopPRouter`.",
    ),
    "max_top_k below top_k": (
        lambda: routers.ReLURouter(E, top_k=3, max_top_k=2),
        ValueError,
        "`max_top_k` must be at least `top_k`, the mean that the loss aims at. Received: "
        "max_top_k=2, top_k=3. Raise the one or lower the other.",
    ),
    "router dtype": (
        lambda: routers.TopKRouter(E, dtype="bfloat16"),
        ValueError,
        "A router always computes in float32, whatever the policy around it. "
        "Received: dtype='bfloat16'. Leave `dtype` out.",
    ),
    "router loss": (
        lambda: moe(router_losses=["balance"]),
        ValueError,
        f"`router_losses` must be an instance of `RouterLoss`{names_of(losses)}. "
        "Received: router_losses='balance' (of type str). Did you mean 'load_balance'?",
    ),
    "router losses": (
        lambda: moe(router_losses="load_balance"),
        TypeError,
        "`router_losses` must be a list or tuple of losses or names. Received: "
        "router_losses='load_balance' (of type str). Pass, for example, "
        "`[losses.LoadBalance(0.01)]`, or `()` for none.",
    ),
    "shared expert": (
        lambda: moe(shared_expert=abs),
        ValueError,
        "`shared_expert` must be an instance of `Layer`. Received: "
        "shared_expert=<built-in function abs> (of type builtin_function_or_method). "
        "Pass a Keras layer.",
    ),
    "feedforward is a bank": (
        lambda: layers.TransformerEncoderBlock(2, layers.FeedForwardExperts(E, 8)),
        ValueError,
        "`feedforward` must be a layer of tokens: a bank of experts needs a router. Received: "
        "feedforward=`FeedForwardExperts`. Wrap it: `MixtureOfExperts(experts)`.",
    ),
    "feedforward": (
        lambda: layers.TransformerEncoderBlock(2, "moe"),
        ValueError,
        "`feedforward` must be an instance of `Layer`. Received: feedforward='moe' (of type str). "
        "Pass a Keras layer.",
    ),
    "activation with weights": (
        lambda: layers.FeedForwardExperts(E, 8, activation=keras.layers.PReLU(name="prelu")),
        TypeError,
        "`activation` must be an activation of Keras, its name, or a function of (x). Received: "
        "activation=<PReLU name=prelu, built=False> (of type PReLU). Put layers into a bank: "
        "`layers.LayerExperts([...])`.",
    ),
    "layers": (
        lambda: layers.LayerExperts("dense"),
        TypeError,
        "`layers` must be a list of Keras layers. Received: layers='dense' (of type str). "
        "Pass `LayerExperts([layer, layer, ...])`.",
    ),
    "no layers": (
        lambda: layers.LayerExperts([]),
        ValueError,
        "`layers` must hold at least one expert. Received: layers=[]. Pass one layer an expert.",
    ),
    "a function among layers": (
        lambda: layers.LayerExperts([dense(), abs]),
        TypeError,
        "`layers` must be a list of Keras layers. Received: <built-in function abs> "
        "(of type builtin_function_or_method) in it. Make an instance of a class, and wrap a "
        "function in `keras.layers.Lambda`.",
    ),
    "a layer twice": (
        lambda: layers.LayerExperts([SAME, SAME]),
        ValueError,
        "`layers` must be different objects: a layer that is listed twice would be one expert with "
        "two places. Received: ['same', 'same']. Make a new layer for each.",
    ),
    "rank of rows": (
        lambda: ops.grouped_matmul(normal(2, 3, D), normal(E, D, 2), [1, 1, 1, 1]),
        ValueError,
        "grouped_matmul takes rows (N, D), kernels (E, D, H) and group_sizes (E,). Received: "
        "rows.shape=(2, 3, 8), kernels.shape=(4, 8, 2), group_sizes.shape=(4,). "
        "Flatten all leading axes of rows into one.",
    ),
    "number of groups": (
        lambda: ops.grouped_matmul(normal(6, D), normal(E, D, 2), [3, 3]),
        ValueError,
        "The last axis of rows must equal the middle axis of kernels, and there must be one group "
        "size for each kernel. Received: rows.shape=(6, 8), kernels.shape=(4, 8, 2), "
        "group_sizes.shape=(2,). Change one of them.",
    ),
    "name of scores": (
        lambda: ops.top_k_routing(normal(2, E), 2, score="softmx"),
        ValueError,
        "`score` must be one of 'softmax', 'sigmoid', 'sqrt_softplus'. Received: score='softmx'. "
        "Did you mean 'softmax'?",
    ),
    "more choices than experts": (
        lambda: ops.top_k_routing(normal(2, 3), 4),
        ValueError,
        "`top_k` must be at most `num_experts`: a token cannot go to more experts than there are. "
        "Received: top_k=4, num_experts=3. Choose `top_k=3` or fewer.",
    ),
    "experts of a metric": (
        lambda: metrics.LoadEntropy(3).update_state(routers.TopKRouter(E)(normal(2, D))),
        ValueError,
        "The routing must have as many experts as the metric. Received: 4 experts, num_experts=3. "
        "Make the metric with num_experts=4.",
    ),
    "weights of a metric": (
        lambda: metrics.LoadEntropy(E).update_state(routers.TopKRouter(E)(normal(2, D)), 1.0),
        ValueError,
        "Usage metrics count assignments and take no weight. Received: sample_weight. "
        "Mask tokens out at the router.",
    ),
    "monitor without a layer": (
        lambda: _fit_with_monitor(keras.Sequential([keras.Input((D,)), dense()], name="plain")),
        ValueError,
        "The model must have at least one `MixtureOfExperts` layer. "
        "Received: model 'plain' without any. Add one, or leave this out.",
    ),
    "balancer": (
        lambda: routers.TopKRouter(E, balancer="lossfree"),
        ValueError,
        f"`balancer` must be an instance of `SelectionBalancer`{names_of(balancers)}. "
        "Received: balancer='lossfree' (of type str). Did you mean 'loss_free'?",
    ),
    "score": (
        lambda: routers.TopKRouter(E, score="linear"),
        ValueError,
        "`score` must be one of 'softmax', 'sigmoid', 'sqrt_softplus'. Received: score='linear'. "
        "Pass one of them.",
    ),
    "priority": (
        lambda: layers.Capacity(1.0, priority="positions"),
        ValueError,
        "`priority` must be one of 'position', 'probability', 'random'. "
        "Received: priority='positions'. Did you mean 'position'?",
    ),
    "abstract loss": (
        lambda: losses.RouterLoss(1.0)(None),
        NotImplementedError,
        "RouterLoss must implement `compute(routing)`.",
    ),
}


def _fit_with_monitor(model):
    model.compile("sgd", "mse")
    model.fit(normal(2, D), normal(2, D), callbacks=[callbacks.ExpertMonitor()], verbose=0)


@pytest.mark.parametrize("make, kind, message", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_wrong_argument_is_named_with_the_way_out(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == message


# Keras writes a header and the arguments of the call around errors raised inside `call`.
CALLS = {
    "integer inputs": (
        lambda: moe()(np.ones((2, D), "int32")),
        TypeError,
        "`inputs` must be a float tensor. Received: inputs.dtype=int32. "
        "Embed or cast integers first.",
    ),
    "integer inputs of a block": (
        lambda: layers.TransformerEncoderBlock(2, moe())(np.ones((2, 3, D), "int32")),
        TypeError,
        "`inputs` must be a float tensor. Received: inputs.dtype=int32. "
        "Embed or cast integers first.",
    ),
    "no batch axis": (
        lambda: moe()(normal(D)),
        ValueError,
        "`inputs` must have a batch axis and a last axis of known size. Received: "
        "inputs.shape=(8,). Pass (batch, ..., features), for example `keras.Input((None, 64))`.",
    ),
    "unknown features": (
        lambda: moe()(keras.Input((3, None))),
        ValueError,
        "`inputs` must have a batch axis and a last axis of known size. Received: "
        "inputs.shape=(None, 3, None). "
        "Pass (batch, ..., features), for example `keras.Input((None, 64))`.",
    ),
    "mask of another length": (
        lambda: moe()(normal(2, 3, D), mask=np.ones((2, 4), bool)),
        ValueError,
        "`mask` must have the shape of `inputs` without the last axis. Received: "
        "mask.shape=(2, 4), inputs.shape=(2, 3, 8). "
        "Pass a bool mask of shape (2, 3), False for padding.",
    ),
    "mask of another rank": (
        lambda: moe()(normal(2, 3, D), mask=np.ones((2, 3, 1), bool)),
        ValueError,
        "`mask` must have the shape of `inputs` without the last axis. Received: "
        "mask.shape=(2, 3, 1), inputs.shape=(2, 3, 8). "
        "Pass a bool mask of shape (2, 3), False for padding.",
    ),
    "mask of a block": (
        lambda: layers.TransformerEncoderBlock(2, moe())(normal(2, 3, D), mask=np.ones((2, 2))),
        ValueError,
        "`mask` must have the shape of `inputs` without the last axis. Received: "
        "mask.shape=(2, 2), inputs.shape=(2, 3, 8). "
        "Pass a bool mask of shape (2, 3), False for padding.",
    ),
    "mask of a router": (
        lambda: routers.TopKRouter(E)(normal(3, D), mask=np.ones((2,), bool)),
        ValueError,
        "`mask` must have the shape of `tokens` without the last axis. Received: "
        "mask.shape=(2,), tokens.shape=(3, 8). "
        "Pass a bool mask of shape (3,), False for padding.",
    ),
    "leading axes of a router": (
        lambda: routers.TopKRouter(E)(normal(2, 3, D)),
        ValueError,
        "A router takes tokens (T, D). Received: tokens.shape=(2, 3, 8). "
        "Flatten all leading axes into one.",
    ),
    "heads": (
        lambda: layers.TransformerEncoderBlock(3, moe())(normal(2, 3, D)),
        ValueError,
        "`inputs` must have the shape (batch, length, features), features divisible by "
        "`num_heads`. Received: inputs.shape=(2, 3, 8), num_heads=3. Change one of them.",
    ),
    "rank of a block": (
        lambda: layers.TransformerEncoderBlock(2, moe())(normal(2, D)),
        ValueError,
        "`inputs` must have the shape (batch, length, features), features divisible by "
        "`num_heads`. Received: inputs.shape=(2, 8), num_heads=2. Change one of them.",
    ),
    "width of a feed-forward": (
        lambda: layers.TransformerEncoderBlock(2, dense(3))(normal(2, 3, D)),
        ValueError,
        "`feedforward` must return as many features as it is given, for the residual. "
        "Received: 8 features in, 3 out. End it with a layer of width 8.",
    ),
    "width of a shared expert": (
        lambda: moe(shared_expert=dense(3))(normal(2, D)),
        ValueError,
        "The shared expert must return as many features as the routed experts. Received: "
        "3 features from shared_expert, 8 from experts. "
        "End the shared expert with a layer of width 8.",
    ),
    "widths of layers": (
        lambda: moe(layers.LayerExperts([dense(3, name="a"), dense(name="b")]))(normal(2, D)),
        ValueError,
        "All experts must return the same number of features. Received: [3, 8] features from "
        "['a', 'b']. End each expert with a layer of the same width.",
    ),
    "abstract router": (
        lambda: Routeless(E)(one_hot(0)),
        NotImplementedError,
        "Routeless must implement `route(tokens, mask, training)` and return an `ops.Routing`.",
    ),
    "abstract bank": (
        lambda: moe(layers.ExpertBank(E))(one_hot(0)),
        NotImplementedError,
        "ExpertBank must implement `call(tokens, plan)`.",
    ),
}


@pytest.mark.parametrize("call, kind, message", CALLS.values(), ids=CALLS)
def test_a_wrong_input_is_named_with_the_way_out(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    if text.startswith(CALLED):
        text = text.partition("\x1b[1m")[2].partition("\x1b[0m")[0]
    assert text == message
