"""Tokens and experts on many devices: gather tokens, compute, scatter outputs.

On a mesh, tokens are split over some axes, the data axes. Kernels are whole on every device, or
their experts are split over one axis, the expert axis. Each device runs its own experts:

1. Where the expert axis splits tokens as well, the devices along it gather each other's tokens.
2. Each device sorts and runs the assignments of its own experts.
3. The devices along the expert axis sum their outputs, and each keeps the outputs of its tokens.

Where less is sent that way, each token goes to the devices of its experts only, and its outputs
come back (all-to-all), as between processes on PyTorch. Kernels are sent nowhere.

A device may be sent every token, or none, and shapes are fixed. So rows are computed in chunks: the
first has buffers for little more than a mean share of the rows. What exceeds it goes through
shorter chunks of a loop, often none, which are computed again in the backward pass.

Axes: T tokens, E experts, K experts per token, R rows, n devices along the expert axis.
"""

import functools

import keras
from keras import ops

from keras_moe.backend import backend
from keras_moe.backend.base import named_platform
from keras_moe.backend.padded import interval
from keras_moe.ops.networks import Problem, run_network
from keras_moe.ops.plans import ExpertChoicePlan, GroupedPlan, pad_to_shards
from keras_moe.ops.sorting import ceil_divide


def run_on_mesh(network, problem, expert_axis):
    """`run_network` on a mesh, where each device makes a plan of its own part.

    `expert_axis`, or None, splits the kernels.
    """
    shards = backend.token_shards()
    platform = named_platform() or shards.platform
    return _run_on_mesh((network, shards, expert_axis, platform), problem)


@backend.compile_once
def _run_on_mesh(static, problem):
    network, shards, expert_axis, platform = static
    run = functools.partial(run_network, network, platform=platform)
    tokens_cross, whole = expert_axis in shards.axes, problem.plan

    def on_device(tokens, maps, assignments, key):
        experts, weights = assignments
        num_experts = next(iter(maps.values())).kernel.shape[0]
        num_rows = whole.num_rows() * ops.shape(tokens)[0] // max(whole.num_tokens, 1)
        lengths = _chunk_lengths(num_rows)

        def run_own(first):
            plan = whole.of_experts(experts, weights, first, num_experts)
            return _run_in_chunks(run, Problem(tokens, maps, plan, key), lengths)

        if expert_axis is None:
            return run_own(0)
        if tokens_cross:
            # Whether K rows of each token are fewer values than the tokens of all devices.
            num_tokens = shards.mesh.shape[expert_axis] * ops.shape(tokens)[0]
            if not isinstance(whole, ExpertChoicePlan) and lengths[0] < num_tokens:
                number = shards.mesh.shape[expert_axis] * num_experts
                plan = GroupedPlan.of(experts, weights, number)
                problem = Problem(tokens, maps, plan, key)
                return _by_all_to_all(run, problem, shards, expert_axis)
            tokens, experts, weights = shards.gather((tokens, experts, weights), expert_axis)
        outputs = run_own(first=shards.place_on(expert_axis) * num_experts)
        add = shards.sum_and_scatter if tokens_cross else shards.sum_over
        return add(outputs, expert_axis)

    def pad(tensor, value=0):
        return pad_to_shards(tensor, shards, value)

    assignments = pad(whole.experts, -1), pad(whole.weights)
    padded = problem._replace(tokens=pad(problem.tokens), plan=assignments)
    axes = (shards.axes, expert_axis, shards.axes, None)
    return shards.on_each_device(on_device, padded, axes)[: ops.shape(problem.tokens)[0]]


# A chunk is a span of rows, the same for every device. `lengths` are two integers: the rows of the
# first chunk and of every further one.


def _chunk_lengths(num_rows, num_buckets=1):
    """A thirty-second more than the mean share of the rows, then a quarter at a time."""
    lengths = ceil_divide(33 * num_rows, 32), ceil_divide(num_rows, 4)
    return tuple(ceil_divide(length, num_buckets) for length in lengths)


def _sum_chunks(run_chunk, lengths, count_rows, problem):
    """The sum of `run_chunk(problem, start, length)` over `count_rows(plan)`, with derivatives."""
    first, further = lengths

    def num_chunks(plan):
        return 1 + ceil_divide(ops.maximum(count_rows(plan) - first, 0), further)

    def span(number):
        return first + (number - 1) * further, further

    def of_inputs(context, start, length):
        def run(*inputs):
            outputs = run_chunk(Problem.join(inputs, context), start, length)
            return outputs, outputs

        return run

    def forward(inputs, context, save):
        run = of_inputs(context, 0, first)
        output, pullback = backend.vjp(run, inputs) if save else (run(*inputs)[0], ())

        def add(number, total):
            return total + of_inputs(context, *span(number))(*inputs)[0]

        return ops.fori_loop(1, num_chunks(context[0]), add, output), pullback

    def backward(inputs, context, pullback, gradient):
        def add(number, totals):
            _, pullback = backend.vjp(of_inputs(context, *span(number)), inputs)
            return keras.tree.map_structure(ops.add, totals, pullback(gradient))

        return ops.fori_loop(1, num_chunks(context[0]), add, pullback(gradient))

    def reference(inputs, context):
        return of_inputs(context, 0, context[0].num_rows())(*inputs)[0]

    inputs, context = problem.split()
    return backend.differentiable(forward, backward, inputs, context, reference)


