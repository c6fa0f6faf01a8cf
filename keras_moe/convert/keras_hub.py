"""Sparse experts in models of KerasHub, in place, and how such models are saved."""

import sys
from typing import Any

import keras

from keras_moe._internal.keras_internals import forget_old_weights, own_layers
from keras_moe._internal.serialization import PACKAGE
from keras_moe.convert.keras_hub_families import FAMILIES, family_of
from keras_moe.convert.sparse_blocks import (
    ConvertedBlock,
    change_class,
    change_class_back,
    make_dense,
    make_sparse,
)
from keras_moe.convert.weights import check_plain


def use_sparse_experts(model: keras.Model) -> keras.Model:
    """Let the MoE blocks of a KerasHub model compute only the experts that are chosen.

    KerasHub computes every expert for every token. Afterwards each block computes with a
    `layers.MixtureOfExperts` of the same weights, and all tools of this package work on it. The
    model remains the same object, with the same outputs, `generate`, `fit` and files of weights; an
    optimizer starts again. Padding is not routed if KerasHub passes its mask to the block. A saved
    model is sparse when it is loaded, in a process that has imported `keras_moe`.

    Args:
        model: Keras model. A model of KerasHub, such as a `CausalLM` or a `Backbone`, or one that
            contains it. Of several models in each other, the outermost.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no MoE block that is known here, or one that is quantized or
            has LoRA.

    Example:

    >>> model = keras_hub.models.MixtralCausalLM.from_preset(preset)  # doctest: +SKIP
    >>> keras_moe.convert.use_sparse_experts(model).generate("Keras is")  # doctest: +SKIP
    """
    # A backbone has its decoder layers in its graph and in a list.
    found = {
        id(block): (owner, block)
        for owner in model._flatten_layers()
        for block in own_layers(owner)
        if family_of(block)
    }
    if not found and not _sparse_blocks(model):
        raise ValueError(
            f"`model` must have a MoE block of KerasHub: {', '.join(FAMILIES)}. "
            f"Received: model={model!r}"
        )
    for _, block in found.values():
        check_plain(block)
    for owner, block in found.values():
        make_sparse(owner, block, family_of(block))
    _finish(model, _mark)
    return model


def restore(model: keras.Model) -> keras.Model:
    """Give a model that `use_sparse_experts` has converted the blocks of KerasHub again, in place.

    Args:
        model: Keras model. As for `use_sparse_experts`.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no block that was converted, or a router that is quantized or
            has LoRA.

    Example:

    >>> keras_moe.convert.restore(model).save_to_preset("preset")  # doctest: +SKIP
    """
    blocks = _sparse_blocks(model)
    if not blocks:
        raise ValueError(f"`use_sparse_experts` must have converted `model`. Received: {model!r}")
    for block in blocks:
        # KerasHub gets the floats of experts, with their LoRA.
        check_plain(block, but=block._sparse_mixture.experts)
    for block in blocks:
        make_dense(block)
    _finish(model, _unmark)
    return model


# By paths of KerasHub's weights: heads of attention, and experts before `use_sparse_experts`.
_LAYOUTS = {
    r".*attention/query/kernel": (None, "model", None),
    r".*attention/query/bias": ("model", None),
    r".*attention/attention_output/kernel": ("model", None, None),
    r".*experts/expert_feedforward_\w+_dense": ("expert", None, None),
}


def layout_map(mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
    """Layouts of KerasHub's MoE models for `distribution.expert_parallel`, on JAX.

    Heads of attention are split over the axis "model" of the mesh, experts over "expert". Heads of
    keys and values, which are few in these models, and all other weights are whole on every device.
    Set the distribution before you make or load the model, and convert the model afterwards.

    Args:
        mesh: `keras.distribution.DeviceMesh` with the axes "data", "expert" and "model". The size
            of the last one divides the number of query heads.

    Returns:
        A `keras.distribution.LayoutMap`.

    Example:

    >>> mesh = keras.distribution.DeviceMesh(
    ...     (2, 2, 2), ("data", "expert", "model")
    ... )  # doctest: +SKIP
    >>> layouts = keras_moe.convert.layout_map(mesh)  # doctest: +SKIP
    >>> keras.distribution.set_distribution(
    ...     keras_moe.distribution.expert_parallel(layout_map=layouts)
    ... )  # doctest: +SKIP
    """
    layouts = keras.distribution.LayoutMap(mesh)
    for path, axes in _LAYOUTS.items():
        layouts[path] = axes
    return layouts


def _sparse_blocks(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, ConvertedBlock)]


def _finish(model, mark):
    """Update everything that holds the old weights, and the classes of backbones."""
    forget_old_weights(model)
    backbone = sys.modules["keras_hub"].models.Backbone
    for layer in list(model._flatten_layers()):
        if isinstance(layer, backbone):
            mark(layer)


class SparseBackbone:
    """Mixed into the class of a backbone: its config has the name of that class."""

    replaced: Any

    def get_config(self):
        name = keras.saving.get_registered_name(self.replaced)
        return {**self.replaced.get_config(self), "sparsified": name}

    @classmethod
    def from_config(cls, config):
        import keras_hub  # noqa: F401 registers its classes

        config = dict(config)
        replaced = keras.saving.get_registered_object(config.pop("sparsified"))
        return use_sparse_experts(replaced.from_config(config))

    def save_to_preset(self, *args, **kwargs):
        """Save a preset, which KerasHub loads as its own."""
        _unmark(self)
        try:
            self.save_to_preset(*args, **kwargs)
        finally:
            _mark(self)


# One name for all backbones; the config says which one it is.
_register = keras.saving.register_keras_serializable(PACKAGE, "SparseBackbone")
_register(SparseBackbone)


def _mark(backbone):
    """Let a backbone be saved as a sparse one."""
    if not isinstance(backbone, SparseBackbone):
        change_class(backbone, SparseBackbone)
        _register(type(backbone))


def _unmark(backbone):
    """Let a backbone be saved as the one that it is in KerasHub."""
    if isinstance(backbone, SparseBackbone):
        change_class_back(backbone)
