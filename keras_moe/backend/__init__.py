"""The only place where framework code may stand.

Everything else in the package is written with `keras.ops`. A backend module provides:

- `compiles_static_shapes()`: whether the code being traced needs every shape fixed.
- `compile_once(function)`: a function that need not be compiled at each call.
- `differentiable(forward, backward, inputs, context)`: a function with its own gradient.
- `vjp(function, inputs)`: value and pullback of a plain function, usable inside loops.
- `gather_rows(tensor, indices)`: rows of a tensor by (possibly multi-dimensional) index.
- `block_dtype(dtype)`: what blocks of rows are computed in, where shapes are static.
- `slice_at(tensor, start, shape)`: a part of a tensor, where shapes are static.
- `sort(integers)`: a vector of integers in ascending order, where shapes are static.
- `scan(step, carry, xs)`: a loop that can be differentiated, where shapes are static.
- `multiply_groups(rows, sizes, experts, kernel, bias, transposed)`: affine maps, where shapes are
  dynamic.
- `stack_gradients(runs, kernels, biases)`: the gradients of those, where shapes are dynamic.
- `sum_over_replicas(values)`: the sum of what all data-parallel replicas have.
- `unstack_sizes(sizes)`: the entries of a vector as bounds of slices, where shapes are dynamic.

And where arrays may be spread over a mesh of devices (`keras.distribution` on JAX), in a module of
their own:

- `token_shards()`: how the tokens of a batch are spread, None where they are not. The others are
  called only where they are.
- `mesh_axis(variable)`: the mesh axis that the first axis of a variable is split over.
- `on_each_device(shards, function, arguments, axes)`: a function of each device's parts.
- `gather_shards`, `sum_and_scatter`, `sum_over_axis`, `max_over_axis`, `exchange`: what devices
  along a mesh axis tell each other inside such a function; and `place_on_axis`.
"""

import importlib
from typing import Any

import keras

_SUPPORTED = ("tensorflow", "jax", "torch")

if keras.backend.backend() not in _SUPPORTED:
    raise ImportError(
        f"keras_moe runs on the Keras backends {', '.join(_SUPPORTED)}. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. "
        "Set KERAS_BACKEND to one of them before keras is imported."
    )

_module = importlib.import_module(f"keras_moe.backend.{keras.backend.backend()}")
_sharding: Any = None
if keras.backend.backend() == "jax":
    _sharding = importlib.import_module("keras_moe.backend.jax_sharding")

block_dtype: Any = getattr(_module, "block_dtype", None)
compile_once = _module.compile_once
compiles_static_shapes = _module.compiles_static_shapes
differentiable = _module.differentiable
gather_rows = _module.gather_rows
multiply_groups: Any = getattr(_module, "multiply_groups", None)
slice_at: Any = getattr(_module, "slice_at", None)
sort: Any = getattr(_module, "sort", None)
scan: Any = getattr(_module, "scan", None)
stack_gradients: Any = getattr(_module, "stack_gradients", None)
sum_over_replicas = _module.sum_over_replicas
unstack_sizes: Any = getattr(_module, "unstack_sizes", None)
vjp = _module.vjp

gather_shards: Any = getattr(_sharding, "gather_shards", None)
mesh_axis: Any = getattr(_sharding, "mesh_axis", None)
on_each_device: Any = getattr(_sharding, "on_each_device", None)
place_on_axis: Any = getattr(_sharding, "place_on_axis", None)
sum_and_scatter: Any = getattr(_sharding, "sum_and_scatter", None)
sum_over_axis: Any = getattr(_sharding, "sum_over_axis", None)
exchange: Any = getattr(_sharding, "exchange", None)
max_over_axis: Any = getattr(_sharding, "max_over_axis", None)
token_shards: Any = getattr(_sharding, "token_shards", lambda: None)
