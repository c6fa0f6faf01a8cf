"""Reading of weights in the layouts of other packages."""

import json
import pathlib
from typing import NamedTuple

import numpy as np
from keras import ops


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
        theirs, number = np.swapaxes(theirs, -1, -2) if self.transposed else theirs, len(self.ours)
        if self.interleaved:
            return [theirs[..., place::number] for place in range(number)]
        return np.split(theirs, number, axis=-1)

    def join(self, ours):
        joined = np.concatenate(ours, axis=-1)
        if self.interleaved:
            joined = np.stack(ours, axis=-1).reshape(joined.shape)
        return np.ascontiguousarray(np.swapaxes(joined, -1, -2) if self.transposed else joined)


def floats_of(bank, name):
    """A weight of a bank as an array; a kernel as floats, with its LoRA."""
    projection, _, part = name.rpartition("_")
    if part == "kernel":
        return bank.projection(projection).merged_kernel()
    return ops.convert_to_numpy(getattr(bank, name))


def check_plain(layer, but=None):
    """Refuse a layer that is not built, or, except in one sublayer, is quantized or has LoRA."""
    if not layer.built:
        raise ValueError(f"A layer must be built to be converted. Received: {layer.name!r}")
    for part in layer._flatten_layers():
        if part is not but and (part.quantization_mode or getattr(part, "lora_enabled", False)):
            rule = "A layer must be converted before it is quantized or has LoRA"
            raise ValueError(f"{rule}. Received: {part.path!r} with such kernels")


def read_config(source):
    if hasattr(source, "keys"):
        raise ValueError("Weights by name must come with a `config`. Received: config=None")
    path = pathlib.Path(source)
    folder = path.parent if path.suffix == ".safetensors" else path
    if not (folder / "config.json").is_file():
        rule = "`source` must be a folder on this machine with `config.json` and weights, such as "
        rule += "`huggingface_hub.snapshot_download(name)` returns"
        raise ValueError(f"{rule}. Received: source={str(source)!r}")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def tensor_reader(source):
    """A function from names to arrays of floats, and all names, of weights by name or in files."""
    if hasattr(source, "keys"):
        get, names = source.__getitem__, set(source.keys())
    else:
        from safetensors import safe_open  # here: the package does not require it

        path = pathlib.Path(source)
        paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        opened = [safe_open(each, framework="numpy") for each in paths]
        files = {name: file for file in opened for name in file.keys()}
        get, names = lambda name: files[name].get_tensor(name), set(files)

    def read(name):
        if name not in names:
            rule = "A block must have all its weights, and `layer` must be in the model"
            raise ValueError(f"{rule}. Received: no weight {name!r}")
        try:
            return _floats(get(name))
        except Exception as error:
            rule = "Weights must be floats of at least 16 bits. Dequantize others first"
            raise ValueError(f"{rule}. Received: {name!r} ({error})") from error

    return read, names


def _floats(tensor):
    tensor = tensor if hasattr(tensor, "dtype") else np.asarray(tensor)
    # Weights of fewer bits are quantized, with scales in other tensors.
    if not any(f"float{bits}" in str(tensor.dtype) for bits in (16, 32, 64)):
        raise TypeError(f"its dtype is {tensor.dtype}")
    if hasattr(tensor, "detach"):  # PyTorch
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if "bfloat16" in str(tensor.dtype) else tensor  # NumPy has none
    return np.asarray(tensor)
