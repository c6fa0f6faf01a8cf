"""Drawn mixtures give on eight devices what they give on one.

Run by `test_many_combinations.py` in a process that has eight devices.
"""

import functools

import jax
import keras
import numpy as np
from drawn import MASKS
from hypothesis import assume
from hypothesis import strategies as st
from layer_checks import array
from on_eight_devices import assert_same, on, placed
from test_combinations import (
    LOSSES,
    ROUTERS,
    TIMES,
    Case,
    check_draws,
    code,
    dense,
    draw_bank,
    draw_router,
    is_sure,
    make,
    pick_from,
)


@st.composite
def split_mixtures(draw):
    """A mixture, and over how many devices its experts are split."""
    pick = pick_from(draw)
    number, features = pick(2, 4, 8), 6
    shape = (*pick((16,), (8, 3), (5, 2)), features)
    bank = pick("feed-forward", "gated", "linear", "low-rank", "own")
    width = features if bank == "own" else pick(features, 5)
    router = draw_router(pick, number, False, ROUTERS)
    options = dict(router=router)
    if pick(True, False):
        options["router_losses"] = draw(st.lists(st.sampled_from(LOSSES), max_size=3))
    # Other capacities hold for the tokens of each device.
    if len(shape) == 3 and not any(kind in router for kind in ("ExpertChoice", "Soft")):
        limits = dict(per_sequence=True, priority=pick(None, "probability"))
        limits["evaluation_factor"] = pick(None, 0.7)
        options["capacity_factor"] = pick(None, code("layers.Capacity", pick(0.5, 1.3), **limits))
    if pick(True, False):
        options["shared_expert"] = code("keras.layers.Dense", width, "tanh")
        options["gated_shared_expert"] = pick(None, True)
    experts = draw_bank(pick, number, features, width, [bank])
    split = pick(*[size for size in (1, 2, 4, 8) if number % size == 0])
    return Case(
        layer=str(code("layers.MixtureOfExperts", experts, **options)),
        shape=shape,
        mask=pick(None, *MASKS),
        seed=draw(st.integers(0, 2**16)),
        seen=pick(None, None, 3),
        mesh=f"{8 // split}x{split}",
    )


def results_of(case, training):
    """Outputs, routing, losses, gradients and state of one pass."""
    made = make(case)
    layer, kwargs = made.layer, {name: placed(value) for name, value in made.kwargs.items()}

    def objective(trainable, inputs, state):
        (outputs, routing), state, losses = layer.stateless_call(
            trainable,
            state,
            inputs,
            **kwargs,
            training=training,
            return_routing=True,
            return_losses=True,
        )
        ramp = np.linspace(0.5, 1.5, outputs.size).reshape(outputs.shape)
        return (ramp * outputs).sum() + sum(losses), (outputs, routing, losses, state)

    variables = layer.trainable_variables, layer.non_trainable_variables
    trainable, state = ([variable.value for variable in each] for each in variables)
    compute = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, (outputs, routing, *others)), gradients = compute(trainable, placed(made.inputs), state)
    routing = keras.tree.map_structure(array, routing)
    scores = routing.probs[made.mask], routing.counts, routing.dropped
    return outputs, dense(routing, layer.router.num_experts), scores, others, gradients


def check_devices(case):
    """One pass over eight devices gives what it gives on one, in inference and in training."""
    made = make(case)
    for training in (False, True):
        assume(is_sure(made, training))
        compute = functools.partial(results_of, case, training)
        assert_same(on(case.mesh, compute), on(None, compute), 2e-5)


def test_eight_devices_give_what_one_gives():
    check_draws(check_devices, split_mixtures(), 2 * TIMES)
