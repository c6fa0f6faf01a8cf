"""Tokens to the processes that hold their experts, and their outputs back.

Axes: T tokens, D features, K experts per token, R rows (assignments sorted by expert).
"""

from keras import ops

from keras_moe.ops.groups import Groups
from keras_moe.ops.plans import GroupedPlan


def serve_elsewhere(processes, serve, tokens, plan):
    """Each token's weighted expert outputs, where each process holds some of the experts.

    Args:
        processes: a `backend.expert_processes()`.
        serve: `serve(rows, plan)`, what the experts of this process make of rows (R, D).
        tokens: (T, D).
        plan: a `GroupedPlan` of all experts.

    Returns:
        (T, D').
    """

    def serve_own(rows, experts):
        # Sorted by the process they came from, and only then by expert.
        order = ops.argsort(experts)
        groups = Groups(
            sizes=ops.segment_sum(ops.ones_like(experts), experts, num_own),
            assignment_of_row=ops.cast(order, "int32"),
            rows_of_token=ops.expand_dims(ops.cast(ops.argsort(order), "int32"), 1),
        )
        return serve(rows, GroupedPlan(groups, ops.ones((ops.shape(rows)[0], 1), "float32")))

    sizes = plan.groups.sizes
    num_own = sizes.shape[0] // processes.num_processes
    rows = plan.dispatch(tokens)
    num_served = int(ops.sum(sizes))
    outputs = processes.serve(rows[:num_served], sizes, serve_own)
    # Rows behind the last group are padding.
    padding = ((0, ops.shape(rows)[0] - num_served), (0, 0))
    return plan.combine(ops.pad(outputs, padding))
