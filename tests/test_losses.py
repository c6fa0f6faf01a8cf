"""Router losses as objects: their values at known routings, their weights, their gradients."""

import keras
import numpy as np
import pytest
from backends import FAST_MODE, MODES, assert_close, compiled

from keras_moe import losses
from keras_moe.ops import top_k_routing


def loss_of_logits(loss, logits, top_k=1, mask=None):
    function = compiled(lambda logits, mask: loss(top_k_routing(logits, top_k, mask)), FAST_MODE)
    return function(np.asarray(logits, "float32"), mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_load_balance_loss_is_one_at_balance_whatever_the_probabilities(top_k, mode):
    loss = losses.LoadBalance(1.0)
    function = compiled(lambda logits: loss(top_k_routing(logits, top_k)), mode)
    # Token t prefers the experts t, t + 1, ..., so that all are chosen equally often.
    rank = (np.arange(5) - np.arange(5)[:, None]) % 5
    for height in (0.0, 1.0, 30.0):
        logits = np.where(rank < top_k, height + 1.0 - 0.1 * rank, 0.0).astype("float32")
        assert_close(function(logits), 1.0)


def test_losses_of_small_examples_are_what_a_hand_computes():
    # Three tokens, two experts. P = (0.9 + 0.6 + 0.3) / 3 = 0.6 for expert 0, and 0.4.
    # The first two tokens choose expert 0: f = 2/3 and 1/3. 2 * (2/3 * 0.6 + 1/3 * 0.4) = 16/15.
    logits = np.log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert_close(loss_of_logits(losses.LoadBalance(1.0), logits), 16 / 15)
    assert_close(loss_of_logits(losses.SequenceLoadBalance(1.0), logits), 16 / 15)
    # In a collapse onto two of six experts f = 1/2 and P = 1/2 for both: 6 * (1/4 + 1/4) = 3.
    logits = np.where(np.arange(6) < 2, 50.0, np.zeros((10, 1)))
    assert_close(loss_of_logits(losses.LoadBalance(1.0), logits, top_k=2), 3)
    # exp sums to e^2 in the first row and to 4 in the second.
    logits = [[2.0 + np.log(0.5), 2.0 + np.log(0.5)], [np.log(3.0), 0.0]]
    assert_close(loss_of_logits(losses.RouterZ(1.0), logits), (4.0 + np.log(4.0) ** 2) / 2)


# The global loss works in a layer only.
@pytest.mark.parametrize("name", sorted({*losses.BY_NAME} - {"global_load_balance"}))
def test_a_loss_is_proportional_to_its_weight_which_survives_its_config(name):
    whole, half, none = (
        losses.get(keras.saving.serialize_keras_object(losses.BY_NAME[name](weight)))
        for weight in (np.float32(1), np.array(0.5), 0)
    )
    routing = top_k_routing(np.random.default_rng(0).normal(size=(9, 4)).astype("float32"), 1)
    values = [float(loss(routing)) for loss in (whole, half, none)]
    assert values[0] > 0
    assert_close(values, [values[0], values[0] / 2, 0])


def test_the_default_weights_are_those_of_the_papers():
    assert losses.get("load_balance").weight == 1e-2
    assert losses.get("router_z").weight == 1e-3
