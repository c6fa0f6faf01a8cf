"""Tokens and experts on a mesh of devices.

Tokens are split over some axes of the mesh, the data axes. Kernels are whole on every device, or
their experts are split over one axis, the expert axis. Between the plan and the combined outputs
the layer runs once for each device, on the tokens and the experts it has:

1. Where the expert axis splits tokens as well, the devices along it gather each other's tokens.
2. Each device sorts the assignments of its own experts, and runs them: its loops and kernels skip
   rows that it does not have.
3. The devices along the expert axis sum their outputs, and each keeps those of its own tokens.

Where K is small enough that less is sent, each token goes to the devices of its experts only, and
its outputs come back: `all_to_all`.

The backward pass is the same in reverse: gradients of outputs are gathered, those of tokens summed
and scattered, those of kernels summed over the data axes. No kernel is sent anywhere.

Axes: T tokens of all devices, E experts, K experts per token.
"""

import math
from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import backend
from keras_moe.ops.all_to_all import run_by_all_to_all
from keras_moe.ops.assignments import Assignments
from keras_moe.ops.grouped import run_grouped
from keras_moe.ops.passes import Lengths, run_in_passes
from keras_moe.ops.platforms import platform


def splits_evenly(shards, assignments, sequence_length):
    """Whether no sequence, if there are any, has tokens on two devices."""
    num_tokens = ops.shape(assignments.experts)[0]
    return sequence_length is None or num_tokens % (shards.number * sequence_length) == 0


def admit_by_shard(shards, admit, assignments, first):
    """`admit(assignments, first)` of each device's own tokens; `first` is (T,) or None."""
    num_experts = assignments.num_experts

    def on_device(experts, first):
        return tuple(admit(Assignments.of(experts, num_experts), first))

    num_tokens = ops.shape(assignments.experts)[0]
    experts = _pad(assignments.experts, shards, -1)
    first = None if first is None else _pad(first, shards, 0)
    experts, sizes = shards.on_each_device(on_device, (experts, first), (shards.axes, shards.axes))
    sizes = ops.sum(ops.reshape(sizes, (-1, num_experts)), axis=0)
    return Assignments(experts[:num_tokens], sizes)


def _pad(tensor, shards, value):
    """The tensor (T, ...), padded so that all devices have as many tokens."""
    missing = -ops.shape(tensor)[0] % shards.number
    if not missing:
        return tensor
    widths = ((0, missing), *[(0, 0)] * (len(tensor.shape) - 1))
    return ops.pad(tensor, widths, constant_values=value)


class Exchange(NamedTuple):
    """Setting of an exchange, the same for every batch; hashable.

    - `step`: a `Step`.
    - `shards`: the `backend.token_shards()`.
    - `expert_axis`: the mesh axis that splits the first axis of the kernels, or None.
    - `platform`: that of the devices: "cpu", "gpu" or "tpu".
    """

    step: Any
    shards: Any
    expert_axis: Any
    platform: Any


@backend.compile_once
def run_sharded(exchange, tokens, weights, parameters, assignments):
    """`run_grouped` for `Assignments` or `Choices` of tokens that are spread over a mesh."""
    step, shards, expert_axis, platform_of_devices = exchange
    kind = type(assignments)
    tokens_cross = expert_axis in shards.axes

    def on_device(tokens, weights, parts, parameters):
        lengths = Lengths.of_mean_share(math.prod(ops.shape(weights)))
        if kind is Assignments and tokens_cross and _less_to_send(weights, shards, expert_axis):
            (experts,) = parts
            return run_by_all_to_all(
                step, tokens, weights, parameters, experts, shards, expert_axis, lengths
            )
        if tokens_cross:
            tokens, weights, *parts = (
                shards.gather(each, expert_axis) for each in (tokens, weights, *parts)
            )
        num_experts = parameters.num_experts
        place = 0 if expert_axis is None else shards.place_on(expert_axis)
        groups, weights = kind.sort_part(parts, weights, place * num_experts, num_experts)
        if expert_axis is None:
            return run_grouped(step, tokens, weights, parameters, groups)
        outputs = run_in_passes(step, tokens, weights, parameters, groups, lengths)
        add = shards.sum_and_scatter if tokens_cross else shards.sum_over
        return add(outputs, expert_axis)

    with platform(platform_of_devices):
        outputs = shards.on_each_device(
            on_device,
            (
                _pad(tokens, shards, 0),
                _pad(weights, shards, 0),
                tuple(_pad(each, shards, -1) for each in assignments.parts),
                parameters,
            ),
            (*[shards.axes] * 3, expert_axis),
        )
    return outputs[: ops.shape(tokens)[0]]


def _less_to_send(weights, shards, axis):
    """Whether K rows of each token are fewer values than the tokens of all devices of the axis."""
    rows = Lengths.of_mean_share(math.prod(ops.shape(weights))).first
    return rows < shards.along(axis) * ops.shape(weights)[0]
