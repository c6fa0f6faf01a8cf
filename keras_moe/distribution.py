"""Experts on many devices: expert parallelism for `keras.distribution`."""

import keras

from keras_moe._internal.bank_weights import BIASES, KERNELS
from keras_moe._internal.validation import check_positive_integer, shortened
from keras_moe.backend import backend

AXES = ("data", "expert")


def expert_parallel(experts=None, data=None, devices=None, layout_map=None, process_group=None):
    """A distribution that splits tokens over all devices, and experts over some of them.

    On JAX the devices form a grid of `data` by `experts`. Each holds the kernels of every bank for
    E / `experts` of its E experts, and its share of each batch. Tokens are sent to the devices of
    their experts, within a row of the grid, and back: see the guide to many devices.

    Set it before the model is made: `keras.distribution.set_distribution(...)`. `fit`, `evaluate`,
    `predict`, `save` and loading work as on one device, and give the same numbers. The size of a
    batch must be a multiple of `data * experts`.

    On PyTorch the processes of `torch.distributed` take the place of devices, and each runs a
    training loop of yours: see the guide to replicas.

    Args:
        experts: devices that share the experts of a bank. It divides the number of experts of each.
            On PyTorch None stands for all processes.
        data: how many such groups there are. None: as many as the devices allow.
        devices: list of devices, as `keras.distribution.list_devices()` names them. None: all.
        layout_map: `keras.distribution.LayoutMap` for other weights, whose device mesh begins with
            the axes "data" and "expert"; `experts`, `data` and `devices` are those of the mesh
            then. It gains the layouts of the banks. None: all other weights are whole on every
            device.
        process_group: on PyTorch, the group of the processes that share the experts with this one,
            which tokens on their way to experts use. Each process gives one, all of one size. None
            makes new ones, of neighbours. `devices` and `layout_map` are for JAX alone.

    Returns:
        On JAX an `ExpertParallel`, which is a `keras.distribution.ModelParallel`. On PyTorch an
        object with a method `data_parallel(model)`, for `DistributedDataParallel` of all but the
        experts. Both go to `keras.distribution.set_distribution`.

    Raises:
        ValueError: If numbers and devices do not fit, the axes of the mesh are others, there are
            no processes on PyTorch, an argument is for the other backend, or on TensorFlow.

    Example:

    >>> if keras.backend.backend() == "jax":
    ...     devices = keras.distribution.list_devices()
    ...     distribution = keras_moe.distribution.expert_parallel(experts=len(devices))
    ...     keras.distribution.set_distribution(distribution)
    ...     keras.distribution.set_distribution(None)  # one device again

    Reference: Lepikhin et al. 2020, GShard (arXiv:2006.16668), section 3.
    """
    name = keras.backend.backend()
    if name == "tensorflow":
        raise ValueError(
            "`expert_parallel` needs JAX or PyTorch, as Keras splits no weights on TensorFlow. "
            "Received: keras.backend.backend()='tensorflow'. Set KERAS_BACKEND=jax, or train all "
            "experts on each device under `tf.distribute.MirroredStrategy`."
        )
    if name == "torch":
        _check_unused(name, devices=devices, layout_map=layout_map)
        for argument, value in {"experts": experts, "data": data}.items():
            if value is not None:
                check_positive_integer(argument, value)
        return backend.split_experts(experts, data, process_group)
    _check_unused(name, process_group=process_group)
    if layout_map is None:
        layout_map = keras.distribution.LayoutMap(_mesh(experts, data, devices))
    else:
        _check_layout_map(layout_map, experts, data, devices)
        given, layout_map = layout_map, keras.distribution.LayoutMap(layout_map.device_mesh)
        for path in given:
            layout_map[path] = given[path]
    for path, axes in ((KERNELS, ("expert", None, None)), (BIASES, ("expert", None))):
        if path not in list(layout_map):  # `in` alone is always true
            layout_map[path] = axes
    return ExpertParallel(layout_map)


