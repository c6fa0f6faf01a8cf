"""The router of most sparse models: the K experts with the best scores."""

from keras_moe._internal.serialization import register
from keras_moe.routers.selection_router import SelectionRouter


@register
class TopKRouter(SelectionRouter):
    """Each token goes to the `top_k` experts with the highest scores.

    With softmax scores and `top_k=1` the combine weight is the probability itself, so that the
    router learns from the task (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961). With
    more, the chosen scores are divided by their sum (Mixtral, Jiang et al. 2024,
    arXiv:2401.04088). With `score="sigmoid"`, `scaling_factor=2.5` and `balancer="loss_free"` this
    is the router of DeepSeek-V3 (arXiv:2412.19437) without its groups.

    Args:
        num_experts: number of experts, E.
        top_k: experts per token, K, from 1 to E.
        score: "softmax", "sigmoid" or "sqrt_softplus".
        renormalize: whether the weights of a token are divided by their sum. None: if K > 1. With
            softmax, K = 1 and True every weight is 1, and the router learns from its losses only.
        scaling_factor: what all weights are multiplied by.
        balancer: "loss_free", "quantile", or a `LossFreeBias` or `QuantileBias`, which balance the
            load by a selection bias instead of a loss. None: no selection bias.
        use_bias: whether a learned bias (E,) is added to the logits, as in gpt-oss.
        input_jitter: in training the router, not the experts, sees its inputs multiplied by noise
            uniform in `[1 - input_jitter, 1 + input_jitter]` (Switch uses 0.01). From 0 to below 1.
        logit_noise: in training, standard deviation of normal noise added to the logits.
        kernel_initializer: of the kernel (D, E). The default is normal with standard deviation
            0.02; zeros would send every token to the same experts.
        kernel_regularizer: of the kernel, or None. `keras.regularizers.OrthogonalRegularizer(
            mode="columns")` keeps the experts' directions apart (arXiv:2506.14038).
        seed: integer seed of the noise, or None.
        **kwargs: `name` and the other arguments of a Keras layer. `dtype` is always float32.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments:
        tokens: (T, D) float tensor.
        mask: (T,) bool tensor, False for padding, or None.
        training: whether jitter and noise are applied and the balancer works.
        indices: (T, K) integer tensor of experts to replay: they are weighed by the live scores,
            so the router keeps its gradient.

    Returns:
        An `ops.Routing`.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=8, top_k=2)
    >>> routing = router(keras.random.normal((32, 64)))
    >>> routing.indices.shape, routing.probs.shape
    ((32, 2), (32, 8))
    """
