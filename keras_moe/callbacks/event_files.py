"""Files that TensorBoard reads, written without TensorFlow."""

import io
import time

from keras_moe._internal.plain_text import as_text
from keras_moe._internal.validation import check_path

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.histogram.summary_v2 import histogram_pb
    from tensorboard.plugins.image.metadata import create_summary_metadata
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    from keras_moe import visualization
except ImportError as error:
    raise ImportError(
        "`log_dir` needs TensorBoard and matplotlib, one of which is not installed. "
        "Run `pip install tensorboard matplotlib`."
    ) from error


class EventFiles:
    """One file for each split of the data, in folders of the names that Keras uses.

    Args:
        log_dir: the `--logdir` of TensorBoard.
    """

    def __init__(self, log_dir):
        self.log_dir = check_path("log_dir", log_dir)
        if self.log_dir.exists() and not self.log_dir.is_dir():
            raise ValueError(
                f"`log_dir` must be a folder. Received: {str(log_dir)!r}, which is none. "
                "Name another."
            )
        self._writers = {}

    def write(self, split, step, numbers, shares):
        """Write the numbers of one epoch.

        Args:
            split: "train" or "validation".
            step: number of the epoch.
            numbers: dict of layers to dicts of names to scalars.
            shares: dict of layers to one array (E,) for each epoch so far.
        """
        summaries = [
            scalar_pb(f"{as_text(layer)}/{key}", value)
            for layer, values in numbers.items()
            for key, value in values.items()
        ]
        for layer, epochs in shares.items():
            summaries.append(histogram_pb(f"{as_text(layer)}/shares", epochs[-1]))
            summaries.append(_image(layer, epochs, step + 1 - len(epochs)))
        writer = self._writer(split)
        for summary in summaries:
            writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()

    def close(self):
        while self._writers:
            self._writers.popitem()[1].close()

    def _writer(self, split):
        if split not in self._writers:
            self._writers[split] = EventFileWriter(str(self.log_dir / split))
        return self._writers[split]


def _image(layer, shares, first_epoch):
    file = io.BytesIO()
    figure = visualization.shares_over_time({layer: shares}, first_epoch)
    figure.savefig(file, format="png", dpi=100)
    size = [str(round(100 * inches)).encode() for inches in figure.get_size_inches()]
    tensor = make_tensor_proto([*size, file.getvalue()])
    metadata = create_summary_metadata(None, None, converted_to_tensor=True)
    tag = f"{as_text(layer)}/shares_over_time"
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
