"""Sparse experts for models of KerasHub, in place, and the way back."""

import sys

from keras_moe._internal.keras_internals import forget_old_weights
from keras_moe._internal.validation import check_model
from keras_moe.convert.keras_hub_families import FAMILIES, family_of
from keras_moe.convert.sparse_backbone import mark, unmark
from keras_moe.convert.sparse_blocks import ConvertedBlock, make_dense, make_sparse


def sparsify(model):
    """Let the MoE blocks of a KerasHub model compute only the experts that are chosen.

    KerasHub computes every expert for every token. Afterwards each block computes with a
    `layers.MixtureOfExperts` of the same weights, so that all tools of this package work on it.
    Blocks are converted one after the other, and their old weights are freed. The model remains the
    same object, with the same outputs, `generate`, `fit` and files of weights; padding is not
    routed if KerasHub passes its mask to the block.

    A model that is saved is sparse when it is loaded, in a process that has imported `keras_moe`.
    An optimizer starts anew.

    Args:
        model: a model of KerasHub, such as a `CausalLM` or a `Backbone`, or one that contains it.
            Of several models one in the other, the outermost.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no MoE block that is known here, or one that is quantized.

    Example:

    >>> model = keras_hub.models.MixtralCausalLM.from_preset(preset)  # doctest: +SKIP
    >>> keras_moe.convert.sparsify(model).generate("Keras is")  # doctest: +SKIP
    """
    # A backbone has its decoder layers in its graph and in a list.
    found = {id(block): (owner, block) for owner, block in _sublayers(model) if family_of(block)}
    blocks = list(found.values())
    if not blocks and not sparse_blocks(model):
        raise ValueError(
            "The model must have a MoE block of KerasHub. Received: "
            f"model={model!r} without one of {', '.join(FAMILIES)}. "
            "Pass the `CausalLM` or `Backbone`."
        )
    for _, block in blocks:
        _check_not_quantized(block)
    for owner, block in blocks:
        make_sparse(owner, block, family_of(block))
    _finish(model, mark)
    return model


def restore(model):
    """Give a model that `sparsify` has converted the blocks of KerasHub again, in place.

    Args:
        model: as for `sparsify`.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no block that was converted.

    Example:

    >>> keras_moe.convert.restore(model).save_to_preset("preset")  # doctest: +SKIP
    """
    blocks = sparse_blocks(model)
    if not blocks:
        raise ValueError(
            "The model must have been converted by `sparsify`. Received: "
            f"model={model!r} without a converted block. Pass the model that was."
        )
    for block in blocks:
        # Its bank can be integers: their floats are what KerasHub is given.
        _check_not_quantized(block, but=block._sparse_mixture.experts)
    for block in blocks:
        make_dense(block)
    _finish(model, unmark)
    return model


def _check_not_quantized(block, but=None):
    for layer in block._flatten_layers():
        if layer is not but and layer.quantization_mode is not None:
            raise ValueError(
                "A model must be made sparse, or restored, before it is quantized. Received: "
                f"layer {layer.path!r} in {layer.quantization_mode!r}. Load the model in a float "
                "dtype, and convert it first."
            )


def sparse_blocks(model):
    check_model(model)
    return [layer for layer in model._flatten_layers() if isinstance(layer, ConvertedBlock)]


def _sublayers(model):
    check_model(model)
    for owner in model._flatten_layers():
        for layer in owner._layers:
            yield owner, layer


def _finish(model, mark_backbone):
    """Bring everything up to date that knew the old weights."""
    forget_old_weights(model)
    backbone = sys.modules["keras_hub"].models.Backbone
    for layer in list(model._flatten_layers()):
        if isinstance(layer, backbone):
            mark_backbone(layer)
