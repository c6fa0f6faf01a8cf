"""Counters of a gate, which only grow, and their readings.

Axes: E experts, V values: the router losses, the entropy, and what is added to the loss of the
model.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe._internal.checks import shortened
from keras_moe.backend import backend
from keras_moe.ops.sorting import as_dtype


class Counts(NamedTuple):
    """A reading of the counters of a gate, or the difference of two: NumPy arrays.

    - `assignments` (E,): assignments of each expert.
    - `dropped`: number of assignments that found no slot.
    - `totals` (V,) and `numbers` (V,): sums of the finite values, and how many they were: calls of
      the layer, and passes of the model for what is added to its loss.
    """

    assignments: Any
    dropped: Any
    totals: Any
    numbers: Any

    @property
    def means(self):
        """Mean of each value (V,); NaN if none was finite, 0 if nothing was counted."""
        without = np.nan if np.any(self.assignments) else 0.0
        return np.where(self.numbers > 0, self.totals / np.maximum(self.numbers, 1), without)

    def since(self, earlier: "Counts") -> "Counts":
        """Counts after an earlier reading; all of them, if earlier weights were loaded since."""
        shapes = [*map(np.shape, self)]
        if not isinstance(earlier, Counts) or [*map(np.shape, earlier)] != shapes:
            rule = "`earlier` must be a reading of the same layer"
            raise ValueError(f"{rule}. Received: earlier={shortened(earlier)}")
        difference = Counts(*(_difference(*each) for each in zip(self, earlier)))
        is_older = min(np.min(difference.assignments), np.min(difference.numbers)) < 0
        return self if is_older else difference


def _difference(now, earlier):
    if now.dtype != "int64":
        return now - earlier
    # Counters are 32 bits wide, and may have passed their end in between.
    return (now - earlier + 2**31) % 2**32 - 2**31


def read_counters(counters) -> Counts:
    """Return a reading of counters: of assignments, dropped ones, totals and numbers of values."""
    assignments, dropped, (total, error), numbers = (
        array.view("uint32").astype("int64") if array.dtype == "int32" else array
        for array in map(ops.convert_to_numpy, counters)
    )
    return Counts(assignments, dropped, total.astype("float64") - error, numbers)


def add_counts(counters, counts, values, numbers, dropped=None):
    """Add to counters what a call has counted; `dropped` only if there is a capacity."""
    expert_counts, dropped_count, totals, value_numbers = counters
    expert_counts.assign_add(counts)
    if dropped is not None:
        dropped_count.assign_add(dropped)
    value_numbers.assign_add(numbers)
    totals.assign(_larger(ops.convert_to_tensor(totals), values))


def counter(name, shape, dtype="int32"):
    """A variable that is added to."""
    # Under `tf.distribute` each replica counts alone, and reading gives the sum, which
    # `add_weight` cannot express.
    return keras.Variable(
        "zeros",
        shape=shape,
        dtype=dtype,
        trainable=False,
        autocast=False,
        aggregation="sum",
        synchronization="on_read",
        name=name,
    )


@backend.jit_when_eager
def finite_values(values, added, is_first):
    """Values and the sum of what is added (V,), 0 where one is not finite, and what they count."""
    total = sum((as_dtype(each, "float32") for each in added), ops.zeros((), "float32"))
    # The calls of the layer in a pass of the model add to one loss.
    counted = [1] * len(values) + [int(is_first)]
    values = ops.stack([*values, total])
    is_finite = ops.isfinite(values)
    counted = ops.where(is_finite, ops.array(counted, "int32"), 0)
    return ops.where(is_finite, values, 0.0), counted


@backend.jit_when_eager
def _larger(totals, values):
    """Totals and their errors (2, V) with values (V,) added."""
    # Kahan's summation: the total may become too large for what a step adds.
    total, error = totals[0], totals[1]
    corrected = values - error
    larger = total + corrected
    return ops.stack([larger, larger - total - corrected])
