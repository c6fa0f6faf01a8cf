"""Small language models of made-up ids, dense and sparse."""

import keras
import numpy as np

from keras_moe import layers, routers

VOCABULARY, D, H = 12, 4, 8
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (4, 6))


def block_model(feedforward=None):
    """Decoder blocks of ours."""

    def dense():
        hidden = [keras.layers.Dense(H, "gelu"), keras.layers.Dropout(0.1)]
        return keras.Sequential([*hidden, keras.layers.Dense(D)])

    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, D)(ids)
    for number in range(2):
        block = layers.TransformerDecoderBlock(2, (feedforward or dense)(), name=f"block_{number}")
        x = block(x)
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))


def graph_model(blocks=2):
    """Dense layers that follow one another."""
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, D)(ids)
    for number in range(blocks):
        hidden = keras.layers.Dense(H, "gelu", name=f"up_{number}")(x)
        hidden = keras.layers.Dropout(0.1)(hidden)
        x = keras.layers.Add()([x, keras.layers.Dense(D)(hidden)])
    return keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))


def sparse_model(experts=None, router=None, **arguments):
    """Decoder blocks with mixtures."""

    def mixture():
        bank = layers.FeedForwardExperts(8, H) if experts is None else experts()
        routing = routers.TopKRouter(8) if router is None else router()
        return layers.MixtureOfExperts(bank, routing, **arguments)

    return block_model(mixture)
