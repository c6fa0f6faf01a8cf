"""Routers, banks, layers and functions of a user's own that are unusual, and right."""

import keras
import numpy as np
import pytest
from backends import BACKEND, FAST_MODE, compiled, on_each_backend, on_one_backend, saved_and_loaded
from layer_checks import D, E, array, moe, normal

from keras_moe import layers, losses, ops, routers
from keras_moe.layers.gate import Observer
from keras_moe.ops.matching import expert_choice_routing

pytestmark = on_one_backend

X = normal(6, D)


class HiddenRouter(routers.TopKRouter):
    """Its kernel has another height than the tokens."""

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.hidden = keras.layers.Dense(5, activation="relu")
        self.hidden.build(tokens_shape)

    def kernel_shape(self, features):
        return 5, self.num_experts

    def project(self, tokens):
        return keras.ops.matmul(self.hidden(tokens), self.kernel)


class PairRouter(routers.LogitRouter):
    """Two logits an expert, of which the larger counts, and no `top_k`."""

    max_top_k = 2

    def kernel_shape(self, features):
        return features, 2 * self.num_experts

    def route(self, tokens, mask, training, **context):
        logits = self.logits(tokens, training)
        pairs = keras.ops.reshape(logits, (-1, self.num_experts, 2))
        return ops.top_k_routing(keras.ops.max(pairs, -1), 2, mask=mask)


@keras.saving.register_keras_serializable("tests")
class NearestRouter(routers.Router):
    """Its own names of arguments, and a route that does not pass its mask on."""

    def __init__(self, number=None, choices=2, **kwargs):
        super().__init__(number, **kwargs)
        self.top_k = choices

    def build(self, tokens_shape):
        self.centres = self.add_weight(name="centres", shape=(self.num_experts, tokens_shape[-1]))

    def route(self, tokens, mask, training, **context):
        differences = keras.ops.expand_dims(tokens, 1) - self.centres
        distances = keras.ops.sum(keras.ops.square(differences), axis=-1)
        return ops.top_k_routing(-distances, self.top_k)

    def get_config(self):
        config = super().get_config()
        return {"number": config.pop("num_experts"), **config, "choices": self.top_k}


class NumberOfBatches(losses.RouterLoss):
    """A loss with a state: how many batches its layer has trained on."""

    def state_shapes(self, num_experts):
        return {"batches": ((), "float32")}

    def compute(self, routing, state):
        if state is None:
            return keras.ops.sum(routing.weights), None
        return state[0], (state[0] + 1,)


class ContextRouter(routers.Router):
    """Chooses by the ids of tokens."""

    top_k = 2

    def build(self, tokens_shape):
        pass

    def route(self, tokens, mask, training, sequence_length, token_ids, indices):
        self.seen = sequence_length, token_ids.shape, indices
        logits = keras.ops.one_hot(token_ids % self.num_experts, self.num_experts)
        return ops.top_k_routing(logits, 2, mask)


class EqualBank(layers.ExpertBank):
    """A bank without weights, whose shapes are what NumPy gives."""

    def build(self, tokens_shape):
        pass

    def compute_output_shape(self, tokens_shape):
        return (*tokens_shape[:-1], np.int64(tokens_shape[-1]))

    def call(self, tokens, plan):
        return 2 * tokens


def test_a_router_with_its_own_names_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((D,)), moe(router=NearestRouter(choices=1))])
    loaded = saved_and_loaded(model, tmp_path)
    np.testing.assert_allclose(array(loaded(X)), array(model(X)), atol=1e-6)


def test_an_initializer_needs_no_config():
    class Seeded:
        def __init__(self, seed):
            self.seed = seed

        def __call__(self, shape, dtype=None):
            return keras.random.normal(shape, dtype=dtype, seed=self.seed)

    router = routers.CosineRouter(E, projection_dim=D, kernel_initializer=Seeded(1))
    layer = moe(layers.FeedForwardExperts(E, 4, kernel_initializer=Seeded(1)), router=router)
    layer(X)
    kernels = [*array(layer.experts.up_kernel), array(router.kernel), array(router.directions).T]
    assert len({float(kernel.flat[0]) for kernel in kernels}) == E + 2, "each has its own seed"


