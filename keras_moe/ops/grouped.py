"""Grouped computation: each group of rows meets only its own expert's kernels.

Axes: T tokens, D features, E experts, R rows (assignments sorted by expert), H hidden width,
B rows a block.

A grouped operation is a *step*, the arithmetic of one expert on some of its rows, and a driver
that feeds it. Two drivers exist, because frameworks differ in one thing only:

- Where every shape is fixed at compile time (XLA), rows are taken in blocks. Block sizes come
  from a short list, a loop with a dynamic trip count stands for each size, and a group is covered
  by full blocks and one tail block of the smallest size that holds the rest. Kernels are read in
  place, and the hidden activations of a block stay in cache, which is why this can be faster than
  one large dense layer.
- Where shapes may depend on data (eager PyTorch, TensorFlow without XLA), each group is one slice
  of its exact size.

Neither computes a row that belongs to no group: padded and dropped assignments cost nothing.
"""

from typing import NamedTuple

from keras import ops

from keras_moe import backend

# A tail is rounded up to the next size. Powers of two waste up to half a block, so there is one
# size between each pair.
BLOCK_SIZES = (16, 64, 128, 192, 256, 384, 512)


class Step(NamedTuple):
    """The arithmetic of one expert on rows that are all its own.

    - `forward(rows, weights, kernels) -> (output_rows, saved)`
    - `backward(rows, weights, kernels, saved, output_gradient)
      -> (row_gradient, weight_gradient, kernel_gradients)`
    - `saved_widths`: the width of each tensor of rows in `saved`.
    - `output_width`: the width of `output_rows`.

    `weights` is the combine weight of each row, (rows, 1), or None where rows are not weighted.
    """

    forward: callable
    backward: callable
    saved_widths: tuple
    output_width: int


class Groups(NamedTuple):
    """Where the rows of each expert are, and how rows and tokens belong together.

    - `sizes` (E,) int32: the groups stand one behind another, in the order of the experts. Rows
      behind the last group belong to nobody and are not computed.
    - `token_of_row` (R,): the token each row is a copy of.
    - `rows_of_token` (T, K): the rows of each token, -1 where there is none.
    """

    sizes: object
    token_of_row: object
    rows_of_token: object


def sum_rows(rows, rows_of_token):
    """For each token the sum of its rows, in float32.

    A gather, not a scatter: tokens are written once, in order, and need no atomic adds.

    Args:
        rows: (R, D) rows grouped by expert.
        rows_of_token: (T, K) int32, the rows of each token, -1 where there is none.

    Returns:
        (T, D), in the dtype of `rows`.
    """
    present = ops.expand_dims(rows_of_token >= 0, -1)
    picked = backend.gather_rows(rows, ops.maximum(rows_of_token, 0))
    # `where`, not a product: a row that was never computed may hold anything, NaN included.
    picked = ops.where(present, picked, ops.zeros((), rows.dtype))
    return ops.cast(ops.sum(ops.cast(picked, "float32"), axis=1), rows.dtype)


def run_grouped(step, tokens, row_weights, kernels, groups):
    """Apply `step` to every group of rows and sum each token's rows.

    Args:
        step: a `Step`.
        tokens: (T, D).
        row_weights: (R,) combine weights, in the order of the rows.
        kernels: list of tensors with the expert axis first, (E, ...).
        groups: a `Groups`.

    Returns:
        (T, `step.output_width`) in the dtype of `tokens`.
    """
    driver = _Blocks if backend.compiles_static_shapes() else _Slices

    def forward(inputs, context):
        tokens, row_weights, *kernels = inputs
        groups = Groups(*context)
        rows, saved = driver.forward(step, tokens, row_weights, kernels, groups)
        return sum_rows(rows, groups.rows_of_token), saved

    def backward(inputs, context, saved, gradient):
        tokens, row_weights, *kernels = inputs
        groups = Groups(*context)
        row_gradient, weight_gradient, kernel_gradients = driver.backward(
            step, tokens, row_weights, kernels, groups, saved, gradient
        )
        return (
            sum_rows(row_gradient, groups.rows_of_token),
            weight_gradient,
            *kernel_gradients,
        )

    return backend.differentiable(forward, backward, (tokens, row_weights, *kernels), tuple(groups))


