"""All operations of a sparse layer together, as `MixtureOfExperts` wires them, against the oracle.

Inputs, weights and masks are data of one compiled function, so that a shape is compiled once and
meets many batches.
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import reference
from backends import EXAMPLES, assert_close, differentiated
from drawn import MASKS, SKEWS, draw_mask
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import layers, losses, routers


class Config(NamedTuple):
    num_tokens: int = 24
    features: int = 3
    num_experts: int = 4
    top_k: int = 2
    hidden_dim: int = 5
    gated: bool = False
    activation: str = "gelu"
    use_bias: bool = True
    capacity_factor: float | None = None


pytestmark = pytest.mark.usefixtures("small_tiles")
# With a mask everywhere the tests of one configuration share its compiled function.
ALL = np.ones(Config().num_tokens, bool)


@functools.cache
def build(config, mode):
    """The layer as a function: `(x, weights, upstream, mask) -> (outputs, routing, ...)`."""
    bank = layers.GatedExperts if config.gated else layers.FeedForwardExperts
    layer = layers.MixtureOfExperts(
        bank(config.num_experts, config.hidden_dim, config.activation, config.use_bias),
        routers.TopKRouter(config.num_experts, config.top_k),
        router_losses=[losses.LoadBalance(1.0), losses.RouterZ(1.0)],
        capacity_factor=config.capacity_factor,
    )
    layer.build((None, config.features))
    names = [variable.name for variable in layer.trainable_variables]
    counters = [variable.path for variable in layer.non_trainable_variables]

    def objective(inputs, upstream, mask, old_counters):
        x, *trainable = inputs
        (outputs, routing), new_counters, router_losses = layer.stateless_call(
            trainable,
            old_counters,
            x,
            mask=mask,
            training=True,
            return_routing=True,
            return_losses=True,
        )
        loss = sum(router_losses)
        # Padding may give anything to later layers: its output must not be used.
        used = outputs * upstream
        if mask is not None:
            used = ops.where(ops.expand_dims(mask, 1), used, 0.0)
        return ops.sum(used) + loss, (outputs, routing, loss, new_counters)

    function = differentiated(objective, mode)

    def run(x, weights, upstream, mask=None):
        old = [ops.convert_to_numpy(variable) for variable in layer.non_trainable_variables]
        _, aux, (d_x, *d_trainable) = function(
            [x, *(weights[name] for name in names)], upstream, mask, old
        )
        outputs, routing, loss, new = aux
        by_name = {path.split("/")[-1]: value for path, value in zip(counters, new)}
        return outputs, routing, loss, by_name, d_x, dict(zip(names, d_trainable))

    return run


def draw_weights(config, rng, skew="balanced"):
    def normal(*shape):
        return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype("float32")

    experts, features, hidden = config.num_experts, config.features, config.hidden_dim
    weights = {
        "kernel": normal(features, experts),
        "down_kernel": normal(experts, hidden, features),
    }
    ups = ("gate", "up") if config.gated else ("up",)
    weights.update({f"{name}_kernel": normal(experts, features, hidden) for name in ups})
    if config.use_bias:
        weights.update({f"{name}_bias": normal(experts, 1, hidden)[:, 0] for name in ups})
        weights["down_bias"] = normal(experts, 1, features)[:, 0]
    # The first feature is always 1, so the first row of the router's kernel is its bias.
    if skew == "zipf":
        weights["kernel"][0] -= 2.0 * np.log(np.arange(experts) + 1.0)
    elif skew == "all-to-one":
        weights["kernel"][0, 0] += 8.0
    return weights


def draw_batch(config, rng, skew="balanced"):
    """Tokens, weights and an upstream gradient whose experts do not hang on a rounding error."""
    while True:
        weights = draw_weights(config, rng, skew)
        x = rng.normal(size=(config.num_tokens, config.features)).astype("float32")
        x[:, 0] = 1.0
        if reference.selection_gap(x @ weights["kernel"], config.top_k) > 1e-4:
            return x, weights, rng.normal(size=x.shape).astype("float32")


def check_against_oracle(config, result, x, weights, upstream, mask=None):
    outputs, routing, loss, counters, d_x, d_weights = result
    arguments = (config.activation, config.top_k)
    expected = reference.moe(x, weights, *arguments, mask, config.capacity_factor)
    d_x_expected, d_weights_expected = reference.moe_gradients(
        x, weights, *arguments, upstream, mask, config.capacity_factor
    )
    assert_close(outputs, expected.outputs)
    assert_close(loss, expected.loss)
    assert_close(routing.dropped, expected.dropped)
    np.testing.assert_array_equal(routing.counts, expected.routing.counts)
    np.testing.assert_array_equal(counters["expert_counts"], expected.routing.counts)
    assert_close(counters["dropped_count"], expected.dropped * np.sum(expected.routing.counts))
    assert set(d_weights) == set(weights)
    # The terms of a softmax's gradient, here of order 1, cancel where one expert takes all.
    assert_close(d_x, d_x_expected, scale=max(1.0, np.max(np.abs(d_x_expected))))
    for name, gradient in d_weights.items():
        scale = max(1.0 if name == "kernel" else 0.0, np.max(np.abs(d_weights_expected[name])))
        assert_close(gradient, d_weights_expected[name], scale=scale)


def assert_same(result, expected, tokens=slice(None), expected_tokens=slice(None)):
    """Two results agree on these tokens, the losses, the counts and the gradients of weights."""
    outputs, routing, loss, counters, d_x, d_weights = result
    assert_close(outputs[tokens], expected[0][expected_tokens])
    np.testing.assert_array_equal(routing.indices[tokens], expected[1].indices[expected_tokens])
    np.testing.assert_array_equal(routing.counts, expected[1].counts)
    assert_close(loss, expected[2])
    np.testing.assert_array_equal(counters["expert_counts"], expected[3]["expert_counts"])
    assert_close(d_x[tokens], expected[4][expected_tokens])
    for name, gradient in d_weights.items():
        assert_close(gradient, expected[5][name])


@st.composite
def configs(draw):
    num_experts = draw(st.integers(1, 6))
    return Config(
        num_tokens=draw(st.sampled_from([1, 2, 13, 24, 40])),
        features=draw(st.integers(2, 5)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        hidden_dim=draw(st.integers(1, 7)),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        use_bias=draw(st.booleans()),
        capacity_factor=draw(st.sampled_from([None, None, 0.3, 1.0, 1.5])),
    )


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gradients_of_the_oracle_equal_finite_differences(top_k, gated, capacity_factor):
    config = Config(7, top_k=top_k, num_experts=3, gated=gated, capacity_factor=capacity_factor)
    rng = np.random.default_rng(3)
    x, weights, upstream = draw_batch(config, rng)
    x, weights = x.astype("float64"), {k: v.astype("float64") for k, v in weights.items()}
    mask = np.arange(7) != 4

    def objective(x, weights):
        result = reference.moe(x, weights, "gelu", top_k, mask, capacity_factor)
        return np.sum(upstream * result.outputs) + result.loss

    d_x, d_weights = reference.moe_gradients(
        x, weights, "gelu", top_k, upstream, mask, capacity_factor
    )
    numeric = reference.finite_differences(lambda x: objective(x, weights), x)
    assert_close(d_x, numeric, tolerance=1e-7)
    for name in weights:
        numeric = reference.finite_differences(
            lambda value, name=name: objective(x, {**weights, name: value}), weights[name]
        )
        assert_close(d_weights[name], numeric, tolerance=1e-7)


def test_outputs_losses_counts_and_all_gradients_equal_the_oracle(mode):
    @settings(max_examples=EXAMPLES[mode])
    @given(configs(), st.integers(0, 2**32), st.sampled_from([0.0, np.nan, np.inf, 1e30]))
    @example(Config(gated=True, capacity_factor=0.8), 0, np.nan)
    def check(config, seed, content):
        run, rng = build.__wrapped__(config, mode), np.random.default_rng(seed)
        for skew, kind in zip((*SKEWS, "zipf"), MASKS):
            x, weights, upstream = draw_batch(config, rng, skew)
            mask = draw_mask(rng, config.num_tokens, kind)
            x[~mask] = content
            result = run(x, weights, upstream, mask)
            check_against_oracle(config, result, x, weights, upstream, mask)

    check()


def test_in_a_dropless_layer_batch_mates_do_not_matter(mode):
    rng, run = np.random.default_rng(0), build(Config(), mode)
    x, weights, upstream = draw_batch(Config(), rng, "zipf")
    alone = run(x, weights, upstream, ALL)
    others = np.concatenate([x[:10], 9.0 * rng.normal(size=(14, 3))]).astype("float32")
    assert_close(run(others, weights, upstream, ALL)[0][:10], alone[0][:10])


def test_appended_padding_of_any_content_changes_nothing(mode):
    short = Config(num_tokens=16)
    x, weights, upstream = draw_batch(short, np.random.default_rng(0), "zipf")
    truncated = build(short, mode)(x, weights, upstream)
    run = build(Config(), mode)
    mask = np.arange(24) < 16
    for content in (0.0, np.nan, np.inf, -np.inf, 1e30, -3e38):
        padding = np.full((8, 3), content, "float32")
        padded = run(
            np.concatenate([x, padding]), weights, np.concatenate([upstream, padding]), mask
        )
        assert_same(padded, truncated, tokens=slice(16))
        assert not np.any(padded[0][16:]) and not np.any(padded[4][16:])


def test_a_nan_token_spoils_its_own_output_only(mode):
    rng, run = np.random.default_rng(0), build(Config(), mode)
    x, weights, upstream = draw_batch(Config(), rng)
    clean = run(x, weights, upstream, ALL)[0]
    x[5] = np.nan
    spoilt = run(x, weights, upstream, ALL)[0]
    others = np.arange(24) != 5
    assert np.all(np.isnan(spoilt[5]))
    assert_close(spoilt[others], clean[others])


def test_a_broken_expert_spoils_its_own_tokens_and_gradients_only(mode):
    rng, run = np.random.default_rng(0), build(Config(), mode)
    x, weights, upstream = draw_batch(Config(), rng)
    clean = run(x, weights, upstream, ALL)
    weights["up_kernel"][3] = np.nan
    outputs, routing, _, _, _, d_weights = run(x, weights, upstream, ALL)
    spoilt = np.any(routing.indices == 3, axis=1)
    assert 0 < np.sum(spoilt) < 24
    assert np.all(np.isnan(outputs[spoilt]))
    assert_close(outputs[~spoilt], clean[0][~spoilt])
    for name in set(weights) - {"kernel"}:
        assert_close(d_weights[name][:3], clean[5][name][:3])


def test_a_zero_router_uses_the_first_experts_alone_and_still_learns(mode):
    x, weights, upstream = draw_batch(Config(), np.random.default_rng(0))
    weights["kernel"] = np.zeros_like(weights["kernel"])
    result = build(Config(), mode)(x, weights, upstream, ALL)
    check_against_oracle(Config(), result, x, weights, upstream)
    np.testing.assert_array_equal(result[1].counts, [24, 24, 0, 0])
    for name, gradient in result[5].items():
        if name == "kernel":
            assert np.all(np.isfinite(gradient)) and np.any(gradient)
        else:
            assert not np.any(gradient[2:]), f"{name} has a gradient for experts without a token"
