"""Conversion of models and weights from and to other packages."""

from keras_moe.convert.hugging_face import from_hugging_face, to_hugging_face
from keras_moe.convert.keras_hub import layout_map, restore, use_sparse_experts
from keras_moe.convert.transformers_format import save_to_transformers

__all__ = [
    "from_hugging_face",
    "layout_map",
    "restore",
    "save_to_transformers",
    "to_hugging_face",
    "use_sparse_experts",
]

__dir__ = __all__.copy
