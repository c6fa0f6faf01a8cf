"""Training of a translator that goes on after an interruption."""

import keras
import resuming
from translator import SmoothedCrossentropy

from keras_moe import callbacks, inspection

LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.1
WARM_UP = 400


def fit(model, train, validation, epochs, folder, log_dir=None, learning_rate=LEARNING_RATE):
    """Train to the last epoch, from where an earlier call with the same `folder` got to.

    Args:
        model: a built `Translator`.
        train: `SentenceBatches`.
        validation: `SentenceBatches`.
        epochs: number of epochs in all.
        folder: see `resuming.fit`.
        log_dir: folder for TensorBoard, or None.
        learning_rate: the highest, after warm-up.

    Returns:
        See `resuming.fit`.
    """
    compile_for_training(model, epochs * len(train), learning_rate)
    monitors = []
    if inspection.has_moe_layers(model):
        monitors.append(callbacks.ExpertMonitor(log_dir=log_dir))
    return resuming.fit(
        model,
        train.dataset(),
        epochs,
        folder,
        [*monitors, _SetEpoch(train)],
        validation_data=validation.dataset(),
    )


def compile_for_training(model, steps, learning_rate=LEARNING_RATE):
    warm_up = min(WARM_UP, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=learning_rate, warmup_steps=warm_up
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
