"""Training of a translator that goes on after an interruption."""

import hashlib
import json

import keras
from training_journal import Journal
from translator import SmoothedCrossentropy
from whole_files import write_whole

from keras_moe import callbacks, inspection

LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.1
WARM_UP = 400


def fit(model, train, validation, epochs, folder, log_dir=None):
    """Train to the last epoch, from where an earlier call with the same `folder` got to.

    Args:
        model: a built `Translator`.
        train: `SentenceBatches`.
        validation: `SentenceBatches`.
        epochs: number of epochs in all.
        folder: keeps the weights and the logs of each epoch.
        log_dir: folder for TensorBoard, or None.

    Returns:
        Dict from the name of each logged value to its values by epoch, with `ms_per_step`.

    Raises:
        ValueError: If what `folder` keeps is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backup = folder / "backup"
    done = finished_epochs(backup)
    if done:
        print(f"Going on after epoch {done} of {epochs}, which an earlier run finished.")
    compile_for_training(model, epochs * len(train))
    journal = Journal(folder / "journal.json")
    monitors = (
        [callbacks.ExpertMonitor(log_dir=log_dir)] if inspection.has_moe_layers(model) else []
    )
    try:
        model.fit(
            train.dataset(),
            epochs=epochs,
            validation_data=validation.dataset(),
            shuffle=False,  # they are shuffled already
            callbacks=[
                *monitors,
                _SetEpoch(train),
                journal,
                # The copy serves where a run was killed while it wrote the original.
                keras.callbacks.BackupAndRestore(
                    backup, double_checkpoint=True, delete_checkpoint=False
                ),
            ],
        )
    except OSError as error:
        raise ValueError(
            f"The weights of an interrupted run are damaged. Received: {error} for {backup}. "
            "Delete this folder, and the same command trains anew."
        ) from error
    return journal.history


def compile_for_training(model, steps):
    warm_up = min(WARM_UP, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=LEARNING_RATE, warmup_steps=warm_up
    )
    model.compile(
        optimizer=keras.optimizers.Adam(schedule, beta_2=0.98, global_clipnorm=1.0),
        loss=SmoothedCrossentropy(LABEL_SMOOTHING),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        # PyTorch has no XLA.
        jit_compile=keras.backend.backend() != "torch",
    )


class _SetEpoch(keras.callbacks.Callback):
    """Tells the batches which epoch it is, from which their order follows."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.epoch = epoch


def finished_epochs(backup):
    """Number of epochs whose weights are kept."""
    try:
        return json.loads((backup / "training_metadata.json").read_text())["epoch"]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def digest(*settings):
    """A short name for settings, other for others."""
    return hashlib.sha256(repr(settings).encode("utf-8")).hexdigest()[:12]


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2).encode("utf-8"))
