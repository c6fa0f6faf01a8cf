"""Low-rank experts over one frozen base are copies of the base with LoRA."""

import keras
import numpy as np
import pytest
from backends import MODES, assert_close, compiled, differentiated, saved_and_loaded, to_numpy
from layer_checks import D, normal

from keras_moe import layers, routers
from keras_moe.ops.linears import is_integer

E, H, RANK, T = 4, 6, 2, 12
BASES = {
    "gated": lambda number: layers.GatedExperts(number, H),
    "gated, biased, clipped": lambda number: layers.GatedExperts(
        number, H, use_bias=True, clip=0.5, bias_initializer="normal", output_dim=5
    ),
    "two maps": lambda number: layers.FeedForwardExperts(number, H, bias_initializer="normal"),
    "one map": lambda number: layers.LinearExperts(number, 5, bias_initializer="normal"),
}


def pair(case, router=None, **kwargs):
    """A mixture over one base, and the same one with copies that have LoRA."""
    keras.utils.set_random_seed(0)
    experts = layers.LowRankExperts(BASES[case](1), E, RANK, alpha=3, b_initializer="normal")
    mixtures = [
        layers.MixtureOfExperts(bank, router or routers.TopKRouter(E, seed=1), (), **kwargs)
        for bank in (experts, BASES[case](E))
    ]
    copies = mixtures[1].experts
    for mixture in mixtures:
        mixture.build((None, D))
    copies.enable_lora(RANK, lora_alpha=3)
    for old, new in zip(experts.base.projections, copies.projections):
        new.kernel.assign(np.repeat(to_numpy(old.kernel.value), E, axis=0))
        if old.bias is not None:
            new.bias.assign(np.repeat(to_numpy(old.bias.value), E, axis=0))
            new.bias.trainable = False
        for letter in "ab":
            factor = experts.projection(f"{old.name}_lora_{letter}").kernel
            getattr(new, f"lora_{letter}").assign(factor.value)
    mixtures[1].router.set_weights(mixtures[0].router.get_weights())
    return mixtures


def results(mixture, mode, *inputs, **kwargs):
    """Outputs, and gradients for inputs and trained weights by their names."""
    state = [weight.value for weight in mixture.non_trainable_variables]
    trained = mixture.trainable_variables

    def loss(inputs):
        x, *weights = inputs
        outputs, _ = mixture.stateless_call(weights, state, x, **kwargs)
        ramp = keras.ops.reshape(keras.ops.linspace(0.5, 1.5, T * outputs.shape[-1]), outputs.shape)
        return keras.ops.sum(ramp * outputs**2), outputs

    _, outputs, gradients = differentiated(loss, mode)(
        [*inputs, *(to_numpy(weight.value) for weight in trained)]
    )
    return {"outputs": outputs, **dict(zip(["x", *(w.name for w in trained)], gradients))}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", BASES)
def test_equal_to_copies_with_lora(case, mode):
    one_base, copies = pair(case)
    x = normal(T, D)
    found, expected = (results(each, mode, x) for each in (one_base, copies))
    assert found.keys() == expected.keys() and len(found) > 3
    for name in expected:
        assert np.any(expected[name])
        assert_close(found[name], expected[name])
