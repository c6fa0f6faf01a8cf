"""Counters of a gate, which only grow, and their readings.

Axes: E experts; V values: one for each router loss, then the entropy, then the sum of the weighted
losses.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe._internal.checks import shortened
from keras_moe.backend import backend
from keras_moe.ops.sorting import as_dtype


class Counters(NamedTuple):
    """Variables that count calls of a gate."""

    assignments: Any  # (E,) int32, or float32 for sums of weights
    dropped: Any  # () int32
    totals: Any  # (2, 2, V) float32: sums of finite values and how many, and errors by rounding

    @classmethod
    def create(cls, prefix: str, num_experts: int, num_losses: int, dtype: str) -> "Counters":
        """Return counters whose names begin with a prefix, of assignments in a dtype."""
        num_values = num_losses + 2
        return cls(
            _counter(f"{prefix}expert_counts", (num_experts,), dtype),
            _counter(f"{prefix}dropped_count", ()),
            _counter(f"{prefix}value_totals", (2, 2, num_values), "float32"),
        )

    def add(self, routing, num_dropped, losses, added, training):
        """Count a call: its routing, router losses, and what it has `added` to the model's loss.

        `num_dropped` () int32 is None without a capacity.
        """
        counted = [routing.counts, _finite_values([*losses, routing.entropy()], added)]
        if num_dropped is not None:
            counted.append(num_dropped)
        if training:  # A process may evaluate alone, and would wait for the others.
            counted = backend.devices.sum_counts(counted)
        counts, values, *dropped = counted
        self.assignments.assign_add(counts)
        for number in dropped:
            self.dropped.assign_add(number)
        self.totals.assign(_add_to_totals(ops.convert_to_tensor(self.totals), values))

    def read(self) -> "Counts":
        """Return what has been counted so far."""
        assignments, dropped, (total, error) = (
            array.view("uint32").astype("int64") if array.dtype == "int32" else array
            for array in map(ops.convert_to_numpy, self)
        )
        return Counts(assignments, dropped, *(total.astype("float64") - error))


class Counts(NamedTuple):
    """A reading of the counters of a gate, or the difference of two: NumPy arrays."""

    assignments: Any  # (E,) of each expert
    dropped: Any  # () assignments that found no slot
    totals: Any  # (V,) sums of the finite values of calls
    numbers: Any  # (V,)

    @property
    def means(self) -> "Means":
        """Mean of each value; NaN if none was finite, 0 if nothing was counted."""
        without = np.nan if np.any(self.assignments) else 0.0
        means = np.where(self.numbers > 0, self.totals / np.maximum(self.numbers, 1), without)
        return Means(means[:-2], *means[-2:])

    def since(self, earlier: "Counts") -> "Counts":
        """Counts after an earlier reading; all of them, if earlier weights were loaded since."""
        shapes = [*map(np.shape, self)]
        if not isinstance(earlier, Counts) or [*map(np.shape, earlier)] != shapes:
            rule = "`earlier` must be a reading of the same layer"
            raise ValueError(f"{rule}. Received: earlier={shortened(earlier)}")
        difference = Counts(*(_difference(*each) for each in zip(self, earlier)))
        is_older = min(np.min(difference.assignments), np.min(difference.numbers)) < 0
        return self if is_older else difference


class Means(NamedTuple):
    """Means of router losses before their weights, the entropy, and the loss added in a call."""

    losses: np.ndarray
    entropy: float
    added: float


def _difference(now, earlier):
    difference = now - earlier
    # Integer counters are 32 bits wide. One that is smaller by half of that has passed its end.
    return np.where(difference < -(2**31), difference + 2**32, difference)


def _counter(name, shape, dtype="int32"):
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
def _finite_values(values, added):
    """Append the sum of `added`. Return values, 0 for those not finite, and 1 for finite ones."""
    first, *others = [as_dtype(each, "float32") for each in added] or [ops.zeros(())]
    values = ops.stop_gradient(ops.stack([*values, sum(others, first)]))
    finite = ops.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return ops.stack([finite, ops.cast(values == finite, "float32")])


@backend.jit_when_eager
def _add_to_totals(totals, values):
    """Totals and their errors (2, ...) with values (...) added."""
    # Kahan's summation: the total may become too large for what a step adds.
    total, error = totals[0], totals[1]
    corrected = values - error
    larger = total + corrected
    return ops.stack([larger, larger - total - corrected])
