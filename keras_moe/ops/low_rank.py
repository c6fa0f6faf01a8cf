"""Low-rank corrections: a network around a network.

Each linear map `x W + b` of the inner network becomes `x W + b + scale (x A) B` (Hu et al. 2021,
arXiv:2106.09685, section 4.1). `A` and `B` are linear maps `{name}_lora_a` and `{name}_lora_b`.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class LowRankNetwork:
    """The network of experts whose kernels have corrections of low rank."""

    network: Callable
    scale: float

    def __call__(self, rows, linear):
        return self.network(rows, CorrectedLinear(linear, linear, self.scale))


class CorrectedLinear:
    """The `linear` of the inner network: `base(name, rows)` plus the correction from `linear`."""

    def __init__(self, base, linear, scale):
        self._base, self._linear, self._scale = base, linear, scale
        self.dropout = linear.dropout

    def __call__(self, name, rows=None):
        if rows is None:  # A vector has no correction.
            return self._linear(name)
        low = self._linear(f"{name}_lora_a", rows) * self._scale
        return self._base(name, rows) + self._linear(f"{name}_lora_b", low)
