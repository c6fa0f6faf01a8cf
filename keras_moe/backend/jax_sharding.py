"""JAX primitives for arrays that are spread over a mesh of devices."""

import math
from typing import Any, NamedTuple

import jax
import keras
from jax.sharding import PartitionSpec


class Shards(NamedTuple):
    """How the tokens of a batch are spread: over these axes of a mesh, in this order.

    Hashable, so that what is compiled for one mesh serves again.
    """

    mesh: Any
    axes: tuple

    @property
    def number(self):
        """Into how many parts the batch is split."""
        return math.prod(map(self.along, self.axes))

    @property
    def platform(self):
        """That of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def along(self, axis):
        """How many devices there are along an axis."""
        return self.mesh.shape[axis]


def token_shards():
    """The `Shards` of the distribution that is set in Keras; None for one device, or none set."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.devices.size == 1:
        return None
    axes = getattr(distribution, "token_axes", (distribution.batch_dim_name,))
    return Shards(distribution.device_mesh.backend_mesh, tuple(axes))


def mesh_axis(variable):
    """The mesh axis that a variable's first axis is split over, or None.

    Raises:
        ValueError: If the variable was made before the distribution was set, or under another.
    """
    distribution = keras.distribution.distribution()
    layout = getattr(variable, "_layout", None)
    made = "before" if layout is None else "under another one"
    if layout is None or layout.device_mesh.backend_mesh != distribution.device_mesh.backend_mesh:
        raise ValueError(
            "The distribution must be set before a layer is built: it decides where weights are. "
            f"Received: {variable.path!r}, made {made}. Call "
            "`keras.distribution.set_distribution(...)` first, then make the model or load it."
        )
    return layout.axes[0]


def on_each_device(shards, function, arguments, axes):
    """`function(*arguments)` of each device's part of the arguments, and the outputs as one.

    Args:
        shards: a `Shards`.
        function: from the parts of one device to tensors whose first axis is split as tokens are.
        arguments: trees of tensors.
        axes: for each argument the mesh axes that its first axis is split over; None where every
            device has all of it.
    """
    mapped = jax.shard_map(
        function,
        mesh=shards.mesh,
        in_specs=tuple(map(PartitionSpec, axes)),
        out_specs=PartitionSpec(shards.axes),
        # Loops begin with zeros, which are the same everywhere, and go on with what is not.
        check_vma=False,
    )
    return mapped(*arguments)


def gather_shards(tensor, axis):
    """The parts of all devices along a mesh axis, one behind another on the first axis."""
    return jax.lax.all_gather(tensor, axis, tiled=True)


def sum_and_scatter(tensor, axis):
    """The sum over a mesh axis, of which each device keeps its own part of the first axis."""
    return jax.lax.psum_scatter(tensor, axis, tiled=True)


def sum_over_axis(tensor, axis):
    """The sum over a mesh axis."""
    return jax.lax.psum(tensor, axis)


def place_on_axis(axis):
    """Which of the devices along a mesh axis this is, from 0."""
    return jax.lax.axis_index(axis)


def exchange(tensor, axis):
    """Part i of the first axis goes to device i along a mesh axis, and each device's part comes."""
    return jax.lax.all_to_all(tensor, axis, split_axis=0, concat_axis=0, tiled=True)


def max_over_axis(tensor, axis):
    """The largest over a mesh axis."""
    return jax.lax.pmax(tensor, axis)
