"""`MixtureOfExperts`, the banks of experts that it takes, and Transformer blocks around it."""

from keras_moe.layers.capacity import Capacity
from keras_moe.layers.expert_bank import ExpertBank
from keras_moe.layers.feed_forward_experts import (
    FeedForwardExperts,
    GatedExperts,
    GatedFeedForward,
    LinearExperts,
)
from keras_moe.layers.layer_experts import LayerExperts
from keras_moe.layers.low_rank_experts import LowRankExperts
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.multi_gate import MultiGateMixtureOfExperts
from keras_moe.layers.stacked_experts import StackedExperts
from keras_moe.layers.transformer_block import TransformerEncoderBlock
from keras_moe.layers.transformer_decoder_block import TransformerDecoderBlock
from keras_moe.layers.zero_computation_experts import ZeroComputationExperts

MoE = MixtureOfExperts

__all__ = [
    "Capacity",
    "ExpertBank",
    "FeedForwardExperts",
    "GatedExperts",
    "GatedFeedForward",
    "LayerExperts",
    "LinearExperts",
    "LowRankExperts",
    "MixtureOfExperts",
    "MoE",
    "MultiGateMixtureOfExperts",
    "StackedExperts",
    "TransformerDecoderBlock",
    "TransformerEncoderBlock",
    "ZeroComputationExperts",
]


def __dir__():
    return __all__
