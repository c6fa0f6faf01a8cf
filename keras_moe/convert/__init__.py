"""Models of other packages, with their weights."""

from keras_moe.convert.in_place import restore, sparsify

__all__ = ["restore", "sparsify"]
