"""What is trained on several replicas: layers of everything that is registered."""

import keras
import numpy as np

from keras_moe import layers, losses, routers
from keras_moe.routers import balancers

EXPERTS, FEATURES, LENGTH = 4, 4, 6
# Skewed, so that balancing has something to do.
X = np.random.default_rng(0).normal(size=(8, LENGTH, FEATURES)) + [2, 1, 0, 0]
X = X.astype("float32")


def loss_layers():
    """A layer for each registered loss; of a noisy router, where each has a gradient."""
    for name, loss in losses.BY_NAME.items():
        router = routers.NoisyTopKRouter(EXPERTS, seed=3)
        yield moe(f"loss_{name}", router, [loss(weight=0.5)])


def balancer_layers():
    """A layer for each registered balancer."""
    for name in balancers.BY_NAME:
        router = routers.TopKRouter(EXPERTS, balancer=name)
        yield moe(f"balancer_{name}", router, [losses.RouterZ(0.5)])


def router_layers():
    """A layer for each registered router, with the losses that it has by default."""
    for name in routers.BY_NAME:
        yield moe(f"router_{name}", routers.get(name, EXPERTS))


def global_layers():
    """Layers that treat the batch of all replicas as one."""
    yield from balancer_layers()
    yield moe("strength", routers.ReLURouter(EXPERTS, initial_strength=0.1, growth=2.0))
    yield moe("global", routers.TopKRouter(EXPERTS), [losses.GlobalLoadBalance(0.5)])


def plain_layers():
    """Layers that wait for no other replica."""
    yield moe("plain", routers.TopKRouter(EXPERTS), [losses.LoadBalance(0.5), losses.RouterZ(0.5)])


def merged_layers():
    """A layer between others of Keras's own that wait for other replicas."""
    yield from plain_layers()
    yield keras.layers.BatchNormalization(synchronized=True, name="norm")


def some_layers():
    return [*plain_layers(), *global_layers()]


def every_layer():
    return [*loss_layers(), *balancer_layers(), *router_layers()]


def moe(name, router, router_losses=None):
    bank = layers.FeedForwardExperts(EXPERTS, 8)
    return layers.MixtureOfExperts(bank, router, router_losses, name=name)


def model_of(make_layers):
    keras.utils.set_random_seed(0)
    # The losses of layers that are not ours must be right as well.
    first = keras.layers.Dense(
        FEATURES, kernel_initializer="identity", activity_regularizer="l2", name="dense"
    )
    inputs = keras.Input((LENGTH, FEATURES))
    outputs = first(inputs)
    for layer in make_layers():
        outputs = outputs + layer(outputs)
    return keras.Model(inputs, outputs)
