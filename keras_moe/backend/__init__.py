"""The only place where framework code may stand.

Everything else in the package is written with `keras.ops`. A backend module provides:

- `compiles_static_shapes()`: whether the code being traced needs every shape fixed.
- `argmax(scores)`: the place of the first of the largest.
- `take_columns(matrix, columns)`: entries of each row of a matrix.
- `count_integers(integers, number)`: how often each of the first integers is there.
- `compile_once(function)`: a function that need not be compiled at each call.
- `trace_once(function)`: a function that need not be traced at each call, inside a program.
- `as_one_program(function)`: a function whose operations are not compiled one by one.
- `current_platform()`: the platform this process computes on, "cpu", "gpu" or "tpu".
- `on_its_platform(function, *operands)`: a function, for the platform that is compiled for.
- `differentiable(forward, backward, inputs, context)`: a function with its own gradient.
- `vjp(function, inputs)`: value and pullback of a plain function, usable inside loops.
- `gather_rows(tensor, indices)`: rows of a tensor by (possibly multi-dimensional) index.
- `has_grouped_products(platform, dtype, widths)`: whether there are kernels for all rows at once.
- `sum_over_replicas(values)`: the sum of what all data-parallel replicas have.
- `after(tensor, value)`: a value that is computed only where the tensor is.
- `larger_size(least, size)`: the larger of two sizes that may not be known while tracing.
- `may_recompute()`: whether the present code may run again in the backward pass, unannounced.
- `is_recomputing()`: whether it does so now.
- `knows_shapes()`: whether a size that is an integer is a known one.

Each for some engines of `ops.grouped` only:

- `grouped_products`, `grouped_kernel_gradients`: kernels for all rows at once.
- `remakes_factors(platform)`: whether these gradients take a function for their left factor.
- `slice_at(tensor, start, shape)`: a part of a tensor, where shapes are static.
- `sort(integers)`: a vector of integers in ascending order.
- `is_exporting()`: whether what is traced has no gradients and changes no state.
- `lacks_stable_sort()`: whether equals are sorted in any order.
- `scan(step, carry, xs)`: a loop that can be differentiated, where shapes are static.
- `batched_product(left, right)`: float32 products of matrices, where shapes are static.
- `multiply_groups`, `stacked_gradients`: affine maps of slices, and their gradients, where shapes
  are dynamic.
- `loop_over_groups(function, sizes, buffers)`: rows group by group, in a loop over those that have
  some.
- `loops_over_groups()`: whether there is such a loop.
- `unstack_sizes(sizes, num_rows)`: sizes of groups one by one, where shapes are dynamic.
- `split_rows(rows, sizes)`: the rows of each group, of such sizes.
- `join_rows(parts)`: the way back.
- `knows_sizes()`: whether these are known integers.

And where several replicas or processes train one model; a backend without them has one:

- `expert_processes()`: the processes that share experts, None where each process has all.
- `split_experts(number, process_group)`: makes them.
- `num_replicas()`: how many data-parallel replicas run this code, an integer.
- `gather_over_replicas(values)`: the rows that all data-parallel replicas have.
- `sum_of_counts(values)`: a list of what is added to counters, summed unless reading them sums.
- `separate_losses(layer)`: gives each replica its own list of the losses a layer adds.

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
import os
from typing import Any

_SUPPORTED = ("tensorflow", "jax", "torch")


def _refused(received):
    # With its name, Python says it in one line where the package is run as a program.
    return ImportError(
        f"keras_moe runs on the Keras backends {', '.join(_SUPPORTED)}. Received: {received}. "
        "Set KERAS_BACKEND to one of them, which is installed, before keras is imported.",
        name="keras_moe",
    )


try:
    import keras
except (ImportError, ValueError) as error:
    raise _refused(f"KERAS_BACKEND={os.environ.get('KERAS_BACKEND')!r} ({error})") from error

if keras.backend.backend() not in _SUPPORTED:
    raise _refused(f"keras.backend.backend()={keras.backend.backend()!r}")

# Experts in several processes, each with some of them.
_processes: Any = None
if keras.backend.backend() == "torch":
    _processes = importlib.import_module("keras_moe.backend.torch_experts")

_module = importlib.import_module(f"keras_moe.backend.{keras.backend.backend()}")
# Arrays that are spread over a mesh of devices.
_sharding: Any = None
if keras.backend.backend() == "jax":
    _sharding = importlib.import_module("keras_moe.backend.jax_sharding")


def _primitive(name, module=_module):
    """A primitive of the backend; one that it lacks raises when it is called."""

    def lacking(*args, **kwargs):
        raise NotImplementedError(
            f"The backend {keras.backend.backend()!r} has no primitive `{name}`: what asked for it "
            "does not run there. The docstring of `keras_moe.backend` says what it is for."
        )

    return getattr(module, name, lacking)


argmax = _module.argmax
compile_once = _module.compile_once
compiles_static_shapes = _module.compiles_static_shapes
count_integers = _module.count_integers
current_platform = _module.current_platform
differentiable = _module.differentiable
gather_rows = _module.gather_rows
has_grouped_products = _module.has_grouped_products
lacks_stable_sort = _module.lacks_stable_sort
on_its_platform = _module.on_its_platform
sum_over_replicas = _module.sum_over_replicas
take_columns = _module.take_columns
vjp = _module.vjp

batched_product = _primitive("batched_product")
grouped_kernel_gradients = _primitive("grouped_kernel_gradients")
grouped_products = _primitive("grouped_products")
join_rows = _primitive("join_rows")
knows_sizes = _primitive("knows_sizes")
loop_over_groups = _primitive("loop_over_groups")
multiply_groups = _primitive("multiply_groups")
remakes_factors = _primitive("remakes_factors")
scan = _primitive("scan")
slice_at = _primitive("slice_at")
sort = _primitive("sort")
split_rows = _primitive("split_rows")
stacked_gradients = _primitive("stacked_gradients")
unstack_sizes = _primitive("unstack_sizes")

expert_processes: Any = getattr(_processes, "expert_processes", lambda: None)
split_experts = _primitive("split_experts", _processes)
gather_over_replicas: Any = getattr(_module, "gather_over_replicas", lambda values: values)
after: Any = getattr(_module, "after", lambda tensor, value: value)
larger_size: Any = getattr(_module, "larger_size", keras.ops.maximum)
is_exporting: Any = getattr(_module, "is_exporting", lambda: False)
is_recomputing: Any = getattr(_module, "is_recomputing", lambda: False)
may_recompute: Any = getattr(_module, "may_recompute", lambda: False)
loops_over_groups: Any = getattr(_module, "loops_over_groups", lambda: False)
as_one_program: Any = getattr(_module, "as_one_program", lambda function: function)
trace_once: Any = getattr(_module, "trace_once", lambda function: function)
knows_shapes: Any = getattr(_module, "knows_shapes", lambda: True)
num_replicas: Any = getattr(_module, "num_replicas", lambda: 1)
separate_losses: Any = getattr(_module, "separate_losses", lambda layer: None)
sum_of_counts: Any = getattr(_module, "sum_of_counts", lambda values: values)

token_shards: Any = getattr(_sharding, "token_shards", lambda: None)
exchange = _primitive("exchange", _sharding)
gather_shards = _primitive("gather_shards", _sharding)
max_over_axis = _primitive("max_over_axis", _sharding)
mesh_axis = _primitive("mesh_axis", _sharding)
on_each_device = _primitive("on_each_device", _sharding)
place_on_axis = _primitive("place_on_axis", _sharding)
sum_and_scatter = _primitive("sum_and_scatter", _sharding)
sum_over_axis = _primitive("sum_over_axis", _sharding)
