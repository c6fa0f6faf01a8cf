"""Arrays by name, out of files or out of memory, one at a time."""

import contextlib
import json

import numpy as np

from keras_moe._internal.plain_text import stating
from keras_moe._internal.validation import check_path


@contextlib.contextmanager
def opened(source):
    """A function from a name to its array, and all names.

    Args:
        source: path of a `.safetensors` file or of a folder of them; or a mapping of names to
            arrays, or to tensors on the CPU.

    Raises:
        ValueError: If there is no such file.
    """
    if hasattr(source, "keys"):
        yield lambda name: as_array(source[name]), set(source.keys())
        return
    # Here, so that the package can be imported without it.
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        files = {}
        for path in _paths(check_path("source", source)):
            with stating(
                "Weights must be in whole `.safetensors` files.",
                repr(str(path)),
                "Download it again.",
            ):
                file = stack.enter_context(safe_open(path, framework="numpy"))
            files.update(dict.fromkeys(file.keys(), file))

        def read(name):
            with stating(
                "The weights must be float32, float16 or bfloat16.",
                f"{name!r}, which NumPy cannot hold",
                "Convert the model before, for example by `model.float()` and `save_pretrained`.",
            ):
                return files[name].get_tensor(name)

        yield read, set(files)


def config_of(source):
    """The content of `config.json` in a folder, or of the folder of a file."""
    if hasattr(source, "keys"):
        raise ValueError(
            "A mapping of weights must come with the config of its model. Received: "
            f"{len(source)} weights without `config`. Pass `config=model.config.to_dict()`."
        )
    path = check_path("source", source)
    if not path.exists():
        raise ValueError(
            "`source` must be a folder or file on this machine. Received: "
            f"source={str(source)!r}, which is none. Download the model first, for example by "
            "`huggingface_hub.snapshot_download`."
        )
    path = (path.parent if path.suffix == ".safetensors" else path) / "config.json"
    if not path.exists():
        raise ValueError(
            "The config of a model must be in `config.json` beside its files. Received: "
            f"source={str(source)!r} without one. Pass `config`, its content as a dict."
        )
    with stating(
        "The config of a model must be a JSON file in UTF-8.",
        repr(str(path)),
        "Download it again, or pass `config`, its content as a dict.",
    ):
        return json.loads(path.read_text(encoding="utf-8"))


def as_array(tensor):
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()  # of PyTorch
    if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
        if tensor.dtype.itemsize < 2:
            raise ValueError(
                "The weights must be float32, float16 or bfloat16. Received: a tensor of "
                f"{tensor.dtype}, which has scales of its own. Convert the model before, for "
                "example by `model.float()`."
            )
        tensor = tensor.float()  # NumPy has no bfloat16
    return tensor.numpy()


def _paths(path):
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths or not all(each.exists() for each in paths):
        raise ValueError(
            "Weights must be in `.safetensors` files. Received: "
            f"source={str(path)!r} without one. Pass a file, or a folder of them."
        )
    return paths
