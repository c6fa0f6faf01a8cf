"""How weights of other packages correspond to ours."""

from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """One weight of theirs, and the one or two of ours that it holds.

    - `theirs`: its name. With `{expert}` in it there is one for each expert.
    - `ours`: names of our weights. Two of them share its last axis, which here is that of the
      outputs.
    - `transposed`: whether its last two axes are (outputs, inputs).
    - `interleaved`: whether two of ours take turns in the last axis; else they are its halves.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    def split(self, theirs):
        """Our weights, from an array or tensor of theirs whose outputs are last."""
        if len(self.ours) == 1:
            return [theirs]
        if self.interleaved:
            return [theirs[..., ::2], theirs[..., 1::2]]
        half = theirs.shape[-1] // 2
        return [theirs[..., :half], theirs[..., half:]]

    def join(self, ours):
        """Their weight, from arrays of ours."""
        if len(ours) == 1:
            return ours[0]
        if not self.interleaved:
            return np.concatenate(ours, axis=-1)
        *leading, width = ours[0].shape
        return np.stack(ours, axis=-1).reshape(*leading, 2 * width)
