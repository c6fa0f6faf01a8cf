"""Specialization of experts: their assignments by groups of tokens, and their contributions."""

from keras import ops

from keras_moe._internal.checks import check_integer, check_tensors, host_values
from keras_moe.metrics.usage import as_counts
from keras_moe.ops.routing import count_assignments
from keras_moe.ops.selection import existing


def count_table(routing, groups, num_groups):
    """Assignments of each expert from each group of tokens.

    Args:
        routing: An `ops.Routing`.
        groups: Integer tensor or list, (T,). The group of each token, such as a label or a token
            id, from 0 to `num_groups` - 1. Others are refused in a list or a NumPy array, and
            count for no group in a tensor.
        num_groups: Integer. Number of groups, G.

    Returns:
        (G, E) float32.

    Raises:
        ValueError: If there is not one group in range for each token.
    """
    num_groups, on_host = check_integer("num_groups", num_groups), host_values(groups)
    groups = groups if on_host is None else on_host
    check_tensors({"T": routing.mask.shape[0]}, groups=(groups, "T", "int"))
    if on_host is not None and ((on_host < 0) | (on_host >= num_groups)).any():
        raise ValueError(
            "`groups` must be from 0 to `num_groups` - 1; mask out tokens without a group. "
            f"Received: groups from {on_host.min()} to {on_host.max()}, num_groups={num_groups}"
        )
    num_experts = routing.counts.shape[0]
    indices = existing(routing.indices, num_experts)
    groups = ops.expand_dims(ops.cast(groups, "int32"), 1)
    known = ops.logical_and(groups >= 0, groups < num_groups)
    used = ops.logical_and(indices >= 0, ops.expand_dims(routing.mask, 1))
    cells = num_groups * num_experts
    cell = ops.where(ops.logical_and(used, known), groups * num_experts + indices, cells)
    cell = ops.reshape(cell, (-1,))
    table = ops.segment_sum(ops.ones_like(cell, dtype="float32"), cell, cells + 1)
    return ops.reshape(table[:-1], (num_groups, num_experts))


def mutual_information(table):
    """Mutual information of a token's group and its expert, in nats; 0 if independent.

    At most the logarithm of the number of groups, or of experts. Divided by `math.log(2)` it is in
    bits, as in the title of `visualization.specialization`.

    Args:
        table: Tensor or list, (G, E). Assignments of each group to each expert, as `count_table`
            returns them.

    Returns:
        Scalar, float32; 0 without assignments.
    """
    table = as_counts(table, "GE", "table")
    joint = table / ops.maximum(ops.sum(table), 1.0)
    rows, columns = ops.sum(joint, axis=1, keepdims=True), ops.sum(joint, axis=0, keepdims=True)
    ratio = joint / ops.where(joint > 0, rows * columns, 1.0)
    return ops.sum(joint * ops.log(ops.where(joint > 0, ratio, 1.0)))


def expert_saliency(layer, inputs, mask=None, token_ids=None):
    """Saliency of each expert: mean over its tokens of weight times norm of its output.

    The experts with the smallest saliency are those to prune.

    Args:
        layer: A `layers.MixtureOfExperts` whose tokens choose experts.
        inputs: Float tensor or list. Inputs of the layer.
        mask: Tensor or list of bools, or None. Mask of the inputs.
        token_ids: Integers or None. Those that a `routers.HashRouter` needs.

    Returns:
        (E,) float32; 0 for an expert without tokens.

    Raises:
        ValueError: If the tokens of the layer do not choose their experts.

    Reference: Lasby et al. 2025, REAP (arXiv:2510.13999), eq. 9.
    """
    if not layer.router.takes_capacity:
        raise ValueError(
            "The tokens of `layer` must choose their experts. Received: a layer with a "
            f"`{type(layer.router).__name__}`"
        )
    inputs = ops.convert_to_tensor(inputs)
    tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
    if mask is not None:
        mask = ops.convert_to_tensor(mask)
        tokens = ops.where(ops.reshape(ops.cast(mask, "bool"), (-1, 1)), tokens, 0.0)
    _, routing = layer(inputs, mask=mask, token_ids=token_ids, return_routing=True)
    counts = ops.cast(routing.counts, "float32")
    return contributions(layer, routing, tokens) / ops.maximum(counts, 1.0)


def contributions(layer, routing, tokens):
    """Sum over its tokens (T, D) of weight times norm of its output, for each expert, (E,) float32.

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
        outputs = ops.cast(layer.experts(tokens, layer.router.plan(alone)), "float32")
        norms = ops.sqrt(ops.sum(ops.square(outputs), axis=-1))
        added = ops.expand_dims(norms * routing.weights[:, choice], 1)
        chosen = ops.logical_and(used, indices == ops.arange(num_experts, dtype="int32"))
        total = total + ops.sum(ops.where(chosen, added, 0.0), axis=0)
    return total
