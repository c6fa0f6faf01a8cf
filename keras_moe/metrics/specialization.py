"""What experts have learned to serve: tables of assignments."""

from keras import ops

from keras_moe._internal.shape_checks import check_fields
from keras_moe._internal.tensor_checks import check_counts, check_is_integer, fits, host_values
from keras_moe._internal.validation import check_positive_integer
from keras_moe.metrics.contributions import contributions
from keras_moe.ops.selection import chosen_experts, existing


def count_table(routing, groups, num_groups):
    """How many assignments each expert has from each group of tokens.

    Args:
        routing: an `ops.Routing`.
        groups: (T,) integer group of each token, such as a label or a token id, from 0 to
            `num_groups` - 1. Those in a NumPy array are checked; in a tensor other ones count
            for no group.
        num_groups: number of groups, G.

    Returns:
        (G, E) float32.

    Raises:
        ValueError, TypeError: If the groups are no integers in range, one for each token.
    """
    check_fields(routing, "indices", "mask", "counts")
    check_positive_integer("num_groups", num_groups)
    on_host = host_values(groups)
    check_is_integer("groups", groups if on_host is None else on_host)
    if on_host is not None and ((on_host < 0) | (on_host >= num_groups)).any():
        raise ValueError(
            "`groups` must be from 0 to `num_groups` - 1. Received: "
            f"groups from {on_host.min()} to {on_host.max()}, num_groups={num_groups}. "
            "Number them, and mask out tokens without a group."
        )
    groups = ops.convert_to_tensor(groups)
    if not fits(groups.shape, routing.mask.shape):
        raise ValueError(
            "`groups` must have one group for each token. Received: "
            f"groups.shape={tuple(groups.shape)} for {routing.mask.shape[0]} tokens. Flatten "
            "them, or repeat the group of each row for its tokens by `np.repeat`."
        )
    num_experts = routing.counts.shape[0]
    indices = existing(routing.indices, num_experts)
    groups = ops.expand_dims(ops.cast(groups, "int32"), 1)
    known = ops.logical_and(groups >= 0, groups < num_groups)
    used = ops.logical_and(indices >= 0, ops.expand_dims(routing.mask, 1))
    used = ops.logical_and(used, known)
    cell = ops.where(used, groups * num_experts + indices, num_groups * num_experts)
    ones = ops.ones_like(cell, dtype="float32")
    cells = num_groups * num_experts + 1
    table = ops.segment_sum(ops.reshape(ones, (-1,)), ops.reshape(cell, (-1,)), cells)
    return ops.reshape(table[:-1], (num_groups, num_experts))


def mutual_information(table):
    """Mutual information of a token's group and its expert, in nats; 0 if independent.

    At most the logarithm of the number of groups, or of experts. Divided by `math.log(2)` it is in
    bits, as in the title of `visualization.specialization`.

    Args:
        table: (G, E) assignments of each group to each expert, as `count_table` gives.

    Returns:
        Scalar, float32; 0 without assignments.
    """
    check_counts("table", table, ("G", "E"))
    table = ops.cast(table, "float32")
    joint = table / ops.maximum(ops.sum(table), 1.0)
    rows, columns = ops.sum(joint, axis=1, keepdims=True), ops.sum(joint, axis=0, keepdims=True)
    ratio = joint / ops.where(joint > 0, rows * columns, 1.0)
    return ops.sum(joint * ops.log(ops.where(joint > 0, ratio, 1.0)))


def coactivation(routing):
    """Which experts serve the same tokens.

    Args:
        routing: an `ops.Routing`.

    Returns:
        (E, E) float32: the share of the tokens of the row's expert that the column's expert serves
        too. The diagonal is 1, or 0 for an expert without tokens.

    Reference: Muennighoff et al. 2024, OLMoE (arXiv:2409.02060), section 5.2.
    """
    check_fields(routing, "indices", "mask", "counts")
    chosen = chosen_experts(routing.indices, routing.counts.shape[0])
    chosen = ops.cast(ops.logical_and(chosen, ops.expand_dims(routing.mask, 1)), "float32")
    together = ops.matmul(ops.transpose(chosen), chosen)
    return together / ops.maximum(ops.expand_dims(ops.sum(chosen, axis=0), 1), 1.0)


def expert_saliency(layer, inputs, mask=None, token_ids=None):
    """What each expert contributes: mean over its tokens of weight times norm of its output.

    The experts with the smallest saliency are those to prune.

    Args:
        layer: a `layers.MixtureOfExperts` whose tokens choose experts.
        inputs: what the layer is called with.
        mask: mask of the inputs, or None.
        token_ids: those that a `routers.HashRouter` needs, or None.

    Returns:
        (E,) float32; 0 for an expert without tokens.

    Raises:
        ValueError: If the tokens of the layer do not choose their experts.

    Reference: Lasby et al. 2025, REAP (arXiv:2510.13999), eq. 9.
    """
    if not hasattr(layer, "router") or not hasattr(layer, "experts"):
        raise TypeError(
            "`layer` must be a `layers.MixtureOfExperts`. Received: an object of type "
            f"{type(layer).__name__}. Pass one of `inspection.moe_layers(model).values()`."
        )
    if not layer.router.takes_capacity:
        raise ValueError(
            "The saliency of an expert is a mean over the tokens that chose it. Received: a layer "
            f"with a `{type(layer.router).__name__}`, whose tokens do not choose. Use a layer with "
            "another router, such as `routers.TopKRouter`."
        )
    _, routing = layer(inputs, mask=mask, token_ids=token_ids, return_routing=True)
    tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
    if mask is not None:
        tokens = ops.where(ops.reshape(mask, (-1, 1)), tokens, 0.0)
    counts = ops.cast(routing.counts, "float32")
    return contributions(layer, routing, tokens) / ops.maximum(counts, 1.0)
