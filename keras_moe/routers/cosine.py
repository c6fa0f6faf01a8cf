"""Routing by direction."""

import math

import keras
from keras import ops

from keras_moe._internal.initializers import reseeded
from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_integer
from keras_moe.ops.scores import along_units, unit
from keras_moe.routers.selection_router import SelectionRouter


@register
class CosineRouter(SelectionRouter):
    """Logits are cosines between a projection of the token and a direction of each expert.

    The norms of tokens and experts do not count, which keeps tokens from gathering around the
    directions of experts. `logits = scale * cos(x W, direction_e)` with a learned scale that starts
    at 2 and is at most 100.

    Args:
        num_experts: number of experts, E.
        projection_dim: width of the projection.
        **kwargs: the other arguments of `TopKRouter`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments and returns: as for `TopKRouter`.

    Example:

    >>> router = keras_moe.routers.CosineRouter(num_experts=8, projection_dim=16)
    >>> router(keras.random.normal((32, 64))).indices.shape
    (32, 2)

    Reference: Chi et al. 2022, X-MoE (arXiv:2204.09179), eq. 5 and 6; scale and cap as in Tutel.
    """

    normalizes_kernel = True
    projects_by_times_kernel = True

    _attribute_checks = {"projection_dim": check_positive_integer}
    _fixed_attributes = ("projection_dim",)

    def __init__(self, num_experts=None, projection_dim=256, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.projection_dim = projection_dim

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.directions = self._add_kernel(
            "directions",
            (self.projection_dim, self.num_experts),
            reseeded(self.kernel_initializer, 1),
        )
        self.log_scale = self.add_weight(
            name="log_scale", shape=(), initializer=keras.initializers.Constant(math.log(2.0))
        )

    def kernel_shape(self, features):
        return features, self.projection_dim

    def project(self, tokens):
        scale = ops.exp(ops.minimum(self.log_scale, math.log(100.0)))
        directions = scale * unit(self.directions, axis=0)
        return along_units(self.times_kernel(tokens), directions)

    def get_config(self):
        return {**super().get_config(), "projection_dim": self.projection_dim}
