"""Sorting by expert, and places in queues.

Axes: N assignments.
"""

from keras import ops

from keras_moe.backend import backend


def place_in_queue(queue, num_queues, turns=None):
    """How many entries of the same queue precede each entry, (N,) int32."""
    if turns is not None:
        places = place_in_queue(ops.take(queue, turns), num_queues)
        return put(places, turns)
    _, rank = sort_by_expert(queue, num_queues)
    sizes = queue_sizes(queue, num_queues)
    return rank - ops.take(ops.cumsum(sizes) - sizes, queue)


@backend.as_one_program
def queue_sizes(queue, num_queues):
    """The length of each queue, (num_queues,) int32."""
    return ops.segment_sum(ops.ones_like(queue), queue, num_queues)


def sort_by_expert(expert_of_assignment, num_keys):
    """A stable order by expert or queue, and for each assignment its place in it.

    Args:
        expert_of_assignment: (N,) int32, from 0 to `num_keys` - 1.
        num_keys: an integer.
    """
    num_rows = ops.shape(expert_of_assignment)[0]
    numbers = ops.arange(num_rows, dtype="int32")
    fits = isinstance(num_rows, int) and num_keys * num_rows < 2**31
    if (backend.compiles_static_shapes() and fits) or backend.lacks_stable_sort():
        # Expert and number in one integer: XLA sorts plain integers several times as fast as
        # pairs, and no two are equal.
        order = backend.sort(expert_of_assignment * num_rows + numbers) % num_rows
    else:
        order = ops.cast(ops.argsort(expert_of_assignment), "int32")
    return order, put(numbers, order)


def put(values, places, size=None):
    """(size,) zeros, but `values` (N,) at their `places` (N,), no two of which are equal.

    Without a size, N of them.
    """
    # `torch.vmap` writes only into what depends on its inputs.
    zeros = ops.zeros_like(places, values.dtype)
    if size is not None:
        zeros = ops.zeros((size,), values.dtype)
    # Not `ops.scatter`, which on PyTorch adds one value after the other in Python.
    return ops.scatter_update(zeros, ops.expand_dims(places, 1), values)
