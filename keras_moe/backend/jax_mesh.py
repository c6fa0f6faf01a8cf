"""Networks of experts on a mesh of devices, on JAX: gather tokens, compute, scatter outputs.

Tokens are split over some axes, the data axes. Kernels are whole on every device, or their experts
are split over one axis, the expert axis. Each device runs its own experts:

1. Where the expert axis splits tokens as well, the devices along it gather each other's tokens.
2. Each device sorts and runs the assignments of its own experts.
3. The devices along the expert axis sum their outputs, and each keeps the outputs of its tokens.

Where less is sent that way, each token goes to the devices of its experts only, and its outputs
come back (all-to-all). Kernels are sent nowhere.

A device may be sent every token, or none, and shapes are fixed. So rows are computed in chunks: the
first has buffers for little more than a mean share of the rows. What exceeds it goes through
shorter chunks of a loop, often none, which are computed again in the backward pass.

Axes: T tokens, E experts, K experts per token, R rows, n devices along the expert axis.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_moe.backend import jax_derivatives
from keras_moe.backend.base import is_any_derivative, other_key
from keras_moe.backend.padded import interval


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def run(run, network, platform, shards, any_derivative, problem):
    """`run(network, problem, platform)` on all devices; `shards` splits all maps alike."""
    run, plan = functools.partial(run, network, platform=platform), problem.plan
    expert_axis = shards.expert_axis
    num_tokens, tokens_cross = problem.tokens.shape[0], expert_axis in shards.axes

    def on_device(tokens, weights, trained, frozen, experts, key):
        device = lax.axis_index((*shards.axes, *({expert_axis} - {None, *shards.axes})))
        key = other_key(key, 7919 * device)
        own = problem._make((tokens, weights, trained, frozen, plan, key))
        num_experts = own.num_experts
        num_rows = plan.num_rows() * tokens.shape[0] // max(num_tokens, 1)
        lengths = _chunk_lengths(num_rows)

        def run_experts_from(first):
            own_plan = plan.of_experts(experts, weights, first, num_experts)
            return _run_in_chunks(
                run, own._replace(tokens=tokens, weights=own_plan.weights, plan=own_plan), lengths
            )

        if expert_axis is None:
            return run_experts_from(0)
        if tokens_cross:
            num_shards = shards.mesh.shape[expert_axis]
            # Whether K rows of each token, where each has so many, are fewer values than the tokens
            # of all devices.
            has_all_rows = plan.num_rows() == plan.experts.size
            if has_all_rows and lengths[0] < num_shards * tokens.shape[0]:
                own_plan = plan.of(experts, weights, num_shards * num_experts)
                return _by_all_to_all(
                    run, own._replace(plan=own_plan), num_shards, shards, expert_axis
                )
            gathered = lax.all_gather((tokens, experts, weights), expert_axis, tiled=True)
            tokens, experts, weights = gathered
        outputs = run_experts_from(lax.axis_index(expert_axis) * num_experts)
        if tokens_cross:  # Each device keeps its own part of the sum.
            return lax.psum_scatter(outputs, expert_axis, tiled=True)
        return lax.psum(outputs, expert_axis)

    tokens, weights, trained, frozen, _, key = problem
    experts = shards.pad(plan.experts, -1)
    operands = shards.pad(tokens), shards.pad(weights), trained, frozen, experts, key
    axes = shards.axes, shards.axes, expert_axis, expert_axis, shards.axes, None
    return shards.on_each_device(on_device, operands, axes)[:num_tokens]


# A chunk is a span of rows, the same for every device. `lengths` are two integers: the rows of the
# first chunk and of every further one.


def _chunk_lengths(num_rows, num_buckets=1):
    """33/32 of the mean share of the rows, then chunks of a quarter of it."""
    lengths = -(-33 * num_rows // 32), -(-num_rows // 4)
    return tuple(-(-length // num_buckets) for length in lengths)


def _sum_chunks(run_chunk, lengths, count_rows, problem):
    """The sum of `run_chunk(problem, start, length)` over `count_rows(plan)`, with derivatives."""
    if is_any_derivative():  # the loop has no derivative
        return run_chunk(problem, 0, problem.plan.num_rows())
    first, further = lengths

    def num_chunks(context):
        _, plan, _ = context
        return 1 + -(-jnp.maximum(count_rows(plan) - first, 0) // further)

    def chunk(context, start, length):
        return lambda *inputs: run_chunk(problem._make((*inputs, *context)), start, length)

    def nth_chunk(context, number):
        return chunk(context, first + (number - 1) * further, further)

    def forward(inputs, context, save):
        run_first = chunk(context, 0, first)
        output, pullback = jax.vjp(run_first, *inputs) if save else (run_first(*inputs), ())

        def add(number, total):
            return total + nth_chunk(context, number)(*inputs)

        return lax.fori_loop(1, num_chunks(context), add, output), pullback

    def backward(inputs, context, pullback, gradient):
        def add(number, totals):
            _, pullback = jax.vjp(nth_chunk(context, number), *inputs)
            return jax.tree.map(jnp.add, totals, pullback(gradient))

        return lax.fori_loop(1, num_chunks(context), add, pullback(gradient))

    return jax_derivatives.differentiable(forward, backward, problem[:3], problem[3:])


def _run_in_chunks(run, problem, lengths):
    if lengths[0] >= problem.plan.num_rows():
        return run(problem)

    def run_chunk(problem, start, length):
        plan, key = _chunk(problem.plan, start, length), other_key(problem.key, 104729 * start)
        return run(problem._replace(plan=plan, key=key))

    return _sum_chunks(run_chunk, lengths, lambda plan: jnp.sum(plan.sizes), problem)


def _chunk(plan, start, length):
    """The plan of `length` rows from `start` on."""
    ends = jnp.cumsum(plan.sizes)
    sizes = jnp.clip(ends - start, 0, length) - jnp.clip(ends - plan.sizes - start, 0, length)
    rows = plan.row_of_assignment - start
    inside = (rows >= 0) & (rows < length)
    # The last chunk may overrun the rows.
    assignments = jnp.pad(plan.assignment_of_row, (0, length))
    return plan._replace(
        sizes=sizes,
        assignment_of_row=lax.dynamic_slice(
            assignments, (start,), (length,), allow_negative_indices=False
        ),
        row_of_assignment=jnp.where(inside, rows, -1),
        # Else each chunk would add the gradient of all weights that the last bias gives.
        experts=jnp.where(inside, plan.experts, -1),
    )


def _by_all_to_all(run, problem, num_shards, shards, axis):
    """Send each token to the devices of its experts; a bucket has the rows for one device."""
    num_local = problem.num_experts
    lengths = _chunk_lengths(problem.plan.num_rows(), num_shards)

    def exchange(tensor):
        # Part i goes to device i; the result has a part from each device.
        return lax.all_to_all(tensor, axis, split_axis=0, concat_axis=0, tiled=True)

    def run_chunk(problem, start, length):
        plan = problem.plan
        buckets, local_expert = _buckets(plan, num_shards, start, length)
        # Outputs are weighted, and saved for the weights' gradient, on the device that computes
        # them, so that the receiving device need not save them.
        weight = exchange(buckets.weight_of_row(problem.weights))
        expert = exchange(local_expert)
        received = plan.of(expert[:, None], weight[:, None], num_local)
        tokens = exchange(buckets.dispatch(problem.tokens))
        key = other_key(problem.key, 104729 * start)
        outputs = run(
            problem._replace(tokens=tokens, weights=received.weights, plan=received, key=key)
        )
        return buckets._replace(weights=None).combine(exchange(outputs))

    def count_rows(plan):
        # If one device needs a chunk, all take part in it.
        return lax.pmax(jnp.max(_rows_by_shard(plan, num_shards)), shards.axes)

    return _sum_chunks(run_chunk, lengths, count_rows, problem)


def _rows_by_shard(plan, num_shards):
    """How many rows go to each device, (n,) int32."""
    return jnp.sum(plan.sizes.reshape(num_shards, -1), axis=1)


def _buckets(plan, num_shards, start, length):
    """The rows of one chunk: in each bucket `length` rows, from its row `start` on.

    A plan of these rows, and their experts on the device they go to, -1 where a bucket is not full.
    """
    sizes = _rows_by_shard(plan, num_shards)
    starts = jnp.cumsum(sizes) - sizes
    place = start + jnp.arange(length, dtype="int32")
    row = jnp.minimum(starts[:, None] + place, plan.num_rows() - 1)
    filled = place < sizes[:, None]

    expert = interval(row, jnp.cumsum(plan.sizes))
    local = jnp.where(filled, expert % (plan.num_experts // num_shards), -1)

    # The place of each token's rows among all buckets.
    rows = plan.row_of_assignment
    shard = jnp.minimum(interval(rows, jnp.cumsum(sizes)), num_shards - 1)
    place = rows - jnp.take(starts, shard) - start
    inside = (rows >= 0) & (place >= 0) & (place < length)
    buckets = plan._replace(
        assignment_of_row=jnp.take(plan.assignment_of_row, row.reshape(-1)),
        row_of_assignment=jnp.where(inside, shard * length + place, -1),
    )
    return buckets, local.reshape(-1)