class ExpertParallel(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` that splits a batch over two axes, "data" and "expert".

    Made by `expert_parallel`.

    Args:
        layout_map: `keras.distribution.LayoutMap` whose device mesh begins with these axes.
    """

    token_axes = AXES

    def __init__(self, layout_map):
        _check_layout_map(layout_map)
        super().__init__(layout_map=layout_map, batch_dim_name="data")
        mesh = layout_map.device_mesh
        # A layout of Keras names one axis for the batch: this mesh has both as one.
        self._data_mesh = keras.distribution.DeviceMesh(
            (mesh.shape[0] * mesh.shape[1], *mesh.shape[2:]),
            ("batch", *mesh.axis_names[2:]),
            mesh.devices,
        )

    @property
    def num_model_replicas(self):
        """Parts of a batch. Between processes each has its own part."""
        return self.device_mesh.shape[0] * self.device_mesh.shape[1]

    def get_data_layout(self, data_shape):
        axes = ("batch", *[None] * (len(data_shape) - 1))
        return keras.distribution.TensorLayout(axes, self._data_mesh)

    def get_variable_layout(self, variable):
        layout = super().get_variable_layout(variable)
        num_shards = self.device_mesh.shape[1]
        if layout.axes[:1] == ("expert",) and variable.shape[0] % num_shards:
            raise ValueError(
                "The expert axis of the mesh must divide the number of experts of a bank. "
                f"Received: {variable.path!r} of shape {tuple(variable.shape)}, and an axis "
                f"'expert' of {num_shards} devices. Change the number of experts, or that of "
                "devices: `expert_parallel(experts=...)`."
            )
        return layout


def _check_unused(name, **arguments):
    given = [argument for argument, value in arguments.items() if value is not None]
    if given:
        unused = " or ".join(f"`{argument}`" for argument in arguments)
        raise ValueError(
            f"On {name} `expert_parallel` takes no {unused}. "
            f"Received: {', '.join(f'{each}={arguments[each]!r}' for each in given)}. Leave it out."
        )


def _mesh(experts, data, devices):
    check_positive_integer("experts", experts)
    known = keras.distribution.list_devices()
    devices = known if devices is None else devices
    is_list = isinstance(devices, (list, tuple)) and len(devices)
    if not is_list or not all(device in known for device in devices):
        raise ValueError(
            "`devices` must be a list of some of `keras.distribution.list_devices()`. Received: "
            f"devices={shortened(devices)}. There are {known}."
        )
    if data is None:
        if len(devices) % experts:
            raise ValueError(
                "`experts` must divide the number of devices. Received: "
                f"experts={experts}, {len(devices)} devices. Pass a divisor, or `data` to leave "
                "devices out."
            )
        data = len(devices) // experts
    check_positive_integer("data", data)
    if data * experts > len(devices):
        raise ValueError(
            "There must be `data * experts` devices. Received: "
            f"data={data}, experts={experts}, {len(devices)} devices. Lower one of them, or pass "
            "more `devices`."
        )
    return keras.distribution.DeviceMesh((data, experts), AXES, devices[: data * experts])


def _check_layout_map(layout_map, experts=None, data=None, devices=None):
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        raise TypeError(
            "`layout_map` must be a `keras.distribution.LayoutMap`. Received: "
            f"layout_map={shortened(layout_map)} (of type {type(layout_map).__name__}). Make one "
            "of a `keras.distribution.DeviceMesh` with the axes 'data' and 'expert'."
        )
    mesh = layout_map.device_mesh
    if mesh is None or tuple(mesh.axis_names[:2]) != AXES:
        names = None if mesh is None else tuple(mesh.axis_names)
        raise ValueError(
            "The device mesh of `layout_map` must begin with the axes 'data' and 'expert'. "
            f"Received: axis_names={names}. Make it of, for example, "
            "`keras.distribution.DeviceMesh((2, 4), ('data', 'expert'))`."
        )
    given = (experts, data, devices)
    if given != (None, None, None) and given != (mesh.shape[1], mesh.shape[0], None):
        raise ValueError(
            "With a `layout_map` its device mesh sets the number of devices. Received: "
            f"experts={experts!r}, data={data!r}, devices={shortened(devices)} with a mesh of the "
            f"shape {tuple(mesh.shape)}. Leave them out."
        )


__all__ = ["ExpertParallel", "expert_parallel"]


def __dir__():
    return __all__
