"""How the MoE layers of a model are computed."""

from typing import NamedTuple

import keras

from keras_moe.backend import backend
from keras_moe.inspection.finding import built_layers
from keras_moe.ops.platforms import named_platform


class LayerDescription(NamedTuple):
    """How a MoE layer of a model is computed; all are strings.

    - `name`: its name in the model.
    - `router`, `experts`: their classes.
    - `dtype`: the compute dtype of the experts.
    - `platform`: "cpu", "gpu" or "tpu".
    - `engine`: "rows" (kernels for all rows at once), "padded" (one batched product over padded
      tiles), "tiles" (a loop over tiles of rows) or "slices" (groups of their exact sizes; without
      XLA and on a CPU TensorFlow serves few rows by "loop", over the experts that have some);
      for experts that are Keras layers "vectorized" (all tiles at once, each with a copy of its
      weights), "scan" (one tile after another) or "slices".
    """

    name: str
    router: str
    experts: str
    dtype: str
    platform: str
    engine: str


def describe(model):
    """How each MoE layer of a model is computed on this machine.

    The engine follows from the backend, the platform, the dtype, and whether `model.compile` turned
    XLA on; `ops.grouped.run.choose` has the rule. To read it for a platform that is not here, call
    this in the context `ops.platform`.

    Args:
        model: A built Keras model.

    Returns:
        List of one `LayerDescription` for each MoE layer, in the order of the model.

    Raises:
        ValueError: If the model has no MoE layer, or one that is not built.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(num_experts=4, hidden_dim=32)
    >>> model = keras.Sequential([
    ...     keras.Input((16,)), keras_moe.layers.MixtureOfExperts(experts, name="moe")
    ... ])
    >>> with keras_moe.ops.platform("cpu"):
    ...     (layer,) = keras_moe.inspection.describe(model)
    >>> layer.router, layer.experts, layer.dtype
    ('TopKRouter', 'FeedForwardExperts', 'float32')
    """
    platform = named_platform() or backend.current_platform()
    static_shapes = backend.compiles_static_shapes() or _is_compiled_by_xla(model)
    return [
        LayerDescription(
            name=name,
            router=type(layer.router).__name__,
            experts=type(layer.experts).__name__,
            dtype=layer.experts.compute_dtype,
            platform=platform,
            engine=layer.experts.engine_on(platform, static_shapes),
        )
        for name, layer in built_layers(model).items()
    ]


def _is_compiled_by_xla(model):
    return keras.backend.backend() == "tensorflow" and bool(getattr(model, "jit_compile", False))
