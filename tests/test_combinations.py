"""Random combinations of what users can combine, against the oracle and against each other.

A layer is drawn as the text that makes it, and a failure prints the program that repeats it.
`COMBINATIONS_SEED` draws others, `COMBINATIONS_TIMES` more; `tools/test_many_combinations.py` does
both.
"""

import contextlib
import os
import pathlib
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import keras
import numpy as np
import pytest
import reference_mixtures as oracle
from backends import BACKEND, MODES, QUICK_JIT, assert_close, compiled, saved_and_loaded
from drawn import MASKS, draw_mask
from hypothesis import assume
from hypothesis import strategies as st
from layer_checks import array, gradients
from reference_mixtures import Weights, mixture, next_state
from test_own_experts import BranchedExperts, DeepExperts, NormalisedExperts

import keras_moe
from keras_moe import layers, losses, routers, surgery

NAMES = dict(
    keras=keras,
    layers=layers,
    losses=losses,
    routers=routers,
    DeepExperts=DeepExperts,
    NormalisedExperts=NormalisedExperts,
    BranchedExperts=BranchedExperts,
)
SEED = int(os.environ.get("COMBINATIONS_SEED", 0))
TIMES = int(os.environ.get("COMBINATIONS_TIMES", 1))
IS_COMPILED = BACKEND != "torch"
OPERATIONS: dict = {}
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


def _normalised(bank, linear, act):
    hidden = linear("up")
    hidden = act(hidden / np.sqrt(np.mean(hidden**2) + 1e-3) * linear("scale"))
    return linear("down", hidden)


def _branched(bank, linear, act):
    hidden = act(linear("left")) * linear("right")
    return linear.inputs + linear("join", hidden) + act(linear("short"))


oracle.FORMULAS |= {
    DeepExperts: lambda bank, linear, act: linear(
        "third", act(linear("second", act(linear("first"))))
    ),
    NormalisedExperts: _normalised,
    BranchedExperts: _branched,
}


# What is drawn


class Code(str):
    """The text of an expression."""

    __repr__ = str.__str__


def code(name, *args, **kwargs):
    named = [f"{key}={value!r}" for key, value in kwargs.items() if value is not None]
    return Code(f"{name}({', '.join([*map(repr, args), *named])})")


class Case(NamedTuple):
    """A layer as text, and what it is called with."""

    layer: str
    shape: tuple  # of the inputs
    mask: str | None = None  # a kind in `drawn.MASKS`
    policy: str = "float32"
    mode: str = MODES[0]
    seed: int = 0  # of weights, inputs and mask
    token_axes: int | None = None
    seen: int | None = None  # features that the router sees instead of the inputs
    operations: tuple = ()  # names in `OPERATIONS`
    upcycle: dict | None = None  # arguments of `keras_moe.upcycle`
    mesh: str | None = None  # of eight devices: "2x4" splits the experts over four

    def program(self, check):
        fields = "".join(
            f"    {name}={value!r},\n"
            for name, value in self._asdict().items()
            if value != self._field_defaults.get(name, "")
        )
        devices = f"XLA_FLAGS={EIGHT_DEVICES} " if self.mesh else ""
        return (
            f"{devices}KERAS_BACKEND={BACKEND} PYTHONPATH=.:tests:tests/tools python - <<END\n"
            f"from {check.__module__} import *\n"
            f"{check.__name__}({type(self).__name__}(\n{fields}))\nEND"
        )


def pick_from(draw):
    return lambda *values: draw(st.sampled_from(values))


def draw_bank(pick, number, features, width, kinds, noisy=False):
    """A bank of `number` experts."""
    kind, rate = pick(*kinds), 0.3 if noisy else None
    act = pick("gelu", "relu", "silu", "tanh")
    out = None if width == features else width
    use_bias = pick(True, False)
    if kind == "feed-forward":
        options = dict(use_bias=use_bias, output_dim=out, dropout=rate)
        return code("layers.FeedForwardExperts", number, 5, act, **options)
    if kind == "gated":
        options = dict(clip=pick(None, 0.5), up_shift=pick(None, 1.0), output_dim=out)
        return code(
            "layers.GatedExperts", number, 5, act, use_bias=use_bias, dropout=rate, **options
        )
    if kind == "linear":
        return code("layers.LinearExperts", number, width, use_bias=use_bias)
    if kind == "low-rank":
        base = draw_bank(pick, 1, features, width, ["feed-forward", "gated", "linear"])
        return code("layers.LowRankExperts", base, number, 2, alpha=pick(None, 3.0))
    if kind == "own":
        name = pick("DeepExperts", "NormalisedExperts", "BranchedExperts")
        return code(name, number, activation=act, use_bias=use_bias)
    if kind == "zero" and number > 1:
        inner = draw_bank(pick, number - 1, features, width, ["feed-forward", "gated", "layers"])
        which = pick("num_zero", "num_identity", "num_constant")
        return code("layers.ZeroComputationExperts", inner, **{which: 1})
    dense = code("keras.layers.Dense", width, pick("tanh", "gelu"))
    each = pick(dense, code("keras.Sequential", [code("keras.layers.Dense", 4, "relu"), dense]))
    return code("layers.LayerExperts", [each] * number)