class _Slices:
    """Drive a step over slices of exact size: shapes depend on data."""

    @staticmethod
    def forward(step, tokens, row_weights, kernels, groups):
        outputs, saved = [], []
        for expert, token_rows, weights in _slices(row_weights, groups):
            output, kept = step.forward(
                backend.gather_rows(tokens, token_rows),
                weights,
                [kernel[expert] for kernel in kernels],
            )
            outputs.append(output)
            saved.append(kept)
        return _fill_rows(outputs, row_weights), saved

    @staticmethod
    def backward(step, tokens, row_weights, kernels, groups, saved, gradient):
        row_parts, weight_parts, kernel_parts = [], [], []
        for expert, token_rows, weights in _slices(row_weights, groups):
            row_gradient, weight_gradient, kernel_gradients = step.backward(
                backend.gather_rows(tokens, token_rows),
                weights,
                [kernel[expert] for kernel in kernels],
                saved[expert],
                backend.gather_rows(gradient, token_rows),
            )
            row_parts.append(row_gradient)
            weight_parts.append(weight_gradient)
            kernel_parts.append(kernel_gradients)
        kernel_gradients = [
            ops.cast(ops.stack(parts), kernel.dtype)
            for parts, kernel in zip(zip(*kernel_parts), kernels)
        ]
        weight_gradient = ops.squeeze(_fill_rows(weight_parts, row_weights), 1)
        return _fill_rows(row_parts, row_weights), weight_gradient, kernel_gradients


def _slices(row_weights, groups):
    """For each expert: its number, the tokens of its rows, and their weights (rows, 1)."""
    start = 0
    for expert, size in enumerate(backend.unstack_sizes(groups.sizes)):
        stop = start + size
        weights = ops.expand_dims(row_weights[start:stop], 1)
        yield expert, groups.token_of_row[start:stop], weights
        start = stop


def _fill_rows(parts, row_weights):
    """All rows, where `parts` holds the rows of each group: those of no group are zero."""
    computed = sum(ops.shape(part)[0] for part in parts)
    nobody = ops.zeros((ops.shape(row_weights)[0] - computed, parts[0].shape[1]), parts[0].dtype)
    return ops.concatenate([*parts, nobody])


class _Blocks:
    """Drive a step over blocks of fixed sizes: every shape is known to the compiler.

    A block may reach past the end of its group. There it reads zeros, and what it writes is
    either overwritten by the next group, or lies behind the last one, where nobody looks.
    """

    @staticmethod
    def forward(step, tokens, row_weights, kernels, groups):
        groups, row_weights, num_rows = _pad_for_last_block(groups, row_weights)
        dtype = tokens.dtype

        def block(kernels, rows, inside, token_rows, carry):
            output, saved = step.forward(
                _where(inside, backend.gather_rows(tokens, token_rows)),
                _rows_at(row_weights, rows),
                kernels,
            )
            return tuple(
                ops.slice_update(buffer, (rows[0], 0), value)
                for buffer, value in zip(carry, (output, *saved))
            )

        def group(expert, for_each_block, carry):
            of_expert = [_at(kernel, expert) for kernel in kernels]
            return for_each_block(lambda *args: block(of_expert, *args), carry)

        widths = (step.output_width, *step.saved_widths)
        carry = tuple(ops.zeros((num_rows, width), dtype) for width in widths)
        output, *saved = _for_each_group(groups, group, carry)
        return output, saved

    @staticmethod
    def backward(step, tokens, row_weights, kernels, groups, saved, gradient):
        num_weights = ops.shape(row_weights)[0]
        groups, row_weights, num_rows = _pad_for_last_block(groups, row_weights)

        def block(kernels, rows, inside, token_rows, carry):
            row_gradients, weight_gradients, *totals = carry
            start, length = rows
            row_gradient, weight_gradient, kernel_gradients = step.backward(
                _where(inside, backend.gather_rows(tokens, token_rows)),
                _rows_at(row_weights, rows),
                kernels,
                [ops.slice(buffer, (start, 0), (length, buffer.shape[1])) for buffer in saved],
                _where(inside, backend.gather_rows(gradient, token_rows)),
            )
            return (
                ops.slice_update(row_gradients, (start, 0), row_gradient),
                ops.slice_update(weight_gradients, (start, 0), weight_gradient),
                *(total + part for total, part in zip(totals, kernel_gradients)),
            )

        def group(expert, for_each_block, carry):
            row_gradients, weight_gradients, *totals = carry
            of_expert = [_at(kernel, expert) for kernel in kernels]
            zeros = [ops.zeros(kernel.shape[1:], "float32") for kernel in kernels]
            row_gradients, weight_gradients, *parts = for_each_block(
                lambda *args: block(of_expert, *args), (row_gradients, weight_gradients, *zeros)
            )
            totals = [
                ops.slice_update(
                    total, (expert, *[0] * len(part.shape)), ops.cast(part, total.dtype)[None]
                )
                for total, part in zip(totals, parts)
            ]
            return (row_gradients, weight_gradients, *totals)

        carry = (
            ops.zeros((num_rows, tokens.shape[1]), tokens.dtype),
            ops.zeros((num_rows, 1), row_weights.dtype),
            *(ops.zeros(kernel.shape, kernel.dtype) for kernel in kernels),
        )
        row_gradient, weight_gradient, *kernel_gradients = _for_each_group(groups, group, carry)
        return row_gradient, weight_gradient[:num_weights, 0], kernel_gradients


