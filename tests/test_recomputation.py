"""Gradient checkpointing: equal to the plain step in all it computes and in all it changes."""

import functools

import keras
import numpy as np
import pytest
from backends import QUICK_JIT, assert_close, gradients, on_one_backend, to_numpy
from layer_checks import normal

import keras_moe
from keras_moe import inspection, layers, routers

D, H, E, LENGTH = 8, 16, 4, 6


def mixture(capacity_factor=1.0, **kwargs):
    """A layer with every kind of state: a moving bias, noise, a capacity, dropout."""
    return layers.MixtureOfExperts(
        layers.GatedExperts(E, H),
        router=routers.TopKRouter(
            E, balancer="loss_free", input_jitter=0.1, logit_noise=0.5, use_bias=True, seed=1
        ),
        router_losses=["load_balance", "router_z"],
        capacity_factor=capacity_factor,
        shared_expert=keras.Sequential(
            [keras.layers.Dense(D, kernel_regularizer="l2"), keras.layers.Dropout(0.3, seed=2)]
        ),
        **kwargs,
    )


def block(**kwargs):
    return layers.TransformerEncoderBlock(2, mixture(), dropout=0.2, **kwargs)


def test_masks_of_calls_with_several_tensors_are_kept():
    with keras.RematScope("list_of_layers", layer_names=["recomputed"]):
        layer = mixture(name="recomputed")
    ids, seen = keras.Input((LENGTH,), dtype="int32"), keras.Input((LENGTH, 3))
    outputs = layer(keras.layers.Embedding(20, D, mask_zero=True)(ids), router_inputs=seen)
    model = keras.Model([ids, seen], outputs)
    model.compile("sgd", "mse", jit_compile=QUICK_JIT)
    x = np.arange(2 * LENGTH).reshape(2, LENGTH) % 4
    model.fit([x, normal(2, LENGTH, 3)], normal(2, LENGTH, D), verbose=0)
    assert to_numpy(layer.expert_counts).sum() == 2 * np.sum(x > 0)


def test_remat_of_a_stateless_call():
    """`keras.remat` takes functions without effects."""
    layer = mixture()
    layer.build((None, LENGTH, D))
    layer(normal(2, LENGTH, D))  # builds the shared expert
    state = [keras.ops.copy(variable.value) for variable in layer.non_trainable_variables]

    def loss(remat, *tensors):
        *weights, inputs = tensors

        def call(*tensors):
            *weights, inputs = tensors
            outputs, _, losses = layer.stateless_call(
                weights, state, inputs, training=True, return_losses=True
            )
            return outputs, sum(losses)

        outputs, extra = remat(call)(*weights, inputs)
        return keras.ops.sum(outputs**2) + extra

    weights = to_numpy([variable.value for variable in layer.trainable_variables])
    plain, again = (
        gradients(functools.partial(loss, remat), [*weights, normal(2, LENGTH, D)])
        for remat in (lambda call: call, keras.remat)
    )
    for one, other in zip(again, plain):
        assert_close(one, other)


def test_experts_with_state_and_draws_are_recomputed():
    with keras.RematScope("full"):
        experts = [keras.layers.BatchNormalization() for _ in range(2)]
        experts.append(keras.layers.Dropout(0.3))
        layer = layers.MixtureOfExperts(layers.LayerExperts(experts))
    model = keras.Sequential([keras.Input((D,)), layer])
    model.compile("sgd", "mse", jit_compile=QUICK_JIT)
    model.train_on_batch(normal(8, D), normal(8, D, seed=1))
    assert to_numpy(experts[0].moving_mean.value).any()


def test_inference_and_watched_calls_are_not_recomputed():
    """Caches and observers take what is computed: in a recomputed function they find no values."""
    with keras.RematScope("full"):
        once = layers.TransformerDecoderBlock(
            2, layers.MixtureOfExperts(num_experts=4, hidden_dim=D)
        )
    parts = [keras.layers.Embedding(9, D), once, keras.layers.Dense(9)]
    model = keras.Sequential([keras.Input((None,), dtype="int32"), *parts])
    assert len(keras_moe.generate(model, [[1, 2]], 2)[0]) == 4
    ids = np.arange(12).reshape(3, 4) % 9
    for training in (False, True):
        ((routing,),) = inspection.record_routings(model, [ids], training=training).values()
        assert routing.counts.sum() == 24
    keras_moe.surgery.merge_experts(model, keep=3, data=[ids])
    assert once.feedforward.router.num_experts == 3


class CountingRouter(routers.TopKRouter):
    """Keeps a number of its own, which Keras may cast: 1 for each call in training."""

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.number = self.add_weight(name="number", initializer="zeros", trainable=False)

    def update(self, routing):
        super().update(routing)
        self.number.assign(self.number + 1)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_the_state_of_routers_moves_in_each_policy(policy):
    keras.config.set_dtype_policy(policy)

    def mixtures():
        for router in (
            CountingRouter(E, balancer="loss_free"),
            routers.TopKRouter(E, balancer="quantile"),
            routers.ReLURouter(E, top_k=1, growth=2.0, initial_strength=0.125),
        ):
            yield layers.MixtureOfExperts(layers.FeedForwardExperts(E, 2), router)

    plain = [*mixtures()]
    with keras.RematScope("full"):
        recomputed = [*mixtures()]
    model = keras.Sequential([keras.Input((D,)), *plain, *recomputed])
    model.compile("sgd", "mse", jit_compile=QUICK_JIT)
    x = normal(12, D) + 1
    model.fit(x, x, batch_size=4, shuffle=False, verbose=0)
    for of_own, quantile, relu in (plain, recomputed):
        assert to_numpy(of_own.router.number.value) == 3
        assert to_numpy(of_own.router.selection_bias.value).any()
        assert to_numpy(quantile.router.selection_bias.value).any()
        assert to_numpy(relu.router.strength.value) > 0.125


@on_one_backend
def test_weights_of_a_router_are_not_rounded():
    """It computes in float32 in a layer of mixed precision."""
    with keras.RematScope("full"):
        layer = mixture(dtype="mixed_bfloat16")
    ones = np.ones((2, D), "float32")
    _, routing = layer(ones, return_routing=True)
    assert_close(to_numpy(routing.logits), to_numpy(layer.router(ones).logits))


def test_the_state_of_an_expert_moves_in_another_policy_than_that_around_it():
    class Counting(keras.layers.Layer):
        def build(self, inputs_shape):
            self.number = self.add_weight(initializer="zeros", trainable=False)

        def call(self, inputs):
            self.number.assign(self.number + 1)
            return inputs

        def compute_output_shape(self, inputs_shape):
            return inputs_shape

    bank = layers.LayerExperts([Counting(dtype="mixed_bfloat16")], dtype="mixed_bfloat16")
    layers.MixtureOfExperts(bank, dtype="float32")(normal(4, D))
    assert to_numpy(bank.layers[0].number.value) == 1


@on_one_backend
@pytest.mark.parametrize("make", [mixture, block])
@pytest.mark.parametrize("training", [None, True])
def test_another_recomputation_is_refused(make, training):
    from torch.utils.checkpoint import checkpoint

    layer = make()
    inputs = keras.ops.convert_to_tensor(normal(2, LENGTH, D)).requires_grad_()
    layer(inputs)
    outputs = checkpoint(layer, inputs, use_reentrant=False, training=training)
    with pytest.raises(RuntimeError, match="`keras.RematScope`"):
        outputs.sum().backward()
