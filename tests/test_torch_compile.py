"""Training through `torch.compile`."""

import keras
import pytest
from backends import assert_close
from layer_checks import array, normal

from keras_moe import layers

pytestmark = [
    pytest.mark.backends("torch"),
    pytest.mark.filterwarnings("ignore"),  # of PyTorch, about itself
]

E, D, H, S = 3, 6, 4, 5
BATCHES = 4, 4, 3, 2, 7


def gated():
    return layers.GatedExperts(E, H)


def mixture(experts, **kwargs):
    return layers.MixtureOfExperts(experts, **kwargs)


def built(change):
    """A mixture whose bank is changed after it is built."""
    layer = mixture(gated())
    layer.build((None, S, D))
    change(layer.experts)
    return layer


LAYERS = {
    "gated": lambda: mixture(gated()),
    "no losses": lambda: mixture(layers.FeedForwardExperts(E, H), router_losses=[]),
    "no biases": lambda: mixture(layers.FeedForwardExperts(E, H, use_bias=False)),
    "linear": lambda: mixture(layers.LinearExperts(E, D)),
    "layers": lambda: mixture([keras.layers.Dense(D) for _ in range(E)]),
    "no computation": lambda: mixture(layers.ZeroComputationExperts(gated(), num_zero=1)),
    "capacity": lambda: mixture(gated(), capacity_factor=0.7, shared_expert=keras.layers.Dense(D)),
    "LoRA": lambda: built(lambda bank: bank.enable_lora(2)),
    "int8": lambda: built(lambda bank: bank.quantize("int8")),
    "expert choice": lambda: mixture(gated(), router="expert_choice"),
    "soft": lambda: mixture(gated(), router="soft"),
    "tasks": lambda: layers.MultiGateMixtureOfExperts(gated(), num_tasks=2),
    "decoder block": lambda: layers.TransformerDecoderBlock(1, mixture(gated())),
}


def step_of(layer):
    """A function of a batch and the targets: the loss of a training step."""

    def loss(x, y):
        outputs = layer(x, training=True)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return sum(((each - y) ** 2).mean() for each in outputs) + sum(layer.losses)

    return loss


def gradients(loss, layer, size):
    """The loss, and the gradients of inputs and weights, for a batch of so many sequences."""
    import torch

    x, y = (torch.tensor(normal(size, S, D, seed=size + n)) for n in range(2))
    x.requires_grad_()
    weights = [variable.value for variable in layer.trainable_variables]
    value = loss(x, y)
    found = torch.autograd.grad(value, [x, *weights], allow_unused=True)
    return [value, *(each for each in found if each is not None)]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_compiled_step_equals_an_eager_one_and_is_compiled_for_two_sizes(kind):
    import torch

    num_compiled = 0

    def count(program, inputs):
        nonlocal num_compiled
        num_compiled += 1
        return program

    torch.compiler.reset()
    keras.utils.set_random_seed(0)
    layer = LAYERS[kind]()
    if not layer.built:
        layer.build((None, S, D))
    compiled = torch.compile(step_of(layer), backend=count)
    for number, size in enumerate(BATCHES):
        before, expected = num_compiled, gradients(step_of(layer), layer, size)
        found = gradients(compiled, layer, size)
        assert len(found) == len(expected)
        for each, other in zip(found, expected):
            assert_close(array(each), array(other))
        if number not in (0, 2):  # the first batch, and the first one of another size
            assert num_compiled == before


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_layer_and_what_is_traced_for_autograd_as_well(dynamic):
    import torch

    torch.compiler.reset()
    keras.utils.set_random_seed(0)
    layer = keras.Sequential([keras.Input((S, D)), mixture(gated()), keras.layers.Dense(D)])
    compiled = torch.compile(layer, backend="aot_eager", dynamic=dynamic)

    def loss(x, y):
        return ((compiled(x, training=True) - y) ** 2).mean() + sum(layer.losses)

    for size in BATCHES:
        for each, other in zip(
            gradients(loss, layer, size), gradients(step_of(layer), layer, size)
        ):
            assert_close(array(each), array(other))


def test_what_users_of_plans_write_is_compiled():
    import torch

    from keras_moe import ops

    torch.compiler.reset()

    def function(x, y):
        routing = ops.top_k_routing(x.mean(1)[:, :E], 2)
        plan = ops.GroupedPlan.of(routing.indices, routing.weights, E)
        rows = plan.dispatch(y.mean(1))
        return (plan.combine(rows * torch.arange(len(rows)).unsqueeze(1)) ** 2).sum()

    class NoWeights:
        trainable_variables = ()

    compiled = torch.compile(function, backend="eager")
    for each, other in zip(gradients(compiled, NoWeights, 4), gradients(function, NoWeights, 4)):
        assert_close(array(each), array(other))
