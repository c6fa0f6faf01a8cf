"""A small model that gives each token a class, and texts for it; id 0 is padding.

Without attention, which JAX does not compute in float16 on CPUs.
"""

import keras
import numpy as np

from benchmarks.contestants import DenseTwin, mixture_of
from keras_moe import losses, routers

WORDS, CLASSES = 500, 16
MIXTURE, TWIN = "mixture", "dense twin"


def feedforwards(name, options):
    """Two layers: for a mixture one with a loss and one with a selection bias."""
    if name == TWIN:
        return [DenseTwin(options) for _ in range(2)]
    num_experts, top_k = options.experts[0], options.top_k
    by_loss = routers.TopKRouter(num_experts, top_k)
    balancer = routers.LossFreeBias(rate=1e-3)
    by_bias = routers.TopKRouter(num_experts, top_k, score="sigmoid", balancer=balancer)
    return [
        mixture_of(by_loss, options, router_losses=[losses.LoadBalance(), "router_z"]),
        mixture_of(by_bias, options, router_losses=[]),
    ]


class Embedding(keras.layers.Embedding):
    """Keras's, as a product.

    On TensorFlow the gradient of Keras's holds a row for each token. Its loss scaling looks at the
    last row of each word, and overlooks an overflow in another (Keras 3.15).
    """

    def call(self, inputs):
        chosen = keras.ops.one_hot(inputs, self.input_dim, dtype=self.compute_dtype)
        return keras.ops.matmul(chosen, keras.ops.cast(self.embeddings, self.compute_dtype))


def compiled_tagger(feedforwards, options):
    """A model from ids (batch, length), of any size, to logits of each token."""
    ids = keras.Input((None,), dtype="int32")
    embedding = Embedding if keras.backend.backend() == "tensorflow" else keras.layers.Embedding
    x = embedding(WORDS, options.features, mask_zero=True)(ids)
    for feedforward in feedforwards:
        x = keras.layers.Add()([x, feedforward(keras.layers.LayerNormalization()(x))])
    x = keras.layers.LayerNormalization()(x)
    model = keras.Model(ids, keras.layers.Dense(CLASSES, dtype="float32")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=options.xla)
    return model


def texts(number, length, seed=0):
    """Ids (number, length), some words far more frequent than others, and a class for each.

    A word has a class of its own, but for one of five tokens, whose class is random: there is
    always something to learn.
    """
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, WORDS)
    ids = generator.choice(np.arange(1, WORDS), (number, length), p=share / share.sum())
    of_word = np.random.default_rng(1).integers(0, CLASSES, WORDS)
    noise = generator.integers(0, CLASSES, ids.shape)
    classes = np.where(generator.random(ids.shape) < 0.2, noise, of_word[ids])
    return ids.astype("int32"), classes.astype("int32")
