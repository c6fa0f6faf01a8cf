"""What experts add to the tokens that they serve."""

from keras import ops

from keras_moe.ops.routing import count_assignments


def contributions(layer, routing, tokens):
    """Sum over its tokens of weight times norm of its output, for each expert, (E,) float32.

    Args:
        layer: a `layers.MixtureOfExperts` whose tokens choose experts.
        routing: an `ops.Routing` of the tokens by the layer.
        tokens: (T, D) float tensor.

    Reference: Lasby et al. 2025, REAP (arXiv:2510.13999), eq. 9, before the mean.
    """
    num_experts = layer.experts.num_experts
    total = ops.zeros((num_experts,), "float32")
    for choice in range(routing.indices.shape[-1]):
        # Each choice alone and with weight 1: the outputs of single experts.
        indices = routing.indices[:, choice : choice + 1]
        used = ops.logical_and(indices >= 0, ops.expand_dims(routing.mask, 1))
        alone = routing._replace(
            indices=indices,
            weights=ops.cast(used, "float32"),
            counts=count_assignments(indices, routing.mask, num_experts),
        )
        outputs = ops.cast(layer.router.plan(alone).run(layer.experts, tokens), "float32")
        norms = ops.sqrt(ops.sum(ops.square(outputs), axis=-1))
        added = ops.expand_dims(norms * routing.weights[:, choice], 1)
        chosen = ops.logical_and(used, indices == ops.arange(num_experts, dtype="int32"))
        total = total + ops.sum(ops.where(chosen, added, 0.0), axis=0)
    return total
