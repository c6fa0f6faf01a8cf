"""Arrays that are spread over a mesh of devices, on JAX."""

import math
from typing import Any, NamedTuple

import jax
import keras
from jax.sharding import PartitionSpec

from keras_moe.backend.devices import Devices


class Shards(NamedTuple):
    """The axes of a mesh that tokens are spread over, in this order.

    Hashable, so that what is compiled for one mesh serves again. The methods from `gather` on are
    for functions that run `on_each_device`, along one axis of the mesh.
    """

    mesh: Any
    axes: tuple

    @property
    def number(self):
        """How many parts the batch is split into."""
        return math.prod(map(self.along, self.axes))

    @property
    def platform(self):
        """The platform of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def along(self, axis):
        """How many devices there are along an axis."""
        return self.mesh.shape[axis]

    def axis_of(self, variable):
        """The axis that the first axis of a variable is split over, or None."""
        layout = getattr(variable, "_layout", None)
        if layout is None or layout.device_mesh.backend_mesh != self.mesh:
            raise ValueError(
                "The distribution must be set before a layer is built: it decides where weights "
                f"are. Received: {variable.path!r}, made "
                f"{'before' if layout is None else 'under another one'}. Call "
                "`keras.distribution.set_distribution(...)` first, then make the model or load it."
            )
        return layout.axes[0]

    def on_each_device(self, function, arguments, axes):
        """`function(*arguments)` of each device's parts of the arguments, as one output.

        Args:
            function: from the parts of one device to tensors whose first axis is split as the
                tokens' is.
            arguments: trees of tensors.
            axes: for each argument the mesh axes that its first axis is split over; None where
                every device has all of it.
        """
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(map(PartitionSpec, axes)),
            out_specs=PartitionSpec(self.axes),
            # Loops begin with zeros, which are the same everywhere, and continue with what is not.
            check_vma=False,
        )
        return mapped(*arguments)

    def gather(self, tensor, axis):
        """The parts of all devices, one after another on the first axis."""
        return jax.lax.all_gather(tensor, axis, tiled=True)

    def sum_and_scatter(self, tensor, axis):
        """The sum over devices, of which each keeps its own part of the first axis."""
        return jax.lax.psum_scatter(tensor, axis, tiled=True)

    def sum_over(self, tensor, axis):
        """The sum over devices."""
        return jax.lax.psum(tensor, axis)

    def max_over(self, tensor, axis):
        """The largest over devices."""
        return jax.lax.pmax(tensor, axis)

    def place_on(self, axis):
        """The position of this device, from 0."""
        return jax.lax.axis_index(axis)

    def exchange(self, tensor, axis):
        """Part i of the first axis goes to device i; the result has a part from each device."""
        return jax.lax.all_to_all(tensor, axis, split_axis=0, concat_axis=0, tiled=True)


class JaxDevices(Devices):
    def token_shards(self):
        distribution = keras.distribution.distribution()
        if distribution is None or distribution.device_mesh.devices.size == 1:
            return None
        axes = getattr(distribution, "token_axes", (distribution.batch_dim_name,))
        return Shards(distribution.device_mesh.backend_mesh, tuple(axes))
