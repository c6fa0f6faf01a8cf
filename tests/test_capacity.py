"""Capacities: how much room there is, and who is served first."""

import keras
import numpy as np
import pytest
from backends import FAST_MODE, assert_close, compiled
from layer_checks import E, array, moe, one_hot, one_hot_router

from keras_moe import layers
from keras_moe.ops import plan_groups, top_k_routing

# Two choices, three experts, two places each. Tokens from top to bottom:
#
#     token   probabilities     choices   first choice
#     0       .6  .3  .1        0, 1      .6
#     1       .7  .2  .1        0, 1      .7
#     2       .8  .1  .1        0, 1      .8
#
# By position:     0 serves 0 and 1; then 1, second choices, serves 0 and 1. Dropped: both of 2.
# By probability:  0 serves 2 and 1; then 1 serves 2 and 1. Dropped: both of 0.
PROBS = np.array([[0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.8, 0.15, 0.05]])


def served(**limits):
    def function(logits):
        plan = plan_groups(top_k_routing(logits, 2), **limits)
        return plan.groups.sizes, plan.groups.rows_of_token >= 0

    return compiled(function, FAST_MODE)(np.log(PROBS).astype("float32"))


def test_by_position_earlier_tokens_are_served():
    sizes, is_served = served(capacity=2)
    assert sizes.tolist() == [2, 2, 0]
    assert is_served.tolist() == [[True, True], [True, True], [False, False]]


def test_by_urgency_the_most_urgent_are_served():
    urgency = keras.ops.convert_to_tensor(PROBS.max(axis=1).astype("float32"))
    sizes, is_served = served(capacity=2, first=urgency)
    assert sizes.tolist() == [2, 2, 0]
    assert is_served.tolist() == [[False, False], [True, True], [True, True]]


def test_first_choices_are_served_before_more_urgent_second_ones():
    # Tokens 0 and 1 choose 0 then 1; token 2 chooses 1 then 0 and is the most urgent. One place:
    # 0 serves token 1, the most urgent first choice, and 1 serves token 2.
    probs = np.array([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9]])

    def function(logits):
        routing = top_k_routing(logits, 2)
        first = keras.ops.max(routing.probs, axis=-1)
        return plan_groups(routing, capacity=1, first=first).groups.rows_of_token >= 0

    is_served = compiled(function, FAST_MODE)(np.log(probs).astype("float32"))
    assert is_served.tolist() == [[False, False], [True, False], [True, False]]


def run(capacity, experts, training=True, mask=None):
    """Which tokens (B, S) are served, each of which chooses one expert."""
    layer = moe(
        layers.FeedForwardExperts(E, 8, bias_initializer="ones"),
        router=one_hot_router(),
        router_losses=(),
        capacity_factor=capacity,
    )
    tokens = np.stack([one_hot(*sequence) for sequence in experts])
    tokens = np.concatenate([tokens, np.zeros_like(tokens)], axis=-1)
    outputs, routing = layer(tokens, mask=mask, training=training, return_routing=True)
    return array(outputs).any(axis=-1), float(routing.dropped)


CROWDED = [[0, 0, 0, 0], [0, 1, 2, 3]]


def test_a_number_limits_training_and_not_evaluation():
    is_served, dropped = run(1.0, CROWDED)
    assert is_served.tolist() == [[True, True, False, False], [False, True, True, True]]
    assert dropped == 3 / 8
    is_served, dropped = run(1.0, CROWDED, training=False)
    assert is_served.all() and dropped == 0


def test_evaluation_may_have_a_factor_of_its_own():
    capacity = layers.Capacity(4.0, evaluation_factor=0.5)
    assert run(capacity, CROWDED)[0].all()
    is_served, _ = run(capacity, CROWDED, training=False)
    assert is_served.tolist() == [[True, False, False, False], [False, True, True, True]]


@pytest.mark.parametrize(
    "options, room",
    [
        ({}, 1),
        ({"minimum": 3}, 3),
        ({"multiple_of": 2}, 2),
        ({"minimum": 3, "multiple_of": 2}, 4),
        ({"minimum": 9}, 5),
    ],
)
def test_room_is_rounded_up_and_has_a_minimum(options, room):
    is_served, _ = run(layers.Capacity(0.5, **options), CROWDED)
    assert is_served[0].sum() + is_served[1, 0] == room


def test_sequences_compete_among_themselves_only():
    capacity = layers.Capacity(1.0, per_sequence=True)
    is_served, _ = run(capacity, [[0, 0, 1, 1], [0, 0, 0, 1]])
    assert is_served.tolist() == [[True, False, True, False], [True, False, False, True]]


def test_padding_takes_no_room():
    mask = np.array([[False, True, True, True], [True] * 4])
    is_served, _ = run(
        layers.Capacity(1.0, per_sequence=True), [[0, 0, 1, 2], [0, 1, 2, 3]], mask=mask
    )
    assert is_served.tolist() == [[False, True, True, True], [True] * 4]


def test_random_priority_serves_as_many_and_not_always_the_same():
    capacity = layers.Capacity(1.0, priority="random")
    layer = moe(router=one_hot_router(), router_losses=(), capacity_factor=capacity)
    tokens = np.concatenate([one_hot(*[0] * 16), np.zeros((16, 4), "float32")], axis=-1)
    layer.build(tokens.shape)
    trainable = [array(variable) for variable in layer.trainable_variables]

    def step(state, trainable, tokens):
        return layer.stateless_call(trainable, state, tokens, training=True)

    step = compiled(step, FAST_MODE)
    state = [keras.ops.convert_to_numpy(variable) for variable in layer.non_trainable_variables]
    draws = set()
    for _ in range(5):
        outputs, state = step(state, trainable, tokens)
        draws.add(tuple(outputs.any(axis=-1)))
    assert len(draws) > 1
    assert {sum(draw) for draw in draws} == {4}
    # Not the first ones more often than the last: some draw serves a token of the second half.
    assert any(any(draw[8:]) for draw in draws)


def test_experts_without_computation_have_no_limit():
    bank = layers.ZeroComputationExperts(
        layers.FeedForwardExperts(E - 2, 8), num_zero=1, num_identity=1
    )
    layer = moe(bank, router=one_hot_router(), router_losses=(), capacity_factor=1.0)
    identity = E - 1
    tokens = np.concatenate([one_hot(*[identity] * 10, *[0] * 6), np.ones((16, 2), "float32")], 1)
    outputs, routing = layer(tokens, training=True, return_routing=True)
    # Of the six tokens of the first expert, `ceil(16 / 4)` find a slot.
    assert float(routing.dropped) == 2 / 16
    assert_close(array(outputs)[:10], array(routing.weights)[:10] * tokens[:10])
