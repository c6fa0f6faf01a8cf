"""A bank of plain feed-forward experts."""

from keras_moe._internal.serialization import register
from keras_moe.layers.dense_experts import DenseExperts


@register
class FeedForwardExperts(DenseExperts):
    """Experts of the form `activation(x W1 + b1) W2 + b2`.

    The kernels of all experts are stacked: `up_kernel` (E, D, H) and `down_kernel` (E, H, D),
    `up_bias` (E, H) and `down_bias` (E, D). Each expert's kernel is initialised by itself.

    Args:
        num_experts: number of experts, E.
        hidden_dim: hidden width of each expert, H.
        activation: name or function of one tensor, without weights.
        use_bias: whether both projections have a bias.
        kernel_initializer: of each expert's kernels.
        bias_initializer: of the biases.
        kernel_regularizer: of the stacked kernels, or None.
        bias_regularizer: of the stacked biases, or None.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If `num_experts` or `hidden_dim` is not a positive integer.

    Call arguments:
        tokens: (T, D) float tensor.
        plan: an `ops.GroupedPlan`.

    Returns:
        (T, D): each token's expert outputs, weighted and summed.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=256)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    Reference: Shazeer et al. 2017 (arXiv:1701.06538), section 2.
    """

    up_names = ("up",)

    def __init__(self, num_experts, hidden_dim, activation="gelu", use_bias=True, **kwargs):
        super().__init__(num_experts, hidden_dim, activation, use_bias, **kwargs)
