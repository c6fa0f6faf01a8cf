"""How a backbone with sparse blocks is saved and loaded."""

import contextlib
from typing import Any

import keras

from keras_moe._internal.serialization import PACKAGE

_NAME = "SparseBackbone"
_CLASSES: dict = {}


class SparseBackbone:
    """Mixed into the class of a backbone: its config says that it was made sparse.

    KerasHub makes all blocks of a backbone from a few numbers of its config. This one has the name
    of its class there as well.
    """

    replaced: Any

    def get_config(self):
        name = keras.saving.get_registered_name(self.replaced)
        return {**self.replaced.get_config(self), "sparsified": name}

    @classmethod
    def from_config(cls, config):
        import keras_hub  # noqa: F401 registers its classes

        from keras_moe.convert.in_place import sparsify

        config = dict(config)
        replaced = keras.saving.get_registered_object(config.pop("sparsified"))
        return sparsify(replaced.from_config(config))

    def save_to_preset(self, *args, **kwargs):
        """Save a preset, which KerasHub loads as its own."""
        with _unmarked(self):
            self.save_to_preset(*args, **kwargs)


# One name for all backbones; the config says which one it is.
_register = keras.saving.register_keras_serializable(PACKAGE, _NAME)
_register(SparseBackbone)


def mark(backbone):
    """Let a backbone be saved as a sparse one."""
    cls = type(backbone)
    if issubclass(cls, SparseBackbone):
        return
    if cls not in _CLASSES:
        members = {"replaced": cls, "__module__": __name__}
        # Under the old name: in files of weights, layers are called by that of their class.
        _CLASSES[cls] = _register(type(cls.__name__, (SparseBackbone, cls), members))
    object.__setattr__(backbone, "__class__", _CLASSES[cls])


def unmark(backbone):
    """Let a backbone be saved as what it is in KerasHub."""
    if isinstance(backbone, SparseBackbone):
        object.__setattr__(backbone, "__class__", backbone.replaced)


@contextlib.contextmanager
def _unmarked(backbone):
    unmark(backbone)
    try:
        yield
    finally:
        mark(backbone)
