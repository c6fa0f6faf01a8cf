"""Experts on many devices: expert parallelism for `keras.distribution`."""

from typing import Any

import keras

from keras_moe._internal.checks import check_integer, shortened
from keras_moe.backend import backend

AXES = ("data", "expert")


def expert_parallel(
    experts: int | None = None,
    data: int | None = None,
    devices: list[str] | None = None,
    layout_map: keras.distribution.LayoutMap | None = None,
) -> Any:
    """A distribution that splits tokens over all devices, and experts over some of them.

    On JAX the devices form a grid of `data` by `experts`. Each holds E / `experts` of the E experts
    of every bank, and its share of each batch, whose size must be a multiple of `data * experts`.
    Tokens are sent to the devices of their experts, within a row of the grid, and back. On PyTorch,
    there are processes of `torch.distributed` in place of devices. Neighbours share experts, and
    each runs a custom training loop. Set the distribution before you build the model:
    `keras.distribution.set_distribution(...)`.

    Args:
        experts: Integer. Devices that share a bank, a divisor of its number of experts. None: all
            devices, divided by `data`.
        data: Integer. Number of such groups. None: as many as the devices allow.
        devices: On JAX, list of names of `keras.distribution.list_devices()`. None: all.
        layout_map: On JAX, `keras.distribution.LayoutMap` for other weights, else whole on every
            device. Its mesh begins with the axes "data" and "expert", whose sizes take the place
            of `data` and `experts`.

    Returns:
        On JAX an `ExpertParallel`, which is a `keras.distribution.ModelParallel`. On PyTorch an
        object with a method `data_parallel(model)`, for `DistributedDataParallel` of all but the
        experts.

    Raises:
        ValueError: If arguments do not fit the devices or the backend, or on TensorFlow.

    Example:

    >>> if keras.backend.backend() == "jax":
    ...     distribution = keras_moe.distribution.expert_parallel()

    Reference: Lepikhin et al. 2020, GShard (arXiv:2006.16668), section 3.
    """
    experts = experts if experts is None else check_integer("experts", experts)
    data = data if data is None else check_integer("data", data)
    if keras.backend.backend() == "torch" and (devices is not None or layout_map is not None):
        received = shortened((devices, layout_map))
        raise ValueError(f"`devices` and `layout_map` are for JAX. Received: {received} on PyTorch")
    processes = backend.devices.split_experts(experts, data)
    if processes is not None:
        return processes
    given = (experts, data, devices)
    mesh = _mesh(*given) if layout_map is None else layout_map.device_mesh
    if layout_map is not None and given not in [(None, None, None), (*mesh.shape[1::-1], None)]:
        rule = "With a `layout_map` its device mesh sets the number of devices"
        raise ValueError(f"{rule}. Received: {experts=}, {data=}, devices={shortened(devices)}")
    return ExpertParallel(layout_map or keras.distribution.LayoutMap(mesh))


class ExpertParallel(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` whose axes "data" and "expert" split a batch.

    Args:
        layout_map: `keras.distribution.LayoutMap` whose device mesh begins with these axes.
    """

    token_axes = AXES

    def __init__(self, layout_map: keras.distribution.LayoutMap):
        mesh = layout_map.device_mesh
        if tuple(mesh.axis_names[:2]) != AXES:
            rule = "The device mesh of `layout_map` must begin with the axes 'data' and 'expert'"
            raise ValueError(f"{rule}. Received: axis_names={tuple(mesh.axis_names)}")
        super().__init__(layout_map=layout_map, batch_dim_name="data")
        # Stacked weights by the ends of their paths: a variable is placed when it is made.
        self._stacked: set = set()
        # Keras splits a batch along one axis of a mesh: here the first two are one.
        sizes = (mesh.shape[0] * mesh.shape[1], *mesh.shape[2:])
        names = ("batch", *mesh.axis_names[2:])
        self._data_mesh = keras.distribution.DeviceMesh(sizes, names, mesh.devices)

    @property
    def num_model_replicas(self) -> int:
        """Parts of a batch. Between processes each has its own part."""
        return self.device_mesh.shape[0] * self.device_mesh.shape[1]

    def get_data_layout(self, data_shape):
        axes = ("batch", *[None] * (len(data_shape) - 1))
        return keras.distribution.TensorLayout(axes, self._data_mesh)

    def split_by_expert(self, bank: str, weight: str) -> None:
        """Split a weight (E, ...) of a bank, by their names, unless the layout map does."""
        self._stacked.add((bank, weight))

    def get_variable_layout(self, variable):
        layout = super().get_variable_layout(variable)
        if tuple(variable.path.split("/")[-2:]) in self._stacked and not any(layout.axes):
            axes = ("expert", *[None] * (len(variable.shape) - 1))
            layout = keras.distribution.TensorLayout(axes, self.device_mesh)
        num_shards = self.device_mesh.shape[1]
        is_split = layout.axes[:1] == ("expert",)
        if is_split and variable.shape[0] == 1:  # a base, see LowRankExperts
            whole = [None] * len(variable.shape)
            return keras.distribution.TensorLayout(whole, self.device_mesh)
        if is_split and variable.shape[0] % num_shards:
            rule = "The devices of `expert_parallel(experts=...)` must divide the experts of a bank"
            received = f"{variable.path!r} of shape {variable.shape} for {num_shards} devices"
            raise ValueError(f"{rule}. Received: {received}")
        return layout


def _mesh(experts, data, devices):
    devices = list(devices or keras.distribution.list_devices())
    takes_all = experts is None or data is None
    experts = experts or max(1, len(devices) // (data or 1))
    data = data or max(1, len(devices) // experts)
    if data * experts > len(devices) or (takes_all and data * experts < len(devices)):
        rule = "`data * experts` must be the number of devices; if both are given, at most that"
        raise ValueError(f"{rule}. Received: {data=}, {experts=}, {len(devices)} devices")
    return keras.distribution.DeviceMesh((data, experts), AXES, devices[: data * experts])


__all__ = ["ExpertParallel", "expert_parallel"]
__dir__ = __all__.copy
