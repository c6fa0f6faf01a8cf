"""A bank of gated feed-forward experts, as in today's language models."""

from functools import partial

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_not_negative, check_positive_number, optional
from keras_moe.layers.dense_experts import DenseExperts


@register
class GatedExperts(DenseExperts):
    """Experts of the form `(activation(x Wg) * (x Wu)) Wd`; "silu" makes it SwiGLU.

    The kernels of all experts are stacked: `gate_kernel` and `up_kernel` (E, D, H) and
    `down_kernel` (E, H, D); with biases `gate_bias` and `up_bias` (E, H) and `down_bias` (E, D).

    Args:
        num_experts: number of experts, E.
        hidden_dim: hidden width of each expert, H.
        activation: name or function of one tensor, without weights, applied to the gate.
        use_bias: whether the three projections have a bias.
        clip: limit of what enters the product: the gate's projection is clipped from above, the
            other one on both sides. None: no limit.
        up_shift: number that is added to the up projection; gpt-oss has 1.
        kernel_initializer: of each expert's kernels.
        bias_initializer: of the biases.
        kernel_regularizer: of the stacked kernels, or None.
        bias_regularizer: of the stacked biases, or None.
        **kwargs: arguments of a Keras layer, such as `name` and `dtype`.

    Raises:
        ValueError: If `num_experts` or `hidden_dim` is not a positive integer, or `clip` is not a
            positive number.

    Call arguments:
        tokens: (T, D) float tensor.
        plan: an `ops.GroupedPlan`.

    Returns:
        (T, D): each token's expert outputs, weighted and summed.

    Example:

    >>> experts = keras_moe.layers.GatedExperts(num_experts=8, hidden_dim=256)
    >>> layer = keras_moe.layers.MixtureOfExperts(experts)
    >>> layer(keras.random.normal((2, 10, 64))).shape
    (2, 10, 64)

    References: Shazeer 2020 (arXiv:2002.05202), eq. 6; Jiang et al. 2024 (arXiv:2401.04088);
    OpenAI 2025 (arXiv:2508.10925), section 2, for the limit and the shift.
    """

    up_names = ("gate", "up")

    _attribute_checks = {
        "clip": optional(partial(check_positive_number, example=7.0)),
        "up_shift": check_not_negative,
    }

    def __init__(
        self,
        num_experts,
        hidden_dim,
        activation="silu",
        use_bias=False,
        clip=None,
        up_shift=0.0,
        **kwargs,
    ):
        super().__init__(num_experts, hidden_dim, activation, use_bias, **kwargs)
        self.clip = clip
        self.up_shift = up_shift

    def get_config(self):
        return {**super().get_config(), "clip": self.clip, "up_shift": self.up_shift}