def test_a_router_has_a_kernel_of_any_shape_and_a_bank_no_weights():
    for router in (HiddenRouter(E), PairRouter(E)):
        assert moe(router=router)(X).shape == X.shape
    bank = EqualBank(E)
    for width in (D, 3):
        assert moe(bank, router_losses=())(X[:, :width]).shape == (6, width)


def test_padding_is_left_out_where_a_router_does_not_pass_its_mask_on():
    layer = moe(router=NearestRouter())
    mask = np.array([True, True, False, True, False, False])
    outputs, routing = layer(X, mask=mask, return_routing=True, training=True)
    alone, of_real = layer(X[mask], return_routing=True)
    np.testing.assert_allclose(array(outputs)[mask], array(alone), rtol=1e-5, atol=1e-6)
    assert not array(outputs)[~mask].any() and not array(routing.weights)[~mask].any()
    for name in ("counts", "load"):
        np.testing.assert_array_equal(array(getattr(routing, name)), array(getattr(of_real, name)))
    np.testing.assert_array_equal(array(routing.mask), mask)
    np.testing.assert_array_equal(array(layer.expert_counts), array(of_real.counts))


def test_a_loss_with_a_state_has_one_in_each_layer_that_training_alone_changes():
    loss = NumberOfBatches(1.0)
    first, second = (moe(router_losses=[loss]) for _ in range(2))
    for batches in range(3):
        first(X, training=True)
        assert [float(value) for value in first.losses] == [batches]
    observer = Observer(counts=True)
    first.add_observer(observer)
    first(X)
    assert first.read_counts(evaluation=True).numbers[0] == 1
    second(X, training=True)
    assert [float(value) for value in second.losses] == [0]
    assert [float(layer.loss_states[0][0]) for layer in (first, second)] == [3, 1]
    store = {}
    first.save_own_variables(store)
    second.load_own_variables(store)
    assert float(second.loss_states[0][0]) == 3


def test_a_router_is_given_the_length_of_sequences_ids_and_indices():
    layer = moe(router=ContextRouter(E))
    layer(normal(2, 3, D), token_ids=np.arange(6).reshape(2, 3))
    assert layer.router.seen == (3, (6,), None)


def with_power(base, *arguments):
    """A class with an argument that its config lacks."""

    class Powered(base):
        def __init__(self, power=2):
            super().__init__(*arguments)
            self.power = power

    return Powered()


@pytest.mark.parametrize(
    "make",
    [
        lambda: moe(router=with_power(routers.TopKRouter)),
        lambda: moe(router_losses=[with_power(losses.LoadBalance)]),
        lambda: moe(router=routers.TopKRouter(balancer=with_power(routers.LossFreeBias))),
        lambda: moe(with_power(layers.FeedForwardExperts, E, 4)),
    ],
    ids=["router", "loss", "balancer", "bank"],
)
def test_what_a_config_would_lose_is_not_saved(make):
    layer = make()
    assert layer(X).shape == X.shape
    with pytest.raises(NotImplementedError, match="without power"):
        layer.get_config()


def test_a_regularizer_returns_a_number_an_expert_or_none_of_its_own():
    def of_each(kernel):
        return keras.ops.sum(keras.ops.square(kernel), (1, 2))

    layer = moe(layers.FeedForwardExperts(E, 4, kernel_regularizer=of_each), router_losses=())
    layer(X)
    kernels = (layer.experts.up_kernel, layer.experts.down_kernel)
    expected = sum(np.sum(array(kernel) ** 2) for kernel in kernels)
    np.testing.assert_allclose(np.sum(array(sum(layer.losses))), expected, rtol=1e-5)
    other = moe(layers.FeedForwardExperts(E, 4, kernel_regularizer=lambda kernel: 0))
    other(X)
    assert array(sum(other.losses)) == 0


@on_each_backend
def test_a_sequence_length_is_a_tensor():
    mask = keras.ops.ones((6,), "bool")
    # What is compiled takes it for an unknown number.
    route = compiled(
        lambda logits, length: expert_choice_routing(logits, 1.0, mask, length).counts,
        "eager" if BACKEND == "jax" else FAST_MODE,
    )
    np.testing.assert_array_equal(
        route(normal(6, E), np.array(3, "int32")),
        array(expert_choice_routing(normal(6, E), 1.0, mask, 3).counts),
    )


