"""What Transformer blocks have in common: checks, norms, and the feed-forward branch."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.named_arguments import check_is_made
from keras_moe._internal.saved_state import load_draws, save_draws
from keras_moe._internal.serialization import config_of, resolve
from keras_moe._internal.shape_checks import check_inputs_shape, check_returned
from keras_moe._internal.tensor_checks import (
    check_array,
    check_float_inputs,
    check_host_integers,
    check_host_numbers,
    check_mask,
)
from keras_moe._internal.validation import (
    check_computes_in_floats,
    check_fraction,
    check_has_draws,
    check_positive_integer,
    check_training,
)
from keras_moe.layers.expert_bank import check_is_layer_of_tokens
from keras_moe.layers.recomputation import Recomputable
from keras_moe.layers.sublayers import accepted_arguments, build_and_measure, freeze_parts
from keras_moe.ops import draws


class TransformerBlock(Recomputable):
    """Abstract: branches behind a normalisation and a residual; the last is any feed-forward layer.

    Xiong et al. 2020 (arXiv:2002.04745): `x = x + dropout(branch(norm(x)))`.
    """

    _attribute_checks = {
        "num_heads": check_positive_integer,
        "feedforward": check_is_layer_of_tokens,
        "dropout": check_fraction,
    }
    _fixed_attributes = ("num_heads", "feedforward")

    def __init__(self, num_heads, feedforward, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        check_computes_in_floats(self)
        self.num_heads = num_heads
        self.feedforward = resolve("feedforward", feedforward, keras.Layer)
        self.dropout = dropout
        self._seed_generator = draws.seeded_generator() if dropout else None
        freeze_parts(self)
        self.supports_masking = True

    def examine_feedforward(self):
        """Note what the feed-forward layer is to be told: again, where it is another one."""
        self._feedforward_arguments = accepted_arguments(
            self.feedforward, ("mask", "training", "token_ids")
        )

    def __call__(self, *args, **kwargs):
        check_is_made(self)
        # Checked here, because Keras turns arrays into tensors before `call`.
        check_training(kwargs.get("training"))
        check_host_integers("token_ids", kwargs.get("token_ids"))
        check_host_numbers(**kwargs)
        inputs: Any = args[0] if args else kwargs.get("inputs")
        check_array("inputs", inputs)
        self._check_features(inputs.shape)
        return super().__call__(*args, **kwargs)

    def _check_call(self, inputs, mask):
        check_float_inputs(inputs)
        if mask is not None:
            check_mask(mask, inputs.shape)

    def _check_features(self, inputs_shape):
        features = inputs_shape[-1] if len(inputs_shape) else None
        if self.built and features != self._features:
            raise ValueError(
                f"`inputs` must have {self._features} features, as those the block was built for. "
                f"Received: inputs.shape={tuple(inputs_shape)}. Make another block for them."
            )
        if len(inputs_shape) != 3 or features is None or features % self.num_heads:
            raise ValueError(
                "`inputs` must have the shape (batch, length, features), features divisible by "
                f"`num_heads`. Received: inputs.shape={tuple(inputs_shape)}, "
                f"num_heads={self.num_heads}. Change one of them."
            )

    def _make_norm(self, name, inputs_shape):
        norm = keras.layers.LayerNormalization(dtype=self.dtype_policy, name=name)
        norm.build(inputs_shape)
        return norm

    def _make_attention(self, cls, name, inputs_shape, source_shape):
        attention = cls(
            self.num_heads,
            inputs_shape[-1] // self.num_heads,
            dtype=self.dtype_policy,
            name=name,
        )
        attention.build(inputs_shape, source_shape)
        return attention

    def _build_feed_forward(self, inputs_shape):
        self._feedforward_norm = self._make_norm("feedforward_norm", inputs_shape)
        features = self._features = inputs_shape[-1]
        outputs_shape = build_and_measure("feedforward", self.feedforward, inputs_shape)
        self.examine_feedforward()
        if outputs_shape[-1] != features:
            raise ValueError(
                "`feedforward` must return as many features as it is given, for the residual. "
                f"Received: {features} features in, {outputs_shape[-1]} out. "
                f"End it with a layer of width {features}."
            )

    def _without_padding(self, inputs, mask):
        """The inputs, zero where the mask is False, and the mask as bool, or None."""
        if mask is None:
            return inputs, None
        mask = ops.cast(mask, "bool")
        # Padding may hold anything; a NaN there would pass through an attention weight of 0.
        return ops.where(ops.expand_dims(mask, -1), inputs, ops.zeros((), inputs.dtype)), mask

    def _add(self, hidden, branch, training):
        if training and self.dropout:
            check_has_draws("`dropout`", self._seed_generator)
            branch = draws.dropout(branch, self.dropout, self._seed_generator)
        # The feed-forward layer may compute in another dtype.
        return hidden + ops.cast(branch, hidden.dtype)

    def _add_feed_forward(self, hidden, mask, training, token_ids):
        # Keras passes on the masks of tensors, but a sum has none.
        arguments = {"mask": mask, "training": training, "token_ids": token_ids}
        accepted = {name: arguments[name] for name in self._feedforward_arguments}
        branch = self.feedforward(self._feedforward_norm(hidden), **accepted)
        check_returned("feedforward", branch, hidden.shape)
        return self._add(hidden, branch, training)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        save_draws(self, store)

    def load_own_variables(self, store):
        super().load_own_variables(load_draws(self, store))

    def compute_output_shape(self, inputs_shape):
        check_inputs_shape(inputs_shape)
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "feedforward": config_of(self.feedforward),
            "dropout": self.dropout,
        }
