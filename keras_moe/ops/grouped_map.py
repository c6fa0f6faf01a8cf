"""Arbitrary functions on groups of rows: only the chosen function runs on each row."""

from keras import ops

from keras_moe import backend

BLOCK_ROWS = 64


def map_groups(functions, rows, sizes, output_width, state):
    """Apply function e to group e of the rows.

    Where shapes are fixed at compile time the rows are cut into blocks, none of which holds rows
    of two groups; a scan over the blocks switches to the function of each. A function therefore
    sees up to 63 rows of zeros behind its own.

    Args:
        functions: E functions `(rows (n, D), state) -> (rows (n, D'), state)`.
        rows: (R, D) rows grouped by expert.
        sizes: (E,) int32 sizes of the groups; rows behind the last group belong to nobody.
        output_width: D'.
        state: list of tensors, handed through the functions that run.

    Returns:
        Rows (R, D'), zero where they belong to nobody, and the state.
    """
    if backend.compiles_static_shapes():
        return _map_blocks(functions, rows, sizes, output_width, state)
    return _map_slices(functions, rows, sizes, output_width, state)


def _map_slices(functions, rows, sizes, output_width, state):
    outputs, start = [], 0
    for function, size in zip(functions, backend.unstack_sizes(sizes)):
        # A function without rows is given one of zeros and its effects are thrown away: all its
        # gradients exist then, and no statistics of nothing, which are NaN, enter the state.
        spare = ops.maximum(1 - size, 0)
        output, new = function(ops.pad(rows[start : start + size], ((0, spare), (0, 0))), state)
        state = [ops.where(size > 0, *values) for values in zip(new, state)]
        outputs.append(output[:size])
        start = start + size
    nobody = ops.zeros((ops.shape(rows)[0] - start, output_width), outputs[0].dtype)
    return ops.concatenate([*outputs, nobody]), state


def _map_blocks(functions, rows, sizes, output_width, state):
    num_experts = len(functions)
    num_rows = ops.shape(rows)[0]
    num_blocks = (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS + num_experts
    blocks_of_expert = (sizes + BLOCK_ROWS - 1) // BLOCK_ROWS
    last_blocks, ends = ops.cumsum(blocks_of_expert), ops.cumsum(sizes)
    first_blocks, starts = last_blocks - blocks_of_expert, ends - sizes

    # Expert and rows of each block; blocks behind the last expert's belong to nobody.
    block = ops.arange(num_blocks, dtype="int32")
    expert_of_block = _interval(block, last_blocks)
    expert = ops.minimum(expert_of_block, num_experts - 1)
    first_row = ops.take(starts, expert) + (block - ops.take(first_blocks, expert)) * BLOCK_ROWS
    row = ops.expand_dims(first_row, 1) + ops.arange(BLOCK_ROWS, dtype="int32")
    inside = ops.logical_and(
        row < ops.expand_dims(ops.take(ends, expert), 1),
        ops.expand_dims(expert_of_block < num_experts, 1),
    )
    picked = backend.gather_rows(rows, ops.where(inside, row, 0))
    picked = ops.where(ops.expand_dims(inside, -1), picked, ops.zeros((), rows.dtype))

    def nobody(block_rows, state):
        return ops.zeros((BLOCK_ROWS, output_width), block_rows.dtype), state

    def step(state, block):
        expert, block_rows = block
        output, state = ops.switch(expert, [*functions, nobody], block_rows, state)
        return state, output

    state, outputs = backend.scan(step, state, (expert_of_block, picked))
    outputs = ops.reshape(outputs, (-1, output_width))

    # Where each row went.
    row = ops.arange(num_rows, dtype="int32")
    expert_of_row = _interval(row, ends)
    expert = ops.minimum(expert_of_row, num_experts - 1)
    place = ops.take(first_blocks, expert) * BLOCK_ROWS + row - ops.take(starts, expert)
    is_served = expert_of_row < num_experts
    result = backend.gather_rows(outputs, ops.where(is_served, place, 0))
    served = ops.expand_dims(is_served, 1)
    return ops.where(served, result, ops.zeros((), result.dtype)), state


def _interval(values, ends):
    """For each value the number of `ends` at or below it: the interval it lies in."""
    below = ops.expand_dims(ends, 0) <= ops.expand_dims(values, 1)
    return ops.sum(ops.cast(below, "int32"), axis=1)
