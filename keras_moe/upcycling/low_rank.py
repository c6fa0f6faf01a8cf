"""Fine-tuning with low-rank experts: which weights train, and experts merged into kernels."""

import re

import keras

from keras_moe._internal.keras_internals import forget_old_weights, parameters_of, set_state
from keras_moe.layers import LowRankExperts
from keras_moe.layers.replacement import sublayers


def freeze_all_but(model: keras.Model, pattern: str = "_lora_|router") -> None:
    """Freeze all weights of a model but some. If the model is compiled, its optimizer starts again.

    Keras does not save which parts of a block are frozen: call it again after loading, and load
    with `compile=False`.

    Args:
        model: Keras model. It must be built. It changes in place.
        pattern: Regular expression, found somewhere in the paths of the weights that train. The
            default is for low-rank factors and routers.

    Raises:
        ValueError: If no weight has such a path.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="up")])
    >>> keras_moe.freeze_all_but(model, "bias")
    >>> [weight.name for weight in model.trainable_weights]
    ['bias']
    """

    def trained(layer):
        return [weight for weight in parameters_of(layer) if re.search(pattern, weight.path)]

    if not trained(model):
        raise ValueError(f"`pattern` must be found in a path of a weight. Received: {pattern!r}")
    for layer in model._flatten_layers():  # from the outside in, as each sets its sublayers
        # TensorFlow skips setting an attribute to the value it has.
        type(layer).trainable.fset(layer, bool(trained(layer)))
    for weight in parameters_of(model):
        weight.trainable = weight.trainable and bool(re.search(pattern, weight.path))
    forget_old_weights(model)


def merge_lora(model: keras.Model) -> None:
    """Merge low-rank experts into kernels: their banks become banks like their bases.

    Each expert then has kernels of its own, and the outputs stay. What else reads banks can read
    these, such as `convert.save_as_mixtral`.

    Args:
        model: Keras model. It changes in place. If it is compiled, its optimizer starts again.

    Raises:
        ValueError: If the model has no `layers.LowRankExperts`.

    Example:

    >>> base = keras_moe.layers.GatedExperts(num_experts=1, hidden_dim=16)
    >>> experts = keras_moe.layers.LowRankExperts(base, num_experts=4, rank=2)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts, name="moe")
    >>> model = keras.Sequential([keras.Input((8,)), layer])
    >>> keras_moe.merge_lora(model)
    >>> tuple(layer.experts.up_kernel.shape)
    (4, 8, 16)
    """
    found = [
        (layer, name, bank)
        for layer in model._flatten_layers()
        for name, bank in sublayers(layer)
        if isinstance(bank, LowRankExperts)
    ]
    if not found:
        raise ValueError(f"`model` must have `LowRankExperts`. Received: `{model.name}` without")
    for layer, name, bank in found:
        set_state(layer, name, bank.merge())
    forget_old_weights(model)