BANKS = ["feed-forward", "gated", "linear", "low-rank", "own", "zero", "layers"]


def draw_router(pick, number, noisy, kinds):
    kind = pick(*kinds)
    k = pick(*{1, min(2, number), min(3, number)})
    noise = dict(logit_noise=0.3, input_jitter=0.1) if noisy else {}
    noise |= dict(hidden_dim=pick(None, None, 4), temperature=pick(None, None, 2.0))
    if kind in ("TopK", "Cosine", "GroupLimited"):
        noise |= dict(
            top_k=k,
            score=pick("softmax", "sigmoid", "sqrt_softplus"),
            renormalize=pick(None, True, False),
            scaling_factor=pick(None, 2.5),
            use_bias=pick(None, True),
        )
        momentum = code("routers.QuantileBias", momentum=0.75)
        balancers = None, "loss_free", "quantile", momentum, code("routers.LossFreeBias", 0.1)
        noise["balancer"] = pick(*balancers)
    if kind == "Cosine":
        noise["projection_dim"] = 3
    if kind == "GroupLimited":
        groups = pick(*[g for g in (1, 2, 3) if number % g == 0])
        enough = [g for g in range(1, groups + 1) if k <= g * number // groups]
        noise |= dict(num_groups=groups, top_groups=pick(*enough))
    if kind in ("NoisyTopK", "VMoE", "Sinkhorn"):
        noise["top_k"] = k
    if kind == "VMoE" and not noisy:
        noise["noise_std"] = 0.0
    if kind == "GShard":
        noise["threshold"] = 0.5 if noisy else 1e-9
    if kind == "TopP":
        noise |= dict(threshold=pick(0.3, 0.6), max_top_k=pick(None, k))
    if kind == "ReLU":
        noise |= dict(top_k=1, max_top_k=pick(None, k), initial_strength=0.05)
    if kind == "ExpertChoice":
        noise["capacity_factor"] = pick(0.5, 1.0, 1.7)
    if kind == "Soft":
        noise["slots"] = pick(1, 2)
    if kind == "DSelectK":
        noise = dict(top_k=k, per_example=pick(True, False), gamma=pick(1.0, 3.0))
    if kind == "Hash":
        noise = dict(vocabulary_size=7, top_k=k)
    return code(f"routers.{kind}Router", **noise)


CHOOSING = ["TopK", "TopK", "TopK", "Cosine", "GroupLimited", "NoisyTopK", "VMoE", "GShard", "TopP"]
CHOOSING += ["ReLU", "Dense", "DSelectK", "Sinkhorn", "BalancedAssignment"]
ROUTERS = [*CHOOSING, "Hash", "ExpertChoice", "Soft"]
POLICIES = ["float32"] * 4 + ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"]
POLICIES += ["float64"] if BACKEND != "jax" else []
LOSSES = [
    code("losses.LoadBalance", 0.3),
    code("losses.LoadBalance", 0.3, "sequence"),
    code("losses.LoadBalance", 0.3, "global"),
    code("losses.ImportanceVariation", 0.3),
    code("losses.RouterZ", 0.2),
    code("losses.RouterEntropy", 0.2),
    code("losses.SelectorEntropy", 0.2),
]


def draw_capacity(pick, noisy):
    factor = pick(0.5, 0.8, 1.3)
    evaluation = None if noisy else pick(None, 0.7)
    options = dict(minimum=pick(None, 2), multiple_of=pick(None, 2), evaluation_factor=evaluation)
    options |= dict(
        priority="random" if noisy else pick(None, "probability"), per_sequence=pick(None, True)
    )
    return pick(factor, code("layers.Capacity", factor, **options))


@st.composite
def cases(draw, noisy=(False,), banks=BANKS, kinds=ROUTERS, operations=False):
    """A mixture as a user could write it."""
    pick = pick_from(draw)
    # Where shapes are compiled, few of them.
    number = 4 if IS_COMPILED else pick(1, 2, 3, 4, 6)
    features = 6
    leading = [(7,), (2, 5), (3, 1), (2, 2, 3), (1,), (0,), (0, 4)]
    leading = [(6,), (2, 3)] if IS_COMPILED else leading
    if operations:  # No framework trains on an empty batch.
        leading = [each for each in leading if 0 not in each]
    token_axes, shape = None, (*pick(*leading), features)
    bank, of_token, noisy = pick(*banks), (), pick(*noisy)
    # Some banks return as many features as they get.
    width = features if bank in ("own", "zero") else pick(features, features, 5)
    if bank == "layers" and pick(True, False):
        of_token, token_axes = (2,), len(shape) - 1
        shape = (*shape[:-1], *of_token, features)
    experts = draw_bank(pick, number, features, width, [bank], noisy)
    if "ZeroComputation" in experts:
        kinds = [kind for kind in kinds if kind not in ("ExpertChoice", "Soft")]
    router = draw_router(pick, number, noisy, kinds)
    takes_capacity = not any(kind in router for kind in ("ExpertChoice", "Soft"))
    options = dict(router=router, token_axes=token_axes)
    if pick(True, False):
        options["router_losses"] = draw(st.lists(st.sampled_from(LOSSES), max_size=3))
    if takes_capacity and pick(True, False, False):
        options["capacity_factor"] = draw_capacity(pick, noisy)
    if pick(True, False, False):
        shared = code("keras.layers.Dense", width, "tanh")
        if width == features and pick(True, False):
            shared = code("layers.GatedFeedForward", 4)
        options["shared_expert"] = shared
        options["gated_shared_expert"] = None if of_token else pick(None, True)
    return Case(
        layer=str(code("layers.MixtureOfExperts", experts, **options)),
        shape=shape,
        mask=None if operations else pick(None, *MASKS),
        policy=pick("float32", "mixed_bfloat16") if IS_COMPILED else pick(*POLICIES),
        mode=MODES[0] if operations else pick(*MODES),
        seed=draw(st.integers(0, 2**16)),
        token_axes=token_axes,
        seen=pick(None, None, None, 3) if not operations and not of_token else None,
        operations=draw_operations(pick) if operations else (),
    )


def draw_operations(pick):
    names = [*sorted(OPERATIONS), "step", "save", "save", "save"]
    return tuple(pick(*names) for _ in range(pick(1, 2) if IS_COMPILED else pick(2, 3, 4)))


@st.composite
def many_tasks(draw, noisy=(False,), leading=((5,), (2, 4), (0,))):
    """A mixture of many tasks."""
    pick = pick_from(draw)
    leading, noisy = [(6,), (2, 3)] if IS_COMPILED else leading, pick(*noisy)
    kinds = ["feed-forward", "gated", "linear", "own", "layers"]
    number, own = pick(2, 4), pick(1, 2)
    bank = draw_bank(pick, number, 6, 6, kinds, noisy)
    options = dict(router=draw_router(pick, number, noisy, CHOOSING))
    options["router_losses"] = draw(st.lists(st.sampled_from(LOSSES), max_size=2))
    if pick(True, False):
        options["task_experts"] = [draw_bank(pick, own, 6, 6, kinds, noisy) for _ in range(2)]
        options["shared_output"] = pick(None, True)
        same = options["shared_output"] and draw_router(pick, number + 2 * own, noisy, CHOOSING)
        options["router"] = draw_router(pick, number + own, noisy, CHOOSING)
        if same:
            options["router"] = [options["router"], code("routers.DenseRouter"), same]
    elif pick(True, False):
        options["router"] = [options["router"], draw_router(pick, number, noisy, CHOOSING)]
    return Case(
        layer=str(code("layers.MultiGateMixtureOfExperts", bank, 2, **options)),
        shape=(*pick(*leading), 6),
        mask=pick(None, *MASKS),
        policy=pick("float32", "float32", "mixed_bfloat16"),
        mode=pick(*MODES),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def dense_models(draw):
    """Dense feed-forward networks, and how they are upcycled."""
    pick = pick_from(draw)
    granularity, copies = pick(1, 1, 2, 4), pick(1, 2, 3)
    shape = (*pick((6,), (2, 3)), 6)
    parts = [code("keras.Input", (*[None] * (len(shape) - 2), 6))]
    for _ in range(pick(1, 2)):
        act = pick("gelu", "relu", "silu", "tanh", "sigmoid", "leaky_relu")
        own, between = pick((act, []), (None, [code("keras.layers.Activation", act)]))
        between += pick([], [code("keras.layers.Dropout", 0.0)])
        width, use_bias = granularity * pick(2, 3, 8), pick(None, False)
        parts += [code("keras.layers.Dense", width, own, use_bias=use_bias), *between]
        parts.append(code("keras.layers.Dense", 6, use_bias=pick(None, False)))
    options = dict(num_experts=granularity * copies, granularity=granularity)
    options["top_k"] = granularity * pick(*range(1, copies + 1))
    options["rank"] = pick(None, 2) if granularity == 1 else None
    layer = str(code("keras.Sequential", parts))
    return Case(layer, shape, seed=draw(st.integers(0, 2**16)), upcycle=options)


# What is done with it


class Made(NamedTuple):
    """A layer with weights that are not those of its initializers, and a call of it."""

    layer: Any
    rng: Any
    inputs: Any  # with NaN at padding
    tokens: Any  # (T, ...) as the layer sees them
    mask: Any  # (T,)
    kwargs: dict
    length: Any
    others: dict  # of the call, for the oracle
    case: Any


@contextlib.contextmanager
def policy_of(case):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(case.policy)
    if case.policy == "float64":
        keras.config.set_floatx("float64")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(before)


def fill(layer, rng):
    """Move all weights that training would move, and the state of the router."""
    for variable in [*layer.trainable_variables, *frozen_kernels(layer)]:
        size = 0.6 if len(variable.shape) > 1 else 0.3
        value = array(variable)
        variable.assign(value + size * rng.normal(size=value.shape))
    for router in routers_of(layer):
        bias = getattr(router, "selection_bias", None)
        if bias is not None:
            bias.assign(0.1 * rng.normal(size=bias.shape))


def frozen_kernels(layer):
    bank = getattr(layer, "experts", None)
    return bank.base.weights if isinstance(bank, layers.LowRankExperts) else []


def routers_of(layer):
    return layer.router if isinstance(layer.router, list) else [layer.router]


def rounded(values, dtype):
    return array(keras.ops.cast(values, dtype)).astype("float64")


def make(case):
    keras.utils.set_random_seed(case.seed)
    rng = np.random.default_rng(case.seed)
    layer = eval(case.layer, dict(NAMES))
    num_axes = case.token_axes or len(case.shape) - 1
    sizes = case.shape[:num_axes]
    x = rng.normal(size=case.shape)
    mask = None if case.mask is None else draw_mask(rng, int(np.prod(sizes)), case.mask)
    kwargs, others = {}, {}
    dtype = layer.compute_dtype
    if "HashRouter" in case.layer:
        kwargs["token_ids"] = others["token_ids"] = rng.integers(-3, 20, sizes)
    if case.seen:
        seen = rng.normal(size=(*sizes, case.seen))
        kwargs["router_inputs"] = rounded(seen, dtype).astype("float32")
        others["seen"] = rounded(seen, dtype).reshape(-1, case.seen)
    shapes = {"router_inputs_shape": (None, *sizes[1:], case.seen)} if case.seen else {}
    layer.build((None, *case.shape[1:]), **shapes)
    fill(layer, rng)
    tokens = rounded(x, dtype).reshape(-1, *case.shape[num_axes:])
    # A cast of these is exact: XLA may leave out a cast to half precision and back.
    inputs = rounded(x, dtype).astype("float64" if case.policy == "float64" else "float32")
    real = np.ones(len(tokens), bool)
    if mask is not None:
        real = mask
        kwargs["mask"] = mask.reshape(sizes)
        inputs[~mask.reshape(sizes)] = np.nan
    length = int(np.prod(sizes[1:])) if len(sizes) > 1 else None
    return Made(layer, rng, inputs, tokens, real, kwargs, length, others, case)


def expected_of(made, training, read=None, still=None):
    return mixture(
        made.layer, made.tokens, made.mask, training, read, made.length, still, **made.others
    )


def is_sure(made, training):
    """Whether no rounding changes who serves whom."""
    layer, mask, others = made.layer, made.mask, dict(made.others)
    x = others.pop("seen", made.tokens)
    if training and isinstance(layer.router, routers.SinkhornRouter) and np.sum(mask) < 2:
        return False  # A plan of one token has equal shares for all experts.
    given = (layer, x, mask, training, None, made.length)
    clear = oracle.routing(*given, **others)
    for _ in range(4):
        moved = clear.raw_logits + 1e-4 * made.rng.normal(size=clear.raw_logits.shape)
        near = oracle.routing(*given, **others, logits=moved)
        if (near.served != clear.served).any() or (near.chosen != clear.chosen).any():
            return False
    return True


def is_random(case, training):
    """Whether a call draws random numbers, which the oracle does not know."""
    signs = "noise=", "NoisyTopK", "threshold=0.5", "dropout", "'random'"
    return training and any(sign in case.layer for sign in signs)


def run(made, mode, training, **flags):
    """What a call returns, and its losses; the state of the layer moves."""
    layer = made.layer
    arrays = [made.inputs, made.kwargs]
    if mode == "jit":

        def call(trainable, others, inputs, kwargs):
            returned, others, added = layer.stateless_call(
                trainable, others, inputs, **kwargs, training=training, **flags, return_losses=True
            )
            return returned, added, others

        values = [
            [array(v) if v.dtype != "bfloat16" else v.value for v in each]
            for each in (layer.trainable_variables, layer.non_trainable_variables)
        ]
        returned, added, state = compiled(call, mode)(*values, *arrays)
        for variable, value in zip(layer.non_trainable_variables, state):
            variable.assign(value)
        return returned, added

    def call(inputs, kwargs):
        return layer(inputs, **kwargs, training=training, **flags), layer.losses

    return compiled(call, mode)(*arrays)


TOLERANCES = {"float64": 2e-6, "float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}


def tolerance_of(layer):
    return TOLERANCES[layer.compute_dtype]


def assert_losses(added, expected):
    """The sum of the losses of a call, each of which a failure shows."""
    # NumPy adds them: twice, on a busy machine, the sum that JAX added operation by operation was
    # wrong by the value of one of them, and right when the same case ran again.
    values = [float(array(loss)) for loss in added]
    assert_close(sum(values), expected, max(1, abs(expected)), 3e-5, str(values))


def dense(routing, num_experts):
    """Weights (T, E) of a routing."""
    weights = np.zeros((len(routing.mask), num_experts))
    for t, k in np.argwhere(routing.indices >= 0):
        weights[t, routing.indices[t, k]] += routing.weights[t, k]
    return weights


def same_outputs(made, outputs, expected):
    outputs = np.asarray(outputs, "float64").reshape(expected.outputs.shape)
    scale = max(expected.size, 1.0)
    assert_close(outputs, expected.outputs, scale, tolerance_of(made.layer))


def check_formula(case):
    """Outputs, routing, losses, state, counters and gradients of a call."""
    with policy_of(case):
        made = make(case)
        layer, mask = made.layer, made.mask
        router, size = layer.router, layer.router.num_experts
        for training in (False, True):
            if is_random(case, training):
                continue
            assume(is_sure(made, training))
            expected = expected_of(made, training)
            routed = expected.routed
            if training:
                check_gradients(case, made, routed)
            before, state = layer.read_counts(), next_state(layer, routed)
            (outputs, routing), added = run(made, case.mode, training, return_routing=True)
            same_outputs(made, outputs, expected)
            assert str(outputs.dtype) in (layer.compute_dtype, "float32")
            assert_close(dense(routing, size), routed.weights, 1.0, 1e-5)
            assert_close(routing.probs[mask], routed.probs[mask], 1.0, 1e-5)
            close = assert_close if router.counted_by_weight else np.testing.assert_array_equal
            close(routing.counts, routed.counts)
            dropped = np.sum(routed.chosen) - np.sum(routed.served)
            if not isinstance(router, routers.SoftRouter):
                share = dropped / max(np.sum(routed.chosen), 1)
                assert_close(routing.dropped, share, 1.0, 1e-6)
            counts = layer.read_counts().since(before)
            if training:
                assert_losses(added, expected.total)
                close(counts.assignments, routed.counts)
                assert counts.dropped == dropped
                for name, value in state.items():
                    assert_close(array(getattr(router, name)), value, 1.0, 1e-5)
            else:
                assert not np.any(counts.assignments)


def check_gradients(case, made, routed):
    """Derivatives along two directions of all weights and inputs, by differences of the oracle."""
    layer, dtype = made.layer, made.layer.compute_dtype
    if dtype not in ("float32", "float64") or case.shape[0] == 0:
        return
    mode = "jit" if BACKEND == "jax" else case.mode
    found = gradients(layer, made.inputs, mode, training=True, **made.kwargs)
    variables = layer.trainable_variables
    assert all(each is not None for each in found.values())
    for _ in range(2):
        along = {v.path: made.rng.normal(size=v.shape) for v in variables}
        on_inputs = made.rng.normal(size=made.tokens.shape)
        on_inputs[~made.mask] = 0

        def value(step, along=along, on_inputs=on_inputs):
            read = Weights([(v, along[v.path]) for v in variables], step)
            moved = made._replace(tokens=made.tokens + step * on_inputs)
            if "seen" in made.others:
                moved = moved._replace(others=made.others)
            result = expected_of(moved, True, read, routed)
            ramp = np.linspace(0.5, 1.5, result.outputs.size).reshape(result.outputs.shape)
            return np.sum(ramp * result.outputs) + result.total

        slopes = [(value(step) - value(-step)) / (2 * step) for step in (1e-5, 2e-6)]
        if abs(slopes[0] - slopes[1]) > 1e-4 * max(1, abs(slopes[0])):
            continue  # a kink, such as that of a ReLU, or another choice
        parts = [np.sum(np.asarray(found[v.path], "float64") * along[v.path]) for v in variables]
        of_inputs = np.asarray(found["inputs"], "float64").reshape(on_inputs.shape)
        parts.append(np.sum(of_inputs * on_inputs))
        assert np.isfinite(of_inputs).all()
        assert_close(sum(parts), slopes[0], max(map(abs, [1.0, *parts])), 2e-3)


def check_relations(case):
    """What must not change an output: flags, a replay, order, other batches, more padding."""
    with policy_of(case):
        made = make(case)
        layer, mask = made.layer, made.mask
        assume(is_sure(made, False))
        (outputs, routing), _ = run(made, case.mode, False, return_routing=True)
        real = mask.reshape(made.inputs.shape[: case.token_axes or len(case.shape) - 1])
        limit = 3 * tolerance_of(layer)

        def same(other, one=outputs):
            scale = max(1.0, np.max(np.abs(one), initial=0))
            assert_close(np.asarray(other), np.asarray(one, "float64"), scale, limit)

        def again(change=lambda name, value: value, **flags):
            """What a call returns whose tensors are changed."""
            kwargs = {name: change(name, value) for name, value in made.kwargs.items()}
            kwargs |= flags.pop("kwargs", {})
            other = made._replace(inputs=change("inputs", made.inputs), kwargs=kwargs)
            return run(other, case.mode, False, **flags)[0]

        router = layer.router
        same(again())
        assert (np.asarray(outputs)[~real] == 0).all()
        if not isinstance(router, routers.SoftRouter) and layer.shared_expert is None:
            _, replayed, each = again(return_routing=True, return_expert_outputs=True)
            num_axes = real.ndim + 1
            weights = replayed.weights.reshape(
                each.shape[:num_axes] + (1,) * (each.ndim - num_axes)
            )
            same(np.sum(np.asarray(each, "float64") * weights, axis=real.ndim))
        if router.replays_indices:
            same(again(kwargs={"indices": routing.indices}))
        limited = layer.capacity is not None and layer.capacity.evaluation_factor is not None
        if limited or case.shape[0] == 0 or (made.length is None and not router.tokens_choose):
            return
        # Sequences, or tokens where there are none, in another order, and each by itself.
        order = made.rng.permutation(case.shape[0])
        same(again(lambda name, value: value[order]), outputs[order])
        if IS_COMPILED:
            return  # of other shapes
        parts = [again(lambda name, value, p=p: value[p]) for p in (slice(1), slice(1, None))]
        same(np.concatenate(parts))
        if made.length is not None and "mask" in made.kwargs:

            def longer(name, value):
                fill = {"inputs": np.nan, "mask": False}.get(name, 0)
                return np.concatenate([value, np.full_like(value, fill)], axis=1)

            same(again(longer)[:, : case.shape[1]])


# Operations


def outputs_of(model, made):
    return array(model(made.inputs)).astype("float64")


def weights_of(*parts):
    return {(n, v.name): array(v) for n, part in enumerate(parts) for v in part.weights}


def enable_lora(model, made, folder):
    before = outputs_of(model, made)
    with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
        made.layer.experts.enable_lora(2, lora_alpha=3.0)
    same_as(before, model, made)
    for variable in made.layer.trainable_variables:
        if "_lora_" in variable.name:
            variable.assign(array(variable) + 0.3 * made.rng.normal(size=variable.shape))
    return model


def merge_lora(model, made, folder):
    before, bank = outputs_of(model, made), made.layer.experts
    if not getattr(bank, "quantization_mode", None):
        keras_moe.merge_lora(model)
        same_as(before, model, made)
        return model
    kernels = [each.merged_kernel() for each in bank._kernels()]
    keras_moe.merge_lora(model)
    for each, kernel in zip(bank._kernels(), kernels, strict=True):
        # Rounded to integers again: half a step of an axis with 15 of them.
        assert np.max(np.abs(each.merged_kernel() - kernel)) <= np.ptp(kernel) / 14
    return model


def same_as(before, model, made):
    after = outputs_of(model, made)
    scale = max(1.0, np.max(np.abs(before), initial=0))
    assert_close(after, before, scale, 2 * tolerance_of(made.layer))


def quantize(mode):
    def operation(model, made, folder):
        if hasattr(made.layer.experts, "projections"):
            made.layer.experts.quantize(mode)
        return model

    return operation


def step(model, made, folder=None):
    """A training step, whose loss is that of the oracle; what is frozen stays."""
    layer = made.layer
    # Keras's norm of gradients in float16 would overflow above 256, and make the weights NaN.
    optimizer = keras.optimizers.SGD(0.05, clipvalue=0.3)
    model.compile(optimizer, "mse", jit_compile=QUICK_JIT)
    target = np.zeros(model.output_shape[1:], "float32")
    target = np.broadcast_to(target, (len(made.inputs), *target.shape)).astype("float32")
    known = not is_random(made.case, True) and is_sure(made, True)
    known = known and made.layer.compute_dtype in ("float32", "float64")
    expected = expected_of(made, True) if known else None
    state = next_state(layer, expected.routed) if known else {}
    before = {v.path: array(v) for v in layer.variables}
    trainable = {v.path for v in layer.trainable_variables}
    if not trainable:
        return model
    loss = model.train_on_batch(made.inputs, target)
    if known:
        wanted = np.mean(expected.outputs**2) + expected.total
        assert_close(loss, wanted, max(1.0, abs(wanted)), 1e-4)
    weights = [*layer.experts.weights, *layer.router.weights]
    for v in weights:
        assert np.isfinite(array(v)).all(), v.path
        if v.path not in trainable and v.path in before and "seed" not in v.path:
            moves = v.name in ("selection_bias", "measured", "measurements", "strength")
            assert (moves and layer.router.trainable) or (array(v) == before[v.path]).all(), v.path
    for name, value in state.items():
        if layer.router.trainable:
            assert_close(array(getattr(layer.router, name)), value, 1.0, 1e-5)
    return model


def save(model, made, folder):
    """Outputs of a loaded model are equal to the bit, and so are weights after another step."""
    if not getattr(model, "optimizer", None):
        step(model, made)  # so that states differ from their initial values
    again = saved_and_loaded(model, pathlib.Path(folder))
    if getattr(made.layer.experts, "lora_enabled", False):
        return again  # the corrections are in the kernels, which may be integers
    before = outputs_of(model, made)
    np.testing.assert_array_equal(outputs_of(again, made), before)
    if not model.trainable_variables:
        return again
    # Keras saves which layers are frozen, not which weights, as kernels after `merge_lora`.
    bank, loaded = made.layer.experts, again.layers[-1].experts
    if bank.trainable:
        for weight, other in zip(bank._trainable_variables, loaded._trainable_variables):
            other.trainable = weight.trainable
    same_step(model, again, made.inputs, np.zeros_like(before, "float32"))
    return again


def same_step(model, again, inputs, targets):
    """Weights of both models are equal to the bit after another step."""
    for each in (model, again):
        each.train_on_batch(inputs, targets)
    weights = ([*each.weights, *each.optimizer.variables] for each in (model, again))
    for one, other in zip(*weights, strict=True):
        if "value_" not in one.path:  # sums for the logs of an epoch
            np.testing.assert_array_equal(array(other), array(one), err_msg=one.path)


def prune(model, made, folder):
    layer = made.layer
    number = layer.router.num_experts
    least = max(layer.router.get_config().get("top_k") or 1, number - 1)
    scores = made.rng.permutation(number).astype("float32")
    parts = layer.experts, layer.router
    before = weights_of(*parts)
    groups = surgery.prune_experts(model, by=scores.astype("float32"), keep=least).experts
    same_slices(
        before, weights_of(layer.experts, layer.router), [g[0] for g in [*groups.values()][0]]
    )
    assert sorted(scores[[g[0] for g in [*groups.values()][0]]]) == list(
        range(number - least, number)
    )
    return model


def add(model, made, folder):
    before = weights_of(made.layer.experts, made.layer.router)
    (groups,) = surgery.add_experts(model, factor=2, noise=0.0).experts.values()
    after = weights_of(made.layer.experts, made.layer.router)
    same_slices(before, after, [group[0] for group in groups])
    fill(made.layer, made.rng)  # copies are ties
    return model


def same_slices(before, after, kept):
    """Each weight has the parts of these experts, along the axis whose size has changed."""
    for key, value in after.items():
        old = before.get(key)
        if old is None or old.shape == value.shape:
            continue
        if key[1] == "selection_bias" and len(kept) > len(set(kept)):
            continue  # copies share a softmax, and their biases are smaller with it
        axis = next(n for n, size in enumerate(value.shape) if size != old.shape[n])
        np.testing.assert_array_equal(value, np.take(old, kept, axis))


def merge(model, made, folder):
    number = made.layer.router.num_experts
    least = max(made.layer.router.get_config().get("top_k") or 1, number - 1)
    surgery.merge_experts(model, keep=least, data=[made.inputs])
    assert made.layer.router.num_experts == made.layer.experts.num_experts == least
    return model


def set_top_k(model, made, folder):
    number = made.layer.router.num_experts
    surgery.set_top_k(model, int(made.rng.integers(1, min(3, number) + 1)))
    return model


def freeze(model, made, folder):
    part = (made.layer.router, made.layer.experts)[int(made.rng.integers(2))]
    part.trainable = not part.trainable
    model.optimizer = None  # Keras wants such a model compiled again, as `step` does.
    return model


OPERATIONS |= {
    "LoRA": enable_lora,
    "merge LoRA": merge_lora,
    "int8": quantize("int8"),
    "int4": quantize("int4"),
    "step": step,
    "save": save,
    "prune": prune,
    "add": add,
    "merge": merge,
    "top k": set_top_k,
    "freeze": freeze,
}


def check_operations(case):
    """After each of some operations, outputs and gradients are those of the oracle."""
    with policy_of(case), tempfile.TemporaryDirectory() as folder:
        made = make(case)
        model = keras.Sequential([keras.Input(case.shape[1:]), made.layer])
        for number, name in enumerate(case.operations):
            before = outputs_of(model, made)
            try:
                model = OPERATIONS[name](model, made, folder)
            except (ValueError, NotImplementedError) as error:
                if "Received: " not in str(error) and "doesn't work well" not in str(error):
                    raise
                same_as(before, model, made)
            made = made._replace(layer=model.layers[-1])
            assume(is_sure(made, False))
            expected = expected_of(made, False)
            same_outputs(made, outputs_of(model, made), expected)
            if number == len(case.operations) - 1 and not is_random(case, True):
                if is_sure(made, True):
                    check_gradients(case, made, expected_of(made, True).routed)


def check_recomputation(case):
    """A training step in a `keras.RematScope` draws the same, and moves all weights equally."""
    with policy_of(case):
        results = []
        for mode in (None, "list_of_layers"):
            keras.utils.set_random_seed(case.seed)
            named = case.layer[:-1] + ", name='mixture')"
            with keras.RematScope(mode, layer_names=["mixture"]):
                made = make(case._replace(layer=named))
            model = keras.Sequential([keras.Input(case.shape[1:]), made.layer])
            model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=QUICK_JIT)
            target = np.zeros(np.shape(outputs_of(model, made)), "float32")
            loss = model.train_on_batch(made.inputs, target)
            results.append([loss, *map(array, model.variables)])
        # Compilers round at other places where a layer is a function of its own.
        limit = 2 * tolerance_of(made.layer) if IS_COMPILED else 1e-6
        for one, other in zip(*results, strict=True):
            assert_close(other, one, max(1.0, np.max(np.abs(one), initial=0)), limit)


def check_tasks(case):
    """Each task is a mixture over the experts of its banks."""
    with policy_of(case):
        made = make(case)
        layer = made.layer
        for training in (False, True):
            gates = []
            for gate in layer.tasks:
                parts = dict(experts=gate.banks, router=gate.router, capacity=None)
                parts |= dict(shared_expert=None, router_losses=gate.router_losses)
                parts |= dict(loss_weights_in_force=gate.loss_weights_in_force)
                gates.append(made._replace(layer=SimpleNamespace(**parts)))
            if is_random(case, training):
                continue
            assume(all(is_sure(gate, training) for gate in gates))
            expected = [expected_of(gate, training) for gate in gates]
            states = [next_state(gate.layer, e.routed) for gate, e in zip(gates, expected)]
            outputs, added = run(made, case.mode, training)
            for each, wanted in zip(outputs, expected, strict=True):
                same_outputs(made, each, wanted)
            if not training:
                continue
            wanted = sum(each.total for each in expected)
            assert_losses(added, wanted)
            for gate, e, state in zip(layer.tasks, expected, states):
                close = np.testing.assert_array_equal
                close = assert_close if gate.router.counted_by_weight else close
                close(array(gate.expert_counts), e.routed.counts)
                for name, value in state.items():
                    assert_close(array(getattr(gate.router, name)), value, 1.0, 1e-5)


def check_saved_tasks(case):
    """Outputs of a loaded model are equal to the bit, and so are weights after another step."""
    with policy_of(case), tempfile.TemporaryDirectory() as folder:
        made = make(case._replace(mask=None))
        inputs = keras.Input(case.shape[1:])
        model = keras.Model(inputs, made.layer(inputs))
        model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=QUICK_JIT)
        targets = [np.zeros(each.shape, "float32") for each in model(made.inputs)]
        # So that states differ from their initial values.
        model.train_on_batch(made.inputs, targets)
        again = saved_and_loaded(model, pathlib.Path(folder))
        for one, other in zip(model(made.inputs), again(made.inputs), strict=True):
            np.testing.assert_array_equal(array(other), array(one))
        same_step(model, again, made.inputs, targets)


def check_upcycling(case):
    """Outputs stay when dense networks become mixtures."""
    keras.utils.set_random_seed(case.seed)
    rng = np.random.default_rng(case.seed)
    model = eval(case.layer, dict(NAMES))
    for variable in model.trainable_variables:
        variable.assign(0.5 * rng.normal(size=variable.shape))
    inputs = rng.normal(size=case.shape).astype("float32")
    before = array(model(inputs))
    model = keras_moe.upcycle(model, **case.upcycle)
    assert {type(layer) for layer in model.layers} == {layers.MixtureOfExperts}
    for training in (False, True):
        after = array(model(inputs, training=training))
        assert_close(after, before, max(1.0, np.max(np.abs(before))), 1e-5)


ONE_TENSOR = [kind for kind in ROUTERS if kind != "Hash"]
# Of each kind the check, what is drawn, and how often on each backend.
KINDS = {
    "formula": (check_formula, cases(), dict(torch=120, tensorflow=15, jax=5)),
    "relations": (check_relations, cases(), dict(torch=80, tensorflow=15, jax=3)),
    "operations": (
        check_operations,
        cases((False, True), [*BANKS, "feed-forward", "gated"], ONE_TENSOR, operations=True),
        dict(torch=100, tensorflow=10, jax=2),
    ),
    "recomputation": (
        check_recomputation,
        cases((True,), kinds=ONE_TENSOR, operations=True),
        dict(torch=30, tensorflow=4, jax=2),
    ),
    "tasks": (check_tasks, many_tasks(), dict(torch=40, tensorflow=8, jax=2)),
    "saved tasks": (
        check_saved_tasks,
        many_tasks((False, True), leading=[(5,), (2, 4)]),
        dict(torch=6),
    ),
    "upcycling": (check_upcycling, dense_models(), dict(torch=10)),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if BACKEND in KINDS[kind][-1]])
def test_drawn_combinations(kind):
    check, strategy, numbers = KINDS[kind]
    check_draws(check, strategy, TIMES * numbers[BACKEND])


def check_draws(check, strategy, number):
    # Where cases are compiled, looking for the smallest one takes too long.
    phases = [hypothesis.Phase.generate] + ([] if IS_COMPILED else [hypothesis.Phase.shrink])

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=number,
        phases=phases,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def draws(case):
        # Printed with a failure.
        hypothesis.note(f"COMBINATIONS_SEED={SEED}, or:\n{case.program(check)}")
        check(case)

    draws()
