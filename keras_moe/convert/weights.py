"""Reading of weights in the layouts of other packages."""

import json
import pathlib
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_moe._internal.plain_text import stating


class Rule(NamedTuple):
    """One weight of another package, and the one or two of ours that it contains.

    - `theirs`: its name. With `{expert}` in it there is one for each expert.
    - `ours`: names of our weights. Two share the axis of the outputs: halves, or `interleaved`.
    - `transposed`: whether its last two axes are (outputs, inputs).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    def split(self, theirs):
        if self.transposed:
            theirs = np.swapaxes(theirs, -1, -2)
        if len(self.ours) == 1:
            return [theirs]
        if self.interleaved:
            return [theirs[..., ::2], theirs[..., 1::2]]
        half = theirs.shape[-1] // 2
        return [theirs[..., :half], theirs[..., half:]]

    def join(self, ours):
        joined = ours[0]
        if len(ours) > 1 and self.interleaved:
            joined = np.stack(ours, axis=-1).reshape(*joined.shape[:-1], -1)
        elif len(ours) > 1:
            joined = np.concatenate(ours, axis=-1)
        return np.ascontiguousarray(np.swapaxes(joined, -1, -2) if self.transposed else joined)


def floats_of(bank, name):
    """A weight of a bank as an array; a kernel as floats, with its LoRA."""
    projection, _, part = name.rpartition("_")
    if part == "kernel":
        return bank.projection(projection).merged_kernel()
    return ops.convert_to_numpy(getattr(bank, name))


def check_plain(layer, but=None):
    """Refuse a layer with kernels that are quantized or have LoRA, except in one sublayer."""
    for part in layer._flatten_layers():
        has_more = part.quantization_mode is not None or getattr(part, "lora_enabled", False)
        if has_more and part is not but:
            raise ValueError(
                "A layer must be converted before it is quantized or has LoRA. "
                f"Received: {part.path!r} with such kernels"
            )


def read_config(source, name="config.json"):
    if hasattr(source, "keys"):
        raise ValueError("Weights by name must come with a `config`. Received: config=None")
    path = pathlib.Path(source)
    folder = path.parent if path.suffix == ".safetensors" else path
    return json.loads((folder / name).read_text(encoding="utf-8"))


def tensor_reader(source):
    """A function from names to arrays of floats, and all names, of weights by name or in files."""
    if hasattr(source, "keys"):
        get, names = source.__getitem__, set(source.keys())
    else:
        files = _open_files(pathlib.Path(source))
        get, names = lambda name: files[name].get_tensor(name), set(files)

    def read(name):
        with stating(
            "Weights must be floats of at least 16 bits, of a model that is not quantized.",
            repr(name),
            "Dequantize the model first, for example by `model.float()` and `save_pretrained`.",
        ):
            return _floats(get(name))

    return read, names


def _open_files(path):
    from safetensors import safe_open  # here: the package does not require it

    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [safe_open(each, framework="numpy") for each in paths]
    return {name: file for file in files for name in file.keys()}


def _floats(tensor):
    tensor = tensor if hasattr(tensor, "dtype") else np.asarray(tensor)
    # Fewer bits have scales beside them.
    if not any(f"float{bits}" in str(tensor.dtype) for bits in (16, 32, 64)):
        raise TypeError(f"its dtype is {tensor.dtype}")
    if hasattr(tensor, "detach"):  # PyTorch
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if "bfloat16" in str(tensor.dtype) else tensor  # NumPy has none
    return np.asarray(tensor)
