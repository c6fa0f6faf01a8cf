"""Transformer blocks: normalization, attention, and any feed-forward layer."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_integer, check_number, check_tensors
from keras_moe._internal.keras_internals import get_keras_mask
from keras_moe._internal.serialization import config_of, load_draws, resolve, save_draws
from keras_moe.layers.recomputation import Recomputable
from keras_moe.layers.sublayers import (
    accepted_arguments,
    build_and_measure,
    check_output,
    freeze_parts,
)
from keras_moe.ops import draws


class TransformerBlock(Recomputable):
    """Abstract: branches with a normalization and a residual; the last is any feed-forward layer.

    Xiong et al. 2020 (arXiv:2002.04745): `x = x + dropout(branch(norm(x)))`.
    """

    def __init__(
        self, num_heads: int, feedforward: keras.Layer, dropout: float = 0.0, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.num_heads = check_integer("num_heads", num_heads)
        self.feedforward = resolve("feedforward", feedforward, keras.Layer)
        self.dropout = check_number("dropout", dropout, below=1)
        self._seed_generator = draws.seeded_generator() if self.dropout else None
        freeze_parts(self)
        self.supports_masking = True

    def _build_norm(self, name, inputs_shape):
        norm = keras.layers.LayerNormalization(dtype=self.dtype_policy, name=name)
        norm.build(inputs_shape)
        return norm

    def _build_attention(self, cls, name, inputs_shape, source_shape):
        features = inputs_shape[-1]
        if features is None or features % self.num_heads:
            raise ValueError(
                "`inputs` must have a number of features divisible by `num_heads`. Received: "
                f"inputs.shape={tuple(inputs_shape)}, num_heads={self.num_heads}"
            )
        attention = cls(
            self.num_heads, int(features) // self.num_heads, dtype=self.dtype_policy, name=name
        )
        attention.build(inputs_shape, source_shape)
        return attention

    def _build_feed_forward(self, inputs_shape):
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: inputs_shape[-1]})
        self._feedforward_norm = self._build_norm("feedforward_norm", inputs_shape)
        outputs_shape = build_and_measure("feedforward", self.feedforward, inputs_shape)
        self.examine_feedforward()
        if outputs_shape[-1] != inputs_shape[-1]:
            raise ValueError(
                "`feedforward` must return as many features as it receives, for the residual. "
                f"Received: {inputs_shape[-1]} features in, {outputs_shape[-1]} out"
            )

    def examine_feedforward(self) -> None:
        """Find out which arguments the feed-forward layer takes; again, after it is replaced."""
        self._feedforward_arguments = accepted_arguments(
            self.feedforward, ("mask", "training", "token_ids")
        )

    def _without_padding(self, inputs, mask, name="mask"):
        """Return the inputs (B, L, D), zero where the mask is False, and the mask as bool or None.

        Without a mask, the Keras mask of the inputs is used.
        """
        mask = get_keras_mask(inputs) if mask is None else mask
        given = {"inputs": (inputs, "BLD", "float")}
        if mask is not None:
            mask = ops.convert_to_tensor(mask)
            given[name] = (mask, "BL", "mask")
        check_tensors(None, **given)
        if mask is None:
            return inputs, None
        mask = ops.cast(mask, "bool")
        # Padding may hold anything; a NaN there would pass through an attention weight of 0.
        return ops.where(ops.expand_dims(mask, -1), inputs, ops.zeros((), inputs.dtype)), mask

    def _add(self, hidden, branch, training):
        if training and self.dropout:
            branch = draws.dropout(branch, self.dropout, self._seed_generator)
        # The feed-forward layer may compute in another dtype.
        return hidden + ops.cast(branch, hidden.dtype)

    def _add_feed_forward(self, hidden, mask, training, token_ids):
        # Keras passes on the masks of tensors, but a sum has none.
        arguments = {"mask": mask, "training": training, "token_ids": token_ids}
        accepted = {name: arguments[name] for name in self._feedforward_arguments}
        branch = self.feedforward(self._feedforward_norm(hidden), **accepted)
        check_output("feedforward", branch, hidden.shape)
        return self._add(hidden, branch, training)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        save_draws(self, store)

    def load_own_variables(self, store):
        super().load_own_variables(load_draws(self, store))

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "feedforward": config_of(self.feedforward),
            "dropout": self.dropout,
        }