def _run_in_chunks(run, problem, lengths):
    if lengths[0] >= problem.plan.num_rows():
        return run(problem)

    def run_chunk(problem, start, length):
        return run(problem._replace(plan=_chunk(problem.plan, start, length)))

    return _sum_chunks(run_chunk, lengths, lambda plan: ops.sum(plan.sizes), problem)


def _chunk(plan, start, length):
    """The plan of `length` rows from `start` on."""
    ends = ops.cumsum(plan.sizes)
    sizes = ops.clip(ends - start, 0, length) - ops.clip(ends - plan.sizes - start, 0, length)
    rows = plan.row_of_assignment - start
    # The last chunk may overrun the rows.
    assignments = ops.pad(plan.assignment_of_row, (0, length))
    return plan._replace(
        sizes=sizes,
        assignment_of_row=backend.slice_at(assignments, (start,), (length,)),
        row_of_assignment=ops.where((rows >= 0) & (rows < length), rows, -1),
    )


def _by_all_to_all(run, problem, shards, axis):
    """Send each token to the devices of its experts; a bucket has the rows for one device."""
    plan, num_local = problem.plan, next(iter(problem.maps.values())).kernel.shape[0]
    num_shards = shards.mesh.shape[axis]
    lengths = _chunk_lengths(plan.num_rows(), num_shards)

    def run_chunk(problem, start, length):
        plan = problem.plan
        buckets, local_expert = _buckets(plan, num_shards, start, length)
        received = shards.exchange(buckets.dispatch(problem.tokens), axis)
        expert = shards.exchange(local_expert, axis)
        # Outputs are weighted, and saved for the weights' gradient, on the device that computes
        # them, so that the receiving device need not save them.
        weight = shards.exchange(buckets.weight_of_row(plan.weights), axis)
        rows = GroupedPlan.of(ops.expand_dims(expert, 1), ops.expand_dims(weight, 1), num_local)
        outputs = run(problem._replace(tokens=received, plan=rows))
        return buckets._replace(weights=None).combine(shards.exchange(outputs, axis))

    def count_rows(plan):
        # If one device needs a chunk, all take part in it.
        return shards.max_over(ops.max(_rows_by_shard(plan, num_shards)), shards.axes)

    return _sum_chunks(run_chunk, lengths, count_rows, problem)


def _rows_by_shard(plan, num_shards):
    """How many rows go to each device, (n,) int32."""
    return ops.sum(ops.reshape(plan.sizes, (num_shards, -1)), axis=1)


def _buckets(plan, num_shards, start, length):
    """The rows of one chunk: in each bucket `length` rows, from its row `start` on.

    A plan of these rows, and their experts on the device they go to, -1 where a bucket is not full.
    """
    sizes = _rows_by_shard(plan, num_shards)
    starts = ops.cumsum(sizes) - sizes
    place = start + ops.arange(length, dtype="int32")
    row = ops.expand_dims(starts, 1) + place
    filled = place < ops.expand_dims(sizes, 1)
    row = ops.minimum(row, plan.num_rows() - 1)

    expert = interval(row, ops.cumsum(plan.sizes))
    local = ops.where(filled, expert % (plan.num_experts // num_shards), -1)

    # The place of each token's rows among all buckets.
    rows = plan.row_of_assignment
    shard = ops.minimum(interval(rows, ops.cumsum(sizes)), num_shards - 1)
    place = rows - ops.take(starts, shard) - start
    inside = (rows >= 0) & (place >= 0) & (place < length)
    buckets = plan._replace(
        assignment_of_row=ops.take(plan.assignment_of_row, ops.reshape(row, (-1,))),
        row_of_assignment=ops.where(inside, shard * length + place, -1),
    )
    return buckets, ops.reshape(local, (-1,))


def run_in_processes(network, problem, processes):
    """Tokens go to the processes that hold their experts, and outputs come back."""
    plan = problem.plan
    num_own = plan.num_experts // processes.num_processes

    def serve(rows, experts):
        # Sorted by the process they came from, and only then by expert.
        experts = ops.expand_dims(experts, 1)
        own = GroupedPlan.of(experts, ops.ones_like(experts, "float32"), num_own)
        return run_network(network, problem._replace(tokens=rows, plan=own))

    rows = plan.dispatch(problem.tokens)
    num_served = int(ops.sum(plan.sizes))
    outputs = processes.serve(rows[:num_served], plan.sizes, serve)
    # Rows past the last group are padding.
    padding = ((0, ops.shape(rows)[0] - num_served), (0, 0))
    return plan.combine(ops.pad(outputs, padding))
