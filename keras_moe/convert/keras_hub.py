"""Conversion of KerasHub models to sparse experts, and back."""

import gc

import keras

from keras_moe._internal.keras_internals import own_layers
from keras_moe._internal.serialization import PACKAGE, Configured, register
from keras_moe.convert.keras_hub_blocks import BLOCKS, family_of, is_sparse, sparse_layers
from keras_moe.convert.weights import check_plain
from keras_moe.layers.replacement import backbones, forget_converters, record, replace


@keras.saving.register_keras_serializable(PACKAGE, "sparsify")
def use_sparse_experts(model: keras.Model) -> keras.Model:
    """Make the MoE blocks of a KerasHub model compute only the chosen experts.

    Afterwards each block computes with a `layers.MixtureOfExperts` of the same weights, and all
    tools of this package work on it. The result is the same model, with the same outputs and files
    of weights; an optimizer starts again. A saved model is sparse when it is loaded, in a process
    that has imported `keras_moe`.

    Args:
        model: Keras model. The outermost that contains a `CausalLM` or `Backbone` of KerasHub.

    Raises:
        ValueError: If the model has no MoE block that is known here, or a quantized or LoRA one.

    Example:

    >>> model = keras_hub.models.MixtralCausalLM.from_preset(preset)  # doctest: +SKIP
    >>> keras_moe.convert.use_sparse_experts(model).generate("Keras is")  # doctest: +SKIP
    """
    dense = [
        (owner, block)
        for owner in model._flatten_layers()
        for block in own_layers(owner)
        if family_of(block) and not any(map(is_sparse, own_layers(block)))
    ]
    if not dense and not any(map(is_sparse, model._flatten_layers())):
        rule = f"`model` must have a MoE block of KerasHub: {', '.join(BLOCKS)}"
        raise ValueError(f"{rule}. Received: model={model!r}")
    for _, block in dense:
        check_plain(block)
    while dense:
        owner, block = dense.pop()
        model, _ = replace(model, sparse_layers(owner, block, family_of(block)))
        # A device may not hold the experts of all blocks twice.
        del block
        gc.collect()
    for backbone in backbones(model):
        record(backbone, converters=[use_sparse_experts])
    return model


def restore(model: keras.Model) -> keras.Model:
    """Undo `use_sparse_experts`, and return the same model with the blocks of KerasHub.

    Args:
        model: Keras model. As for `use_sparse_experts`.

    Raises:
        ValueError: If no block was converted, or a router is quantized or has LoRA.

    Example:

    >>> keras_moe.convert.restore(model).save_to_preset("preset")  # doctest: +SKIP
    """
    sparse = list(filter(is_sparse, model._flatten_layers()))
    if not sparse:
        rule = "`model` must be one that `use_sparse_experts` converted"
        raise ValueError(f"{rule}. Received: {model!r}")
    for layer in sparse:
        # KerasHub gets the floats of experts, with their LoRA.
        check_plain(layer._sparse_mixture, but=layer._sparse_mixture.experts)
    replacements = {old: new for layer in sparse for old, new in layer.make_dense().items()}
    model, _ = replace(model, replacements)
    for backbone in backbones(model):
        forget_converters(backbone)
    return model


def layout_map(mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
    """Layouts of KerasHub's MoE models for `distribution.expert_parallel`, on JAX.

    Heads of attention are split over the axis "model" of the mesh, experts over "expert". Set the
    distribution, make or load the model, then convert.

    Args:
        mesh: `keras.distribution.DeviceMesh` with axes "data", "expert" and "model", whose size
            divides the number of query heads.

    Example:

    >>> layouts = keras_moe.convert.layout_map(mesh)  # doctest: +SKIP
    >>> distribution = keras_moe.distribution.expert_parallel(layout_map=layouts)  # doctest: +SKIP
    """
    # By paths of KerasHub's weights: heads of attention, and experts before `use_sparse_experts`.
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[r".*attention/query/kernel"] = (None, "model", None)
    layouts[r".*attention/query/bias"] = ("model", None)
    layouts[r".*attention/attention_output/kernel"] = ("model", None, None)
    layouts[r".*experts/expert_feedforward_\w+_dense"] = ("expert", None, None)
    return layouts


@register
class SparseBackbone(Configured):
    """Reads backbones that version 0.2 converted and saved."""

    @classmethod
    def from_config(cls, config):
        import keras_hub  # noqa: F401 registers its classes

        config = dict(config)
        original = keras.saving.get_registered_object(config.pop("sparsified"))
        return use_sparse_experts(original.from_config(config))
