"""The exchange that sends each token to the devices of its experts, and to no other.

Rows sorted by expert are sorted by device as well. Each device has a bucket for each other one, of
little more than a mean share of its rows: shapes are fixed. What exceeds a bucket goes in further
passes.

Axes: T tokens of one device, K experts per token, n devices along the expert axis, e experts of
each, C rows of a bucket.
"""

from keras import ops

from keras_moe.ops.assignments import Assignments
from keras_moe.ops.grouped import run_grouped
from keras_moe.ops.grouped.records import Parameters
from keras_moe.ops.groups import Groups, collect_rows, dispatch_rows
from keras_moe.ops.passes import sum_passes


def run_by_all_to_all(step, tokens, weights, parameters, experts, shards, axis, lengths):
    """`run_grouped` with the experts of all devices along a mesh axis, for one device's tokens.

    Args:
        step, tokens, weights, parameters: as for `run_grouped`, the parts of one device.
        experts: (T, K) int32 numbers of experts among those of all devices; -1 for none.
        shards, axis: the `backend.token_shards()`, and the mesh axis of the experts.
        lengths: the `Lengths` of the passes, in rows of all buckets together.
    """
    num_local = parameters.num_experts
    num_shards = shards.along(axis)
    lengths = lengths.split(num_shards)
    groups = Assignments.of(experts, num_local * num_shards).sort()

    def pass_over(start, length, context):
        groups, frozen = context
        buckets, local_expert = _buckets(groups, num_shards, start, length)

        def run(tokens, weights, trained):
            received = shards.exchange(dispatch_rows(tokens, buckets), axis)
            expert = shards.exchange(local_expert, axis)
            # Outputs are weighted, and saved for the weights' gradient, on the device that computes
            # them, so that the receiving device need not save them.
            weight = shards.exchange(buckets.weight_of_row(weights), axis)
            rows = Assignments.of(ops.expand_dims(expert, 1), num_local).sort()
            parameters = Parameters(trained, frozen)
            outputs = run_grouped(step, received, ops.expand_dims(weight, 1), parameters, rows)
            return collect_rows(shards.exchange(outputs, axis), buckets)

        return run

    def num_passes(context):
        groups, _ = context
        passes = lengths.passes_for(ops.max(_rows_by_shard(groups, num_shards)))
        # If one device needs a pass, all take part in it.
        return shards.max_over(passes, shards.axes)

    inputs, context = (tokens, weights, parameters.trained), (groups, parameters.frozen)
    return sum_passes(pass_over, lengths, groups.num_rows(), num_passes, inputs, context)


def _rows_by_shard(groups, num_shards):
    """How many rows go to each device, (n,) int32."""
    return ops.sum(ops.reshape(groups.sizes, (num_shards, -1)), axis=1)


def _buckets(groups, num_shards, start, length):
    """The rows of one pass: in each bucket `length` rows, from its row `start` on.

    `Groups` of these rows, without sizes, and the expert of each row among those of the device it
    goes to, (n * C,) int32, -1 where a bucket is not full.
    """
    sizes = _rows_by_shard(groups, num_shards)
    starts = ops.cumsum(sizes) - sizes
    place = start + ops.arange(length, dtype="int32")
    row = ops.expand_dims(starts, 1) + place
    filled = place < ops.expand_dims(sizes, 1)
    row = ops.minimum(row, groups.num_rows() - 1)

    ends = ops.cumsum(groups.sizes)
    expert = ops.sum(ops.cast(ops.expand_dims(row, -1) >= ends, "int32"), axis=-1)
    num_local = groups.sizes.shape[0] // num_shards
    local = ops.where(filled, expert % num_local, -1)

    # The place of each token's rows among all buckets.
    rows = groups.rows_of_token
    shard = ops.sum(ops.cast(ops.expand_dims(rows, -1) >= ops.cumsum(sizes), "int32"), axis=-1)
    shard = ops.minimum(shard, num_shards - 1)
    place = rows - ops.take(starts, shard) - start
    inside = ops.logical_and(rows >= 0, ops.logical_and(place >= 0, place < length))
    buckets = Groups(
        sizes=groups.sizes,
        assignment_of_row=ops.take(groups.assignment_of_row, ops.reshape(row, (-1,))),
        rows_of_token=ops.where(inside, shard * length + place, -1),
    )
    return buckets, ops.reshape(local, (-1,))
