"""The numbers behind the pictures."""

import numpy as np


def count_table(indices, groups, num_groups, num_experts):
    """Assignments (groups, E) of each group of tokens to each expert.

    Args:
        indices: (T, K) integers, -1 for no expert.
        groups: (T,) integers, -1 for a token that does not count.
        num_groups: number of groups.
        num_experts: E.
    """
    groups = np.broadcast_to(groups[:, None], indices.shape)
    counted = (indices >= 0) & (groups >= 0)
    cells = groups[counted].astype("int64") * num_experts + indices[counted]
    table = np.bincount(cells, minlength=num_groups * num_experts)
    return table.reshape(num_groups, num_experts)


def mutual_information(table):
    """Bits that the row of a count table tells about its column."""
    joint = table / max(table.sum(), 1)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log2(joint[seen] / independent[seen])))


def coactivation(indices, num_experts):
    """(E, E): share of the tokens of the row's expert that the column's expert serves as well.

    OLMoE (arXiv:2409.02060), section 5.2. The diagonal is NaN.
    """
    together = np.zeros((num_experts, num_experts))
    for first in range(indices.shape[1]):
        for second in range(indices.shape[1]):
            if first != second:
                together += count_table(
                    indices[:, second : second + 1], indices[:, first], num_experts, num_experts
                )
    served = np.bincount(indices[indices >= 0], minlength=num_experts)
    share = together / np.maximum(served, 1)[:, None]
    np.fill_diagonal(share, np.nan)
    return share


def saturation(before, after):
    """Share of the experts of each token after that it had before; OLMoE, section 5.1.

    Args:
        before: (T, K) integers, -1 for no expert.
        after: (T, K) integers, -1 for no expert.
    """
    kept = (after[:, :, None] == before[:, None, :]).any(axis=2) & (after >= 0)
    return kept.sum() / max((after >= 0).sum(), 1)
