"""A router for measurements: fixed patterns of load."""

from typing import Any

import keras
from keras import ops

from keras_moe._internal.checks import check_choice, check_integer
from keras_moe._internal.serialization import register
from keras_moe.ops import draws
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.fixed import fixed_routing
from keras_moe.routers.router import Router

PATTERNS = ("round_robin", "random", "zipf", "one")


@register
class ForcedRouter(Router):
    """Routes by a fixed pattern, to measure what the layer costs under that load.

    - "round_robin": token t goes to experts t K, t K + 1, ..., modulo E: exact balance
    - "random": K experts at random
    - "zipf": at random, expert e with a probability proportional to 1 / (e + 1)
    - "one": all tokens to the first K experts

    Args:
        num_experts: Integer. Number of experts, E.
        top_k: Integer. Experts per token, K, at most E. They have the weight 1 / K.
        pattern: String, one of the above.
        seed: Integer seed of the draws, or None.
        **kwargs: `name` and `trainable`, as in any Keras layer.

    Raises, call arguments and returns: as for `Router`, without `indices`.

    Example:

    >>> router = keras_moe.routers.ForcedRouter(num_experts=4, pattern="round_robin")
    >>> routing = router(keras.random.normal((32, 64)))
    >>> keras.ops.convert_to_numpy(routing.counts).tolist()
    [16, 16, 16, 16]
    """

    default_losses = ()

    def __init__(
        self,
        num_experts: int | None = None,
        top_k: int = 2,
        pattern: str = "round_robin",
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(num_experts, **kwargs)
        self.top_k = check_integer("top_k", top_k)
        self.pattern = check_choice("pattern", pattern, PATTERNS)
        self.seed = seed if seed is None else check_integer("seed", seed, minimum=0)
        self._draws = keras.random.SeedGenerator(self.seed)
        self.check_num_experts()

    def route(self, tokens, mask, training, **context):
        indices = self._indices(ops.shape(tokens)[0])
        return fixed_routing(indices, mask, self.num_experts)

    def _indices(self, num_tokens):
        choices = ops.arange(self.top_k, dtype="int32")
        if self.pattern == "one":
            return ops.zeros((num_tokens, 1), "int32") + choices
        if self.pattern == "round_robin":
            first = ops.expand_dims(ops.arange(num_tokens, dtype="int32"), 1) * self.top_k
            return (first + choices) % self.num_experts
        # The best of log p + Gumbel noise are draws without replacement.
        shape = (num_tokens, self.num_experts)
        noise = -ops.log(-ops.log(draws.uniform(shape, self._draws)))
        if self.pattern == "zipf":
            noise = noise - ops.log(ops.arange(1, self.num_experts + 1, dtype="float32"))
        return top_k_indices(noise, self.top_k)

    def get_config(self):
        config = super().get_config()
        return {**config, "top_k": self.top_k, "pattern": self.pattern, "seed": self.seed}
