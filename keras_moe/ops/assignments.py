"""Assignments: which expert serves each choice of each token, before any row is sorted.

Axes: T tokens, E experts, K experts per token, N = T * K assignments.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.ops.groups import Groups
from keras_moe.ops.sorting import queue_sizes, sort_by_expert


class Assignments(NamedTuple):
    """The assignments that are served.

    - `experts` (T, K) int32: the expert of each assignment, -1 where none serves it.
    - `sizes` (E,) int32: how many each expert serves.
    """

    experts: Any
    sizes: Any

    @classmethod
    def of(cls, experts, num_experts):
        """Those to the first `num_experts` experts; any other number (T, K) stands for none."""
        served = ops.logical_and(experts >= 0, experts < num_experts)
        experts = ops.where(served, experts, -1)
        queue = ops.reshape(ops.where(served, experts, num_experts), (-1,))
        return cls(experts, queue_sizes(queue, num_experts + 1)[:num_experts])

    @property
    def num_experts(self):
        return self.sizes.shape[0]

    def choice_major(self):
        """The expert of each assignment, (N,), E where none serves it.

        Assignment k * T + t is the k-th choice of token t.
        """
        experts = ops.where(self.experts >= 0, self.experts, self.num_experts)
        return ops.reshape(ops.transpose(experts), (-1,))

    def of_first(self, num_experts):
        """The assignments to the first experts."""
        experts = ops.where(self.experts < num_experts, self.experts, -1)
        return Assignments(experts, self.sizes[:num_experts])

    def weight_at(self, weights, first, last):
        """What a token's choices of the experts `first` to `last` - 1 weigh together, (T, 1)."""
        inside = ops.logical_and(self.experts >= first, self.experts < last)
        return ops.sum(ops.where(inside, weights, 0.0), axis=1, keepdims=True)

    def served(self):
        """Which tokens have an assignment that is served, (T,) bool."""
        return ops.any(self.experts >= 0, axis=1)

    def sort(self):
        """The `Groups` of rows sorted by expert: inside one in the order of the assignments."""
        num_tokens, top_k = ops.shape(self.experts)
        expert_of_assignment = self.choice_major()
        order, rank = sort_by_expert(expert_of_assignment, self.num_experts + 1)
        rows = ops.where(expert_of_assignment < self.num_experts, rank, -1)
        return Groups(
            sizes=self.sizes,
            assignment_of_row=order,
            rows_of_token=ops.transpose(ops.reshape(rows, (top_k, num_tokens))),
        )
