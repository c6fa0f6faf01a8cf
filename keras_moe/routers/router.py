"""The interface every router has."""

import keras
from keras import ops

from keras_moe.ops.routing import Routing
from keras_moe.validation import check_mask


class Router(keras.layers.Layer):
    """Abstract: decides which experts serve which token.

    A router is a layer of its own and always computes in float32, whatever the policy of the model
    around it: rounded scores select other experts. It can be used alone, without experts.

    A subclass implements `route(tokens, mask, training)`, which returns an `ops.Routing`, and sets
    `top_k`, the number of experts per token. It sets `causal` to False if a token's experts depend
    on other tokens of the batch: such a router must not serve a language model.

    Args:
        num_experts: number of experts, E.
    """

    causal = True

    def __init__(self, num_experts, **kwargs):
        if kwargs.setdefault("dtype", "float32") != "float32":
            raise ValueError(
                "A router always computes in float32, whatever the policy around it. "
                f"Received: dtype={kwargs['dtype']!r}. Leave `dtype` out."
            )
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.supports_masking = True

    def call(self, tokens, mask=None, training=None):
        """Route tokens.

        Args:
            tokens: (T, D) float tensor.
            mask: (T,) bool tensor, False for padding, or None.
            training: whether noise is added.

        Returns:
            An `ops.Routing`.
        """
        if len(tokens.shape) != 2:
            raise ValueError(
                "A router takes tokens (T, D). Received: "
                f"tokens.shape={tuple(tokens.shape)}. Flatten all leading axes into one."
            )
        if mask is not None:
            check_mask(mask.shape, tokens.shape)
            mask = ops.cast(mask, "bool")
            # Padding may hold anything, NaN included, and its gradient must be zero.
            tokens = ops.where(ops.expand_dims(mask, 1), tokens, 0.0)
        return self.route(tokens, mask, training)

    def route(self, tokens, mask, training):
        raise NotImplementedError(
            f"{type(self).__name__} must implement `route(tokens, mask, training)` and return an "
            "`ops.Routing`."
        )

    def compute_mask(self, tokens, mask=None):
        return None

    def compute_output_spec(self, tokens, mask=None, training=None):
        return routing_spec(tokens.shape[0], self.num_experts, self.top_k)

    def get_config(self):
        config = super().get_config()
        del config["dtype"]
        return {**config, "num_experts": self.num_experts}


def routing_spec(num_tokens, num_experts, top_k):
    """The shapes and dtypes of a routing, for symbolic calls."""
    return Routing(
        indices=keras.KerasTensor((num_tokens, top_k), "int32"),
        weights=keras.KerasTensor((num_tokens, top_k), "float32"),
        probs=keras.KerasTensor((num_tokens, num_experts), "float32"),
        logits=keras.KerasTensor((num_tokens, num_experts), "float32"),
        mask=keras.KerasTensor((num_tokens,), "bool"),
        counts=keras.KerasTensor((num_experts,), "int32"),
        dropped=keras.KerasTensor((), "float32"),
    )
