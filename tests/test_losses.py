"""Router losses: by hand, against their formulas, in sequences and over several batches."""

import warnings

import keras
import numpy as np
import pytest
import reference
from backends import (
    FAST_MODE,
    assert_close,
    compiled,
    differentiated,
    on_each_backend,
    on_one_backend,
    to_numpy,
)
from keras import ops
from layer_checks import D, array, moe, normal

from keras_moe import losses, routers
from keras_moe.ops import top_k_routing
from keras_moe.ops.routing import weigh
from keras_moe.ops.selection import SCORES

pytestmark = on_one_backend

T, E, S = 12, 4, 4


def draw(seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random(T) < 0.7
    mask[:S] = [True, True, False, False]
    return rng.normal(size=(T, E)).astype("float32"), mask


def sequence_oracle(logits, mask):
    """Mean over the sequences with a real token of the loss of each alone."""
    values = []
    for start in range(0, T, S):
        part = slice(start, start + S)
        if mask[part].any():
            values.append(
                reference.load_balance(reference.top_k_routing(logits[part], 2, mask[part]))
            )
    return np.mean(values)


def squared_variation(values):
    return np.var(values) / np.mean(values) ** 2


def importance_oracle(logits, mask):
    return squared_variation(reference.top_k_routing(logits, 2, mask).probs.sum(axis=0))


def load_oracle(logits, mask):
    return squared_variation(reference.top_k_routing(logits, 2, mask).counts)


def entropy_oracle(logits, mask):
    p = reference.top_k_routing(logits, 2, mask).probs[mask]
    return np.mean(-np.sum(p * np.log(p), axis=1))


CASES = {
    "sequence_load_balance": sequence_oracle,
    "importance_variation": importance_oracle,
    "load_variation": load_oracle,
    "router_entropy": entropy_oracle,
    "selector_entropy": entropy_oracle,
}


def values_of(logits, mask):
    routing = top_k_routing(logits, 2, mask)
    found = {name: losses.get(name) for name in CASES}
    return {
        name: loss.compute(routing, **({"sequence_length": S} if loss.scope == "sequence" else {}))
        for name, loss in found.items()
    }


@on_each_backend
def test_losses_equal_their_formulas_whatever_padding_holds(mode):
    logits, mask = draw()
    padded = np.where(mask[:, None], logits, np.nan).astype("float32")
    values = compiled(values_of, mode)(padded, mask)
    for name, value in values.items():
        assert_close(value, CASES[name](logits, mask))


def test_gradients_equal_differences():
    logits, mask = draw(1)
    # Without noise in the router the load is a number without a gradient.
    weights = {"sequence_load_balance": 1.0, "importance_variation": 0.3, "router_entropy": -0.7}

    def objective(inputs, mask):
        values = values_of(inputs[0], mask)
        return sum(weight * values[name] for name, weight in weights.items()), ()

    def oracle(logits):
        return sum(weight * CASES[name](logits, mask) for name, weight in weights.items())

    _, _, (gradient,) = differentiated(objective, FAST_MODE)([logits], mask)
    differences = reference.finite_differences(oracle, logits.astype("float64"))
    assert_close(gradient, differences, tolerance=1e-4)


def test_of_padding_alone_losses_are_zero():
    logits = np.full((T, E), np.nan, "float32")
    values = compiled(values_of, FAST_MODE)(logits, np.zeros(T, bool))
    assert not any(values.values())


def test_the_entropies_of_selectors_are_summed():
    router = routers.DSelectKRouter(E, 3, seed=0)
    x, mask = normal(T, D), np.arange(T) % 3 > 0
    router.build(x.shape)
    router.bias.assign(80 * router.bias)  # some bits exact
    routing = router(x, mask=mask)
    p = array(routing.details["selectors"]).astype("float64")[mask]
    expected = np.mean(-np.sum(p * np.log(np.where(p > 0, p, 1)), axis=(1, 2)))
    assert p.min() == 0 and expected > 0
    assert_close(array(losses.SelectorEntropy(0.5)(routing)), 0.5 * expected)


@pytest.mark.parametrize("router", ["top_k", "dense"])
def test_the_layer_tells_the_loss_what_a_sequence_is(router):
    layer = moe(router=router, router_losses=[losses.LoadBalance(1.0, scope="sequence")])
    x = normal(3, 5, D)
    layer(x, training=True)
    (value,) = layer.losses
    parts = []
    for sequence in x:
        routing = layer.router(sequence)
        parts.append(array(losses.LoadBalance(1.0)(routing)))
    assert_close(array(value), np.mean(parts))


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
@pytest.mark.parametrize("name", routers.IDENTIFIERS)
def test_layers_warn_where_the_load_balance_is_constant(name, scope):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = moe(router=name, router_losses=[losses.LoadBalance(1.0, scope)])
    values = []
    for seed in range(3):
        layer(10 * normal(3, 5, D, seed=seed), training=True)
        values.append(sum(map(array, layer.losses)))
    assert len(caught) == (np.ptp(values) < 1e-6)


def test_the_last_of_several_accumulated_batches_sees_the_shares_of_all():
    steps = 3
    loss = losses.LoadBalance(1.0, accumulation_steps=steps, scope="global")
    layer = moe(router_losses=[loss])
    batches = [normal(8, D, seed=seed) for seed in range(2 * steps)]
    values, routings = [], []
    for batch in batches:
        _, routing = layer(batch, training=True, return_routing=True)
        values.append(array(layer.losses[0]))
        routings.append(to_numpy(routing))
    for group in (slice(0, steps), slice(steps, 2 * steps)):
        counts = np.zeros(E)
        for value, routing in zip(values[group], routings[group]):
            counts += routing.counts
            expected = E * np.sum(counts / counts.sum() * routing.probs.mean(axis=0))
            assert_close(value, expected)


@on_each_backend
@pytest.mark.parametrize("name", ["noisy_top_k", "v_moe"])
def test_the_load_of_a_noisy_router_can_be_evened_out_by_its_gradient(name):
    router = routers.get(name, num_experts=E)
    router.build((None, D))
    kernel = array(router.kernel)
    state = [array(variable) for variable in router.non_trainable_variables]
    rest = [array(variable) for variable in router.trainable_variables[1:]]

    def objective(inputs, tokens, rest, state):
        routing, _ = router.stateless_call([inputs[0], *rest], state, tokens, training=True)
        return losses.LoadVariation(1.0)(routing), ()

    _, _, (gradient,) = differentiated(objective, FAST_MODE)([kernel], normal(16, D), rest, state)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_scores_far_below_zero_cannot_hide_from_the_balance_loss():
    """Sigmoids all near 0 on which a tiny epsilon would make every probability vanish."""
    logits = np.full((T, E), -60.0, "float32")
    routing = to_numpy(top_k_routing(ops.convert_to_tensor(logits), 2, score="sigmoid"))
    assert_close(routing.probs.sum(axis=1), np.ones(T))
    assert_close(routing.weights.sum(axis=1), np.ones(T))


def test_no_score_divides_zero_by_zero():
    """A selection bias may choose experts whose scores have all vanished."""
    logits = np.tile([[90.0, -90.0, -90.0, -90.0]], (T, 1)).astype("float32")

    def function(z):
        last = ops.zeros((T, 2), "int32") + 2
        return [weigh(last, z, scores(z), name)[0] for name, scores in SCORES.items()]

    assert np.isfinite(compiled(function, FAST_MODE)(logits)).all()


def test_an_expert_outside_of_the_chosen_groups_never_wins():
    """With negative biased scores a masked expert of score 0 would beat an admitted one."""
    router = routers.GroupLimitedRouter(
        4,
        num_groups=2,
        top_groups=1,
        balancer="loss_free",
        kernel_initializer=keras.initializers.Identity(),
    )
    router.build((None, 4))
    router.selection_bias.assign([-5.0, -5.0, -6.0, -6.0])
    routing = to_numpy(router(normal(T, 4)))
    assert set(routing.indices.ravel()) == {0, 1}


def test_jitter_reaches_the_router_and_not_the_experts():
    layer = moe(router=routers.TopKRouter(E, top_k=E, input_jitter=0.5), router_losses=())
    layer.build((None, D))
    # With a kernel of zeros all experts serve with equal weight, whatever the router sees.
    layer.router.kernel.assign(np.zeros((D, E)))
    x = normal(6, D)
    np.testing.assert_array_equal(array(layer(x, training=True)), array(layer(x)))


def loss_of_logits(loss, logits, top_k=1, mask=None):
    function = compiled(lambda logits, mask: loss(top_k_routing(logits, top_k, mask)), FAST_MODE)
    return function(np.asarray(logits, "float32"), mask)


def test_losses_of_small_examples_are_what_a_hand_computes():
    # Three tokens, two experts. P = (0.9 + 0.6 + 0.3) / 3 = 0.6 for expert 0, and 0.4.
    # The first two tokens choose expert 0: f = 2/3 and 1/3. 2 * (2/3 * 0.6 + 1/3 * 0.4) = 16/15.
    logits = np.log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert_close(loss_of_logits(losses.LoadBalance(1.0), logits), 16 / 15)
    assert_close(loss_of_logits(losses.LoadBalance(1.0, scope="sequence"), logits), 16 / 15)
    # In a collapse onto two of six experts f = 1/2 and P = 1/2 for both: 6 * (1/4 + 1/4) = 3.
    logits = np.where(np.arange(6) < 2, 50.0, np.zeros((10, 1)))
    assert_close(loss_of_logits(losses.LoadBalance(1.0), logits, top_k=2), 3)
    # exp sums to e^2 in the first row and to 4 in the second.
    logits = [[2.0 + np.log(0.5), 2.0 + np.log(0.5)], [np.log(3.0), 0.0]]
    assert_close(loss_of_logits(losses.RouterZ(1.0), logits), (4.0 + np.log(4.0) ** 2) / 2)


# The global loss works in a layer only.
@pytest.mark.parametrize("name", sorted({*losses.IDENTIFIERS} - {"global_load_balance"}))
def test_a_loss_is_proportional_to_its_weight_which_survives_its_config(name):
    whole, half, none = (
        losses.get(keras.saving.serialize_keras_object(losses.IDENTIFIERS[name](weight)))
        for weight in (np.float32(1), np.array(0.5), 0)
    )
    routing = top_k_routing(np.random.default_rng(0).normal(size=(9, 4)).astype("float32"), 1)
    values = [float(loss(routing)) for loss in (whole, half, none)]
    assert values[0] > 0
    assert_close(values, [values[0], values[0] / 2, 0])


def test_weights_by_default_are_those_of_the_papers():
    names = ["load_balance", "sequence_load_balance", "router_z", "router_entropy"]
    assert [losses.get(name).weight for name in names] == [1e-2, 1e-4, 1e-3, 1e-4]
