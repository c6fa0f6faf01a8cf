"""Event files of TensorBoard, written without TensorFlow."""

import io
import pathlib
import time

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.image.metadata import create_summary_metadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from keras_moe import visualization
from keras_moe._internal.plain_text import as_text


class EventFiles:
    """A file for each split of the data, in folders of the names that Keras uses."""

    def __init__(self, log_dir):
        self.log_dir = pathlib.Path(log_dir)
        if self.log_dir.exists() and not self.log_dir.is_dir():
            raise ValueError(f"`log_dir` must be a folder. Received: log_dir={str(log_dir)!r}")
        self._writers = {}

    def write(self, split, step, numbers, shares):
        summaries = []
        for layer, values in numbers.items():
            summaries += [scalar_pb(f"{as_text(layer)}/{key}", values[key]) for key in values]
        for layer, epochs in shares.items():
            summaries.append(histogram_pb(f"{as_text(layer)}/shares", epochs[-1]))
            summaries.append(_image(layer, epochs))
        if split not in self._writers:
            self._writers[split] = EventFileWriter(str(self.log_dir / split))
        for summary in summaries:
            event = Event(wall_time=time.time(), step=step, summary=summary)
            self._writers[split].add_event(event)
        self._writers[split].flush()

    def close(self):
        while self._writers:
            self._writers.popitem()[1].close()


def _image(layer, shares):
    file = io.BytesIO()
    figure = visualization.shares_over_time({layer: shares})
    figure.savefig(file, format="png", dpi=100)
    size = [str(round(100 * inches)).encode() for inches in figure.get_size_inches()]
    tensor = make_tensor_proto([*size, file.getvalue()])
    metadata = create_summary_metadata(None, None, converted_to_tensor=True)
    tag = f"{as_text(layer)}/shares_over_time"
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
