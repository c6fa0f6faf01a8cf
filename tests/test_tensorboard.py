"""Files that ExpertMonitor writes for TensorBoard, read back by TensorBoard itself."""

import io

import matplotlib.image
import numpy as np
import pytest
from backends import on_one_backend, run_python
from test_callbacks import fit, model_of, routed

from keras_moe.callbacks import ExpertMonitor

# What is written are the arrays and floats of the history, which is tested on each backend.
pytestmark = on_one_backend


def read(folder):
    """Dict of tags to lists of (step, value) of scalars and of other tensors."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def test_scalars_are_those_of_the_history_and_shares_a_histogram_and_an_image(tmp_path):
    monitor = ExpertMonitor(log_dir=tmp_path)
    fit(model_of(routed()), monitor, epochs=2)
    train, validation = read(tmp_path / "train"), read(tmp_path / "validation")
    for written, prefix in ((train, ""), (validation, "val_")):
        scalars = {tag: values for tag, values in written.items() if np.ndim(values[0][1]) == 0}
        assert len(scalars) == 5
        for tag, values in scalars.items():
            key = prefix + tag.replace("/", "_")
            assert [step for step, _ in values] == [0, 1]
            assert [float(value) for _, value in values] == pytest.approx(monitor.history[key])
        width, height, png = written["moe/shares_over_time"][1][1]
        image = matplotlib.image.imread(io.BytesIO(png))
        assert image.shape[:2] == (int(height), int(width))
    left, right, count = train["moe/shares"][1][1].T
    assert count.sum() == 4
    assert left[0] == 0 and right[-1] == pytest.approx(0.75)
    assert count[0] == 2, "two experts without work"


WITHOUT_OPTIONAL_PARTS = """
import sys
sys.modules["keras_tuner"] = sys.modules["matplotlib"] = sys.modules["tensorflow"] = None
import keras_moe, pydoc
assert "upcycle" in pydoc.render_doc(keras_moe)
assert not hasattr(keras_moe, "tuner") and not hasattr(keras_moe, "visualization")
try:
    import keras_moe.tuner
except ImportError as error:
    print(error)
del sys.modules["matplotlib"]
from keras_moe.callbacks.event_files import EventFiles
files = EventFiles(sys.argv[1])
files.write("train", 0, {"moe": {"a": 1.0}}, {"moe": [[0.5, 0.5]]})
files.close()
"""


def test_packages_that_are_missing_leave_the_rest_alone(tmp_path):
    printed = run_python("-c", WITHOUT_OPTIONAL_PARTS, tmp_path)
    assert 'run `pip install "keras-tuner[bayesian]" six`' in printed
    assert len(read(tmp_path / "train")) == 3, "events are written without TensorFlow"
