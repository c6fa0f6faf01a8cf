"""Arrays that are sharded over a mesh of devices, on JAX."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec

from keras_moe.backend import jax_mesh
from keras_moe.backend.base import Devices, is_any_derivative, named_platform


@dataclasses.dataclass(frozen=True)
class Shards:
    """Mesh axes over which tokens are sharded, and experts, or None; hashable, for `jax.jit`."""

    mesh: Any
    axes: tuple
    expert_axis: Any = None

    @property
    def number(self):
        """Number of shards of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def platform(self):
        """Platform of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def of_bank(self, bank):
        """Return the shards with the axis that shards the experts of a bank."""
        # All stacks of a bank have the same. No public name has it: a traced value has no sharding,
        # and the variable may have been made under another distribution.
        variable = bank.projections[0].kernel
        layout = getattr(variable, "_layout", None)
        if layout is None or layout.device_mesh.backend_mesh != self.mesh:
            rule = "The distribution must be set before a layer is built or loaded"
            made = "before" if layout is None else "under another distribution"
            raise ValueError(f"{rule}. Received: {variable.path!r}, made {made}")
        return dataclasses.replace(self, expert_axis=layout.axes[0])

    def run(self, run, network, problem):
        """See `Devices.sharing`."""
        platform = named_platform() or self.platform
        return jax_mesh.run(run, network, platform, self, is_any_derivative(), problem)

    def on_each_device(self, function, arguments, axes):
        """Call `function(*arguments)` on each device's shards; concatenate the results as tokens.

        `axes` has for each argument, a tree of tensors, the mesh axes that shard its first axis, or
        None if every device has all of it.
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

    def pad(self, tensor, value=0):
        """Pad a tensor (T, ...), or None, so that all devices have as many tokens."""
        missing = 0 if tensor is None else -tensor.shape[0] % self.number
        if not missing:
            return tensor
        widths = [(0, missing), *[(0, 0)] * (tensor.ndim - 1)]
        return jnp.pad(tensor, widths, constant_values=value)


class JaxDevices(Devices):
    def token_shards(self):
        distribution = keras.distribution.distribution()
        if distribution is None or distribution.device_mesh.devices.size == 1:
            return None
        axes = getattr(distribution, "token_axes", (distribution.batch_dim_name,))
        return Shards(distribution.device_mesh.backend_mesh, tuple(axes))

    def sharing(self, bank):
        shards = self.token_shards()
        return None if shards is None else shards.of_bank(bank)