def _for_each_group(groups, group, carry):
    """`carry = group(expert, for_each_block, carry)` for every expert, in order."""
    ends = ops.cumsum(groups.sizes)

    def body(expert, carry):
        size = groups.sizes[expert]
        start = ends[expert] - size

        def for_each_block(block, carry):
            def at(offset, length, carry):
                rows = (start + offset, length)
                inside = ops.expand_dims(ops.arange(length, dtype="int32") < size - offset, 1)
                token_rows = ops.slice(groups.token_of_row, (rows[0],), (length,))
                return block(rows, inside, token_rows, carry)

            return _cover(size, at, carry)

        return group(expert, for_each_block, carry)

    return ops.fori_loop(0, groups.sizes.shape[0], body, carry)


def _cover(size, block, carry):
    """Cover `size` rows: full blocks, then one tail block of the smallest size that is enough."""
    largest = BLOCK_SIZES[-1]
    full = size // largest
    rest = size - full * largest
    carry = ops.fori_loop(0, full, lambda i, carry: block(i * largest, largest, carry), carry)
    shorter = 0
    for length in BLOCK_SIZES:
        trips = ops.cast(ops.logical_and(rest > shorter, rest <= length), "int32")
        # The offset depends on `i` though `i` is always 0: XLA hoists what does not depend on the
        # loop out of it, and would compute the tail blocks of all sizes.
        carry = ops.fori_loop(
            0,
            trips,
            lambda i, carry, length=length: block(full * largest + i * length, length, carry),
            carry,
        )
        shorter = length
    return carry


def _pad_for_last_block(groups, row_weights):
    """Room behind the last group for a block that reaches past its end."""
    room = BLOCK_SIZES[-1]
    groups = groups._replace(token_of_row=ops.pad(groups.token_of_row, (0, room)))
    row_weights = ops.expand_dims(ops.pad(row_weights, (0, room)), 1)
    return groups, row_weights, ops.shape(row_weights)[0]


def _rows_at(column, rows):
    start, length = rows
    return ops.slice(column, (start, 0), (length, 1))


def _at(stacked, expert):
    """Entry `expert` of a tensor (E, ...)."""
    entry = ops.slice(stacked, (expert, *[0] * (len(stacked.shape) - 1)), (1, *stacked.shape[1:]))
    return ops.squeeze(entry, 0)


def _where(inside, rows):
    return ops.where(inside, rows, ops.zeros((), rows.dtype))
