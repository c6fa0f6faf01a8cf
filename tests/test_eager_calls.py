"""Eager calls on JAX: few programs are compiled, and arguments mean what they mean elsewhere."""

import jax
import pytest
from keras import ops

from keras_moe import layers
from keras_moe.backend import backend

pytestmark = pytest.mark.backends("jax")


@pytest.fixture
def programs():
    """A list with an item for each program that was compiled."""
    compiled = []

    def listen(event, seconds, **kwargs):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("router", ["top_k", "expert_choice"])
def test_the_first_call_of_a_layer_compiles_few_programs_and_the_next_none(router, programs):
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(3, 5), router=router)
    layer.build((7, 11))
    x = ops.ones((7, 11))
    jax.clear_caches()
    programs.clear()
    layer(x, training=True)
    # Operation by operation they would be twice as many and more.
    assert 1 <= len(programs) < 45
    programs.clear()
    layer(x, training=True)
    assert not programs


def test_code_runs_once_for_each_shape_and_plain_value():
    runs = []

    @backend.jit_when_eager
    def function(x, value=None):
        runs.append(value)
        return x + isinstance(value, bool)

    for _ in range(2):
        results = [
            function(ops.zeros(shape), value)
            for shape in ((2,), (3,))
            for value in (None, 1, True, 1.0, "1")
        ]
    assert len(runs) == len(results) == 10
    assert [float(result[0]) for result in results] == 2 * [0, 0, 1, 0, 0]
