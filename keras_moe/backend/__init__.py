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
- `expert_processes()`: the processes that share experts, None where each process has all.
- `num_replicas()`: how many data-parallel replicas run this code, an integer.
- `sum_over_replicas(values)`: the sum of what all data-parallel replicas have.
- `gather_over_replicas(values)`: the rows that all data-parallel replicas have.
- `sum_of_counts(values)`: a list of what is added to counters, summed unless reading them sums.
- `separate_losses(layer)`: gives each replica its own list of the losses a layer adds.
- `unstack_sizes(sizes)`: the entries of a vector as bounds of slices, where shapes are dynamic.
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

# Experts in several processes, each with some of them.
_processes: Any = None
if keras.backend.backend() == "torch":
    _processes = importlib.import_module("keras_moe.backend.torch_experts")

_module = importlib.import_module(f"keras_moe.backend.{keras.backend.backend()}")

block_dtype: Any = getattr(_module, "block_dtype", None)
compile_once = _module.compile_once
compiles_static_shapes = _module.compiles_static_shapes
differentiable = _module.differentiable
expert_processes: Any = getattr(_processes, "expert_processes", lambda: None)
gather_over_replicas: Any = getattr(_module, "gather_over_replicas", lambda values: values)
gather_rows = _module.gather_rows
multiply_groups: Any = getattr(_module, "multiply_groups", None)
num_replicas: Any = getattr(_module, "num_replicas", lambda: 1)
separate_losses: Any = getattr(_module, "separate_losses", lambda layer: None)
slice_at: Any = getattr(_module, "slice_at", None)
sort: Any = getattr(_module, "sort", None)
scan: Any = getattr(_module, "scan", None)
stack_gradients: Any = getattr(_module, "stack_gradients", None)
sum_of_counts: Any = getattr(_module, "sum_of_counts", lambda values: values)
sum_over_replicas = _module.sum_over_replicas
unstack_sizes: Any = getattr(_module, "unstack_sizes", None)
vjp = _module.vjp
