"""Runs what the page of a pip extra shows, where only that extra is installed.

python tests/extras.py extra-tuner
"""

import json
import os
import pathlib
import re
import sys
import tempfile

PAGES = pathlib.Path(__file__).resolve().parent.parent / "docs"


def blocks(page):
    text = (PAGES / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(parts, **names):
    for code in parts:
        exec(compile(code, "page", "exec"), names)
    return names


def onnx():
    import numpy as np
    import onnxruntime

    model, x = run(blocks("deploy.md"))["model"], np.ones((5, 16), "float32")
    expected = model.predict(x)
    model.export("model.onnx", format="onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def convert():
    """The blocks about files of Hugging Face; those about KerasHub need that package."""
    import keras
    import safetensors.numpy

    from keras_moe import convert, layers

    mixture = layers.MixtureOfExperts(layers.GatedExperts(num_experts=4, hidden_dim=16))
    mixture.build((None, 8))
    pathlib.Path("other").mkdir()
    weights = convert.to_hugging_face(mixture, 0, "mixtral")
    safetensors.numpy.save_file(weights, "other/model.safetensors")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_local_experts": 4}
    config = {"model_type": "mixtral", "num_experts_per_tok": 2, **sizes}
    pathlib.Path("other/config.json").write_text(json.dumps(config))
    of_files = [code for code in blocks("existing_models.md") if "hugging_face" in code]
    run(of_files, path="other", keras=keras, convert=convert)


PROGRAMS = {
    "convert": convert,
    "onnx": onnx,
    "tuner": lambda: run(blocks("tuning.md")),
    "visualization": lambda: run(blocks("seeing_experts.md")),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        PROGRAMS[sys.argv[1].removeprefix("extra-")]()
