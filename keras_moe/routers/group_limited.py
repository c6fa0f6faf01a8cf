"""Top-k routing inside a few groups of experts."""

from keras_moe._internal.serialization import register
from keras_moe._internal.validation import check_positive_integer
from keras_moe.ops.selection import group_limited_scores, top_k_indices
from keras_moe.routers.selection_router import SelectionRouter


@register
class GroupLimitedRouter(SelectionRouter):
    """Each token goes to its best experts out of its best groups of experts.

    Where each group of neighbouring experts lives on a device of its own, a token visits few
    devices. A group is as good as the sum of its two best scores, bias included.

    Args:
        num_experts: number of experts, E.
        num_groups: number of groups; divides E.
        top_groups: groups a token may choose from; they must hold at least `top_k` experts.
        top_k: experts per token, K.
        score: "sigmoid", "softmax" or "sqrt_softplus".
        **kwargs: the other arguments of `TopKRouter`.

    Raises:
        ValueError: If an argument is out of its range.

    Call arguments and returns: as for `TopKRouter`.

    Example:

    >>> router = keras_moe.routers.GroupLimitedRouter(
    ...     num_experts=16, num_groups=4, top_groups=2, top_k=4, balancer="loss_free"
    ... )
    >>> router(keras.random.normal((32, 64))).indices.shape
    (32, 4)

    Reference: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, node-limited routing; DeepSeek-V2
    (arXiv:2405.04434) takes the best expert of a group instead of the sum of two.
    """

    _attribute_checks = {"num_groups": check_positive_integer, "top_groups": check_positive_integer}
    _fixed_attributes = ("num_groups", "top_groups")

    def __init__(
        self, num_experts=None, num_groups=4, top_groups=2, top_k=2, score="sigmoid", **kwargs
    ):
        super().__init__(num_experts, top_k=top_k, score=score, **kwargs)
        self.num_groups = num_groups
        self.top_groups = top_groups
        if num_experts is not None and (
            num_experts % num_groups or not top_k <= top_groups * num_experts // num_groups
        ):
            raise ValueError(
                "`num_groups` must divide `num_experts`, and `top_groups` groups must hold at "
                f"least `top_k` experts. Received: num_experts={num_experts}, "
                f"num_groups={num_groups}, top_groups={top_groups}, top_k={top_k}. "
                "Choose another number of experts, fewer groups, or more of them for a token, for "
                f"example `routers.GroupLimitedRouter({num_experts}, num_groups=1, top_groups=1)`."
            )
        if top_groups > num_groups:
            raise ValueError(
                "`top_groups` must be at most `num_groups`. Received: "
                f"top_groups={top_groups}, num_groups={num_groups}. Choose fewer for a token."
            )

    def select(self, scores):
        scores = group_limited_scores(scores, self.num_groups, self.top_groups)
        return top_k_indices(scores, self.top_k)

    def get_config(self):
        return {
            **super().get_config(),
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
        }
