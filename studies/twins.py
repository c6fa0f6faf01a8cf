"""What a mixture of experts and a dense model of the same active size are compared with."""

import keras
import numpy as np

from keras_moe import inspection


def dense_feedforward(top_k, hidden_dim, features, **kwargs):
    """As wide as the experts that serve one token, together."""
    return keras.Sequential(
        [
            keras.layers.Dense(top_k * hidden_dim, activation="gelu"),
            keras.layers.Dense(features),
        ],
        **kwargs,
    )


def moe_every(number, num_blocks, sparse, dense):
    """Feed-forward layers of `num_blocks` blocks: every `number`-th from `sparse()`, as in GShard.

    Reference: Lepikhin et al. 2020 (arXiv:2006.16668), section 2.2, where every other one is.
    """
    if not 1 <= number <= num_blocks:
        raise ValueError(
            "Every n-th block has experts, with n from 1 to the number of blocks. "
            f"Received: {number} for {num_blocks} blocks."
        )
    return [sparse() if (block + 1) % number == 0 else dense() for block in range(num_blocks)]


def count_parameters(model):
    """All parameters, and those that work on one token."""
    total, active = inspection.count_parameters(model)
    return {"parameters": total, "active_parameters": active}


def spread(values, form):
    """The mean of some runs and, if there are several, the standard deviation of these runs."""
    text = form.format(np.mean(values))
    return f"{text} +- {form.format(np.std(values))}" if len(values) > 1 else text
