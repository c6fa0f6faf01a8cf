"""Fewer experts, or fewer for each token, in a trained model."""

from keras_moe.surgery.operations import Surgery, merge_experts, prune_experts, set_top_k

__all__ = ["Surgery", "merge_experts", "prune_experts", "set_top_k"]


def __dir__():
    return __all__
