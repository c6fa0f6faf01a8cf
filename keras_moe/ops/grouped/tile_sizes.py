"""How many rows the tiles of a loop have, and which tiles cover a group."""

import functools

import numpy as np

# Fixed cost of a tile, expressed in rows: its kernels are read, and the sums of their gradients
# read and written. Measured 25 on a CPU for kernels of 256 x 1024, and more for larger ones.
TILE_OVERHEAD = 24


def tile_sizes(num_rows, num_experts):
    """The sizes of tiles, smallest first.

    Each is compiled, forward and backward, so there are few: one that holds a mean group, one of
    three quarters of it, for groups around the mean, and for the rest one of an eighth, down to
    a power of two. Below 4 rows a product is bound by reading its kernel; from 32 on smaller tiles
    gain nothing, nor do larger ones from 512 on. None has more than an eighth of all rows: in the
    backward pass some seven intermediate values of a tile exist at once, which would be most of the
    memory where experts are few.

    Args:
        num_rows: an integer, or a tensor where it is not known at compile time.
        num_experts: an integer.
    """
    mean = num_rows // max(num_experts, 8) if isinstance(num_rows, int) else 256
    smallest = 2 ** min(max((mean // 8).bit_length() - 1, 2), 5)
    largest = max(-(-min(mean, 512) // smallest), 8) * smallest
    return smallest, 3 * largest // 4 // smallest * smallest, largest


@functools.lru_cache
def cheapest_covers(sizes, overhead):
    """How many tiles of each size cover a number of rows at the least cost.

    Args:
        sizes: tuple of the sizes of tiles, smallest first.
        overhead: fixed cost of a tile, expressed in rows.

    Returns:
        (number of sizes, 3 * largest size) int32: how many tiles of each size for 0 rows, for 1 row
        and so on.
    """
    costs: list = [0]
    covers: list = [np.zeros(len(sizes), "int32")]
    for rows in range(1, 3 * sizes[-1]):
        cost, last = min(
            (costs[max(rows - size, 0)] + size + overhead, number)
            for number, size in enumerate(sizes)
        )
        cover = covers[max(rows - sizes[last], 0)].copy()
        cover[last] += 1
        costs.append(cost)
        covers.append(cover)
    return np.stack(covers, axis=1)
