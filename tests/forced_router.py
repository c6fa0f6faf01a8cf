"""A router whose choice is fixed: token t goes to the experts t K, t K + 1, ..., modulo E."""

import keras
from keras import ops

from keras_moe import ops as moe_ops
from keras_moe import routers


@keras.saving.register_keras_serializable("tests")
class ForcedRouter(routers.Router):
    """With `to_one=True` all tokens go to the first K experts."""

    default_losses = ()

    def __init__(self, num_experts=None, top_k=2, to_one=False, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.top_k, self.to_one = top_k, to_one

    def build(self, tokens_shape):
        pass

    def route(self, tokens, mask, training, **context):
        first = ops.expand_dims(ops.arange(ops.shape(tokens)[0], dtype="int32"), 1)
        first = first * (0 if self.to_one else self.top_k)
        indices = (first + ops.arange(self.top_k, dtype="int32")) % self.num_experts
        logits = ops.zeros((ops.shape(tokens)[0], self.num_experts), "float32")
        weights = ops.full(ops.shape(indices), 1 / self.top_k, "float32")
        chosen = ops.one_hot(indices, self.num_experts, dtype="float32")
        probs = ops.sum(chosen, axis=1) / self.top_k
        return moe_ops.Routing(indices, weights, probs, logits, mask)

    def get_config(self):
        return {**super().get_config(), "top_k": self.top_k, "to_one": self.to_one}
