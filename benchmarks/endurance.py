"""Does a long training stay sound? Numbers, experts, memory and compilations over many steps.

    KERAS_BACKEND=jax python -m benchmarks.endurance

A small model (`benchmarks.tagger`) is trained by `fit`, with a mixture balanced by a loss and
one balanced by a selection bias, and once with dense layers in their place: what grows with those
is not the mixture's. Each row is a fresh process. An epoch has as many batches as `--epoch` says,
each of T tokens; give one T and one E. The columns:

- loss_first, loss_last: mean loss of an epoch. One step that is not finite makes it NaN.
- not_finite: numbers in weights and optimizer that were not finite at the end of any epoch.
- dead_experts: the most in any epoch, over all layers.
- least_share: the least used expert of the last epoch, by its fair share.
- warm_mb, last_mb: the memory that is resident after the first two epochs, and in the end.
- kb_per_1000: by how much it grows in 1,000 steps after the first two epochs, a line through all.
- compiled, compiled_later: programs of XLA in the first epoch, and after it.
"""

import keras
import numpy as np

from benchmarks.measure import BACKEND, parse, parser, publish, say
from benchmarks.observed import compilations, growth_kb, in_observed_process, resident_mb
from benchmarks.tagger import MIXTURE, TWIN, compiled_tagger, feedforwards, texts
from keras_moe import callbacks

POLICIES = ("mixed_bfloat16", "mixed_float16", "bfloat16")


def main(arguments=None):
    options = parser(__doc__, tokens=[128], features=16, hidden=32, experts=[8])
    options.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    options.add_argument("--steps", type=int, default=10_000)
    options.add_argument("--epoch", type=int, default=500, help="steps of an epoch")
    options.add_argument("--length", type=int, default=16, help="tokens of one text")
    smoke = {"policies": ["mixed_float16"], "steps": 16, "epoch": 4, "length": 8}
    options = parse(options, arguments, **smoke)
    contests = [(policy, MIXTURE) for policy in options.policies]
    title, rows = f"{BACKEND}{' without XLA' * options.no_xla}, {options.steps} steps", []
    for contest in [*contests, (options.policies[0], TWIN)]:
        rows.append(in_observed_process(endure, options, *contest))
        # Each takes long: what is measured is kept, should a later one be interrupted.
        publish(f"endurance-{BACKEND}", title, options, rows)
    return rows


def endure(options, policy, name, dump):
    """The row of one contestant."""
    keras.config.set_dtype_policy(policy)
    model = compiled_tagger(feedforwards(name, options), options)
    batch_size = options.tokens[0] // options.length
    ids, classes = texts(options.epoch * batch_size, options.length)
    watch = Watch(dump)
    watched = [watch]
    if name == MIXTURE:
        monitor = callbacks.ExpertMonitor()
        watched = [monitor, callbacks.ExpertHealth(every=100), watch]
    epochs = options.steps // options.epoch
    history = model.fit(ids, classes, batch_size, epochs, callbacks=watched, verbose=0).history
    losses, resident, compiled, broken = history["loss"], *zip(*watch.epochs)
    row = {
        "name": name,
        "policy": policy,
        "steps": len(losses) * options.epoch,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "not_finite": sum(broken),
        "warm_mb": resident[1],
        "last_mb": resident[-1],
        "kb_per_1000": growth_kb(resident[1:], options.epoch),
        "compiled": compiled[0],
        "compiled_later": compiled[-1] - compiled[0],
    }
    if name == MIXTURE:
        row["dead_experts"] = int(max(history["dead_experts"]))
        row["least_share"] = options.experts[0] * min(
            float(min(epochs[-1])) for epochs in monitor.shares.values()
        )
    return row


class Watch(keras.callbacks.Callback):
    """Keeps resident memory, compilations, and how many numbers are not finite by epoch."""

    def __init__(self, dump):
        super().__init__()
        self.dump = dump
        self.epochs = []

    def on_epoch_end(self, epoch, logs=None):
        say(f"epoch {epoch + 1}: loss {logs['loss']:.4f}")
        broken = not_finite(self.model.variables + self.model.optimizer.variables)
        self.epochs.append((resident_mb(), compilations(self.dump), broken))


def not_finite(variables):
    values = [keras.ops.convert_to_numpy(variable) for variable in variables]
    return sum(int(np.sum(~np.isfinite(each.astype("float64")))) for each in values)


if __name__ == "__main__":
    main()