class HalfRouter(routers.TopKRouter):
    """A router that takes every other token for padding, besides what is."""

    def route(self, tokens, mask, training, **context):
        routing = super().route(tokens, mask, training, **context)
        own = keras.ops.arange(tokens.shape[0]) % 2 == 0
        return routing._replace(mask=routing.mask & own)


@pytest.mark.backends("torch")
def test_losses_and_counts_are_of_the_tokens_that_a_router_of_ones_own_takes_for_real():
    layer = moe(router=HalfRouter(E, 2), router_losses=["load_balance"])
    _, routing = layer(normal(6, D), training=True, return_routing=True)
    assert array(routing.counts).sum() == array(layer.expert_counts).sum() == 3 * 2
    expected = array(losses.LoadBalance(1.0).compute(routing))
    np.testing.assert_allclose(layer.read_counts().means.losses[0], expected, rtol=1e-6)


def test_a_loss_that_is_not_finite_counts_in_no_mean():
    layer = moe(router_losses=["router_z"])
    for scale in (1.0, np.nan, 2.0):
        layer(scale * X, training=True)
    values = [array(losses.RouterZ(1.0)(layer.router(scale * X))) for scale in (1.0, 2.0)]
    np.testing.assert_allclose(layer.read_counts().means.losses[0], np.mean(values), rtol=1e-5)


@pytest.mark.backends("torch")
def test_small_values_are_not_lost_in_large_totals():
    layer = moe(router_losses=[])
    layer(normal(6, D), training=True)
    entropy, counters = layer.read_counts().means.entropy, layer._training_counters
    counters.totals.assign(np.full(counters.totals.shape, [[[2.0**26]], [[0.0]]], "float32"))
    before = layer.read_counts()
    for _ in range(3):
        layer(normal(6, D), training=True)
    added = layer.read_counts().since(before).totals[-2]
    np.testing.assert_allclose(added, 3 * entropy, rtol=1e-5)


@pytest.mark.backends("torch")
def test_counters_stay_exact_beyond_the_integers_of_float32_and_the_end_of_int32():
    layer = moe(router_losses=())
    layer(normal(6, D), training=True)
    first = layer.read_counts()
    layer.expert_counts.assign(np.full(E, 2**31 - 5, "int32"))
    before = layer.read_counts()
    for _ in range(9):
        layer(normal(1, D), training=True)
    counted = layer.read_counts().since(before).assignments
    assert counted.sum() == 9 * 2 and counted.min() >= 0
    assert layer.read_counts().assignments.min() >= 2**31 - 5
    # More than 2^31 between two readings, and past the end of 2^32.
    assert layer.read_counts().since(first).assignments.min() > 2**31 - 20
    layer.expert_counts.assign(np.full(E, 3 * 2**30 - 2**32, "int32"))
    assert layer.read_counts().since(first).assignments.min() > 3 * 2**30 - 20
    layer.expert_counts.assign(np.full(E, 5, "int32"))
    near_end = before._replace(assignments=np.full(E, 2**32 - 5))
    assert (layer.read_counts().since(near_end).assignments == 10).all()


class UnawareRouter(routers.DenseRouter):
    """It knows about no padding."""

    def route(self, tokens, mask, training, **context):
        return super().route(tokens, mask | True, training, **context)


def test_padding_that_a_router_does_not_know_is_counted_nowhere():
    mask = np.arange(6) < 2
    kernel = keras.initializers.RandomNormal(seed=1)
    unaware, aware = (
        array(router(E, kernel_initializer=kernel)(X, mask=mask).counts)
        for router in (UnawareRouter, routers.DenseRouter)
    )
    np.testing.assert_array_equal(unaware, aware)
    assert np.isclose(unaware.sum(), 2 * E) and unaware.min() > 0


@pytest.mark.backends("torch")
def test_autocast_does_not_change_what_a_float32_layer_computes():
    import torch

    layer = moe(layers.FeedForwardExperts(1, 16), router_losses=())
    x = torch.from_numpy(X).requires_grad_()

    def gradients():
        weights = [x, *(weight.value for weight in layer.experts.trainable_weights)]
        return torch.autograd.grad(layer(x).square().sum(), weights)

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, inside = layer(x), gradients()
    for each, gradient in zip(inside, expected):
        assert torch.equal(each, gradient)
    outputs.sum().backward()
