"""A watchdog that warns early when experts go wrong."""

import collections
import warnings

import numpy as np
from keras import ops

from keras_moe import health
from keras_moe._internal.checks import check_choice, check_integer
from keras_moe.callbacks.expert_monitor import PASS_TRAINING, ExpertCallback
from keras_moe.inspection.summaries import named_layers
from keras_moe.metrics import is_dead

# A collapse that recovers at this rate from check to check is not reported.
_RECOVERY = 0.02
# A dead expert is reported after more checks than a collapse.
_DEAD_PATIENCE = 3
# A large kernel has exploded only if it has also grown by this factor since the training began.
_GROWTH = 3.0


class ExpertHealth(ExpertCallback):
    """Warns in plain words, with advice, as soon as experts or routers go wrong.

    Checks every MoE layer for

    - a collapse: nearly all tokens go to the same few experts, and this does not improve;
    - experts that are dead (`metrics.dead_experts`) in `3 * patience` checks in a row;
    - a capacity that drops more than half of the assignments;
    - a router whose logits are NaN or so large that the softmax saturates;
    - a balancing loss such as `losses.LoadBalance` whose weight is far from its `usual_weight`.

    At the end of training, one check with 5 assignments per expert suffices to report a collapse,
    and `patience` checks to report dead experts. There is one warning per layer, and another if
    more experts die. `findings` is a list of them: `(step, layer name, health.Finding)`.

    Args:
        every: Integer. Training batches between checks. A check waits until experts have 20
            assignments on average.
        patience: Integer. Checks that a problem must last before it is reported.
        stop: Boolean. Whether a problem ends the training, one batch after the check.

    Raises:
        ValueError: If an argument is out of its range, or the model has no MoE layer.

    Example:

    >>> moe = keras_moe.layers.MixtureOfExperts(keras_moe.layers.FeedForwardExperts(4, 32))
    >>> model = keras.Sequential([keras.Input((16,)), moe])
    >>> model.compile("adam", "mse")
    >>> x = keras.random.normal((64, 16))
    >>> history = model.fit(x, x, callbacks=[keras_moe.callbacks.ExpertHealth()], verbose=0)
    """

    def __init__(self, every: int = 10, patience: int = 3, stop: bool = False):
        super().__init__()
        self.every = check_integer("every", every)
        self.patience = check_integer("patience", patience)
        self.stop = check_choice("stop", stop, (True, False))
        self.findings: list = []

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self.findings = []
        self._step = self._next_check = 0
        self._largest_loss = np.nan
        self._reported: set = set()
        self._watches = {}
        for name, layer in named_layers(self.model).items():
            for loss, weight in zip(layer.router_losses, layer.loss_weights_in_force):
                self._report(name, "weak loss", health.weak_loss(loss, weight))

    def on_epoch_begin(self, epoch, logs=None):
        # Leave out what was counted or loaded between epochs.
        for _, watch in self._watched():
            watch.seen = watch.epoch_began = watch.layer.read_counts()

    # Not `on_train_batch_end`, for which Keras waits for every batch.
    def on_train_batch_begin(self, batch, logs=None):
        if self._step >= self._next_check:
            # Keras has this on JAX only.
            getattr(self.model, "jax_state_sync", lambda: None)()
            for name, watch in self._watched():
                watch.count()
                numbers = self.patience, self.patience, _DEAD_PATIENCE * self.patience
                for found in watch.check(health.ENOUGH, *numbers):
                    self._report(name, *found)
            self._next_check = self._step + self.every
        # Called once for the batches of one execution.
        self._step += self.model.steps_per_execution

    def on_epoch_end(self, epoch, logs=None):
        losses: list = []
        added = {}
        for name, watch in self._watched():
            layer, counted = watch.layer, watch.count().since(watch.epoch_began)
            if not counted.assignments.any():
                unused = health.Finding(health.HINT, "Training counts no token.", PASS_TRAINING)
                self._report(name, "unused", unused)
            if not counted.assignments.any() or not layer.router_losses:
                continue
            means = counted.means.losses
            losses += zip(layer.router_losses, layer.loss_weights_in_force, means, strict=True)
            added[name] = counted.means.added
        if added:
            self._largest_loss = np.fmax(self._largest_loss, (logs or {}).get("loss", np.nan))
            finding = health.heavy_losses(losses, self._largest_loss)
            self._report(max(added, key=lambda name: added[name]), "heavy loss", finding)

    def on_train_end(self, logs=None):
        for name, watch in self._watches.items():
            for found in watch.check(health.FEW, 1, 1, self.patience):
                self._report(name, *found, acts=False)

    def _watched(self):
        for name, layer in named_layers(self.model).items():
            if layer.built and name not in self._watches:
                self._watches[name] = _Watch(layer, self.patience)
        return self._watches.items()

    def _report(self, name, kind, finding, about=(None,), *, acts=True):
        """Warn of a finding, or None, if it is about anything that was not reported before."""
        facts = {(name, kind, each) for each in about}
        if finding is None or facts <= self._reported:
            return
        self._reported |= facts
        is_known = (name, finding.fix) in [(layer, each.fix) for _, layer, each in self.findings]
        self.findings.append((self._step, name, finding))
        advice = "The advice is the same as before." if is_known else finding.fix
        text = f"{name}, step {self._step}: {finding.text} {advice}"
        if acts and self.stop and finding.level == health.PROBLEM:
            self.model.stop_training = True
            text += " Training stops here."
        # With the name of this module instead of a source line that says nothing to users.
        warnings.warn_explicit(text, UserWarning, __name__, self._step)


class _Watch:
    """Checks one layer, and keeps what the next check needs."""

    def __init__(self, layer, patience):
        self.layer = layer
        self.patience = patience
        self.seen = layer.read_counts()
        # Zeros: a layer that the first batch has built counted all of it in this epoch.
        self.epoch_began = self.seen.since(self.seen)
        # Assignments and dropped ones since the last check with enough of them.
        self._window = np.zeros(len(self.seen.assignments))
        self._dropped = 0.0
        self._is_nan = False  # all logits since the last check that counted any
        self._first_size = _router_size(layer.router)
        self._spreads: collections.deque = collections.deque(maxlen=self.patience)
        self._drops: collections.deque = collections.deque(maxlen=self.patience)
        self._idle: np.ndarray = np.zeros(len(self._window), "int64")

    def count(self):
        """Add what was counted since the last time, and return the counters."""
        counted = self.layer.read_counts()
        new, self.seen = counted.since(self.seen), counted
        self._is_nan = np.isnan(new.means.entropy) or (self._is_nan and not new.assignments.any())
        self._window += new.assignments
        self._dropped += new.dropped
        return counted

    def check(self, enough, of_collapse, of_drops, of_dead):
        """Yield tuples of a kind, a finding or None, and perhaps the experts it is about.

        Numbers of checks in a row, each of `enough` assignments per expert, that show a collapse,
        drops and dead experts.
        """
        size = np.nan if self._is_nan else _router_size(self.layer.router)
        most = max(health.EXPLODED_LOGIT, _GROWTH * self._first_size)
        yield "router", health.bad_logits(size, most)
        if not np.isfinite(size):  # NaN ranks first: its tokens choose the first experts.
            return
        if self._window.mean() >= enough:
            self._judged = self._window
            self._spreads.append(health.spread(self._judged, self.layer.router.min_top_k))
            self._drops.append(self._dropped / np.sum(self._judged))
            idle = ops.convert_to_numpy(is_dead(self._judged))
            self._idle = np.where(idle, self._idle + 1, 0)
            self._window, self._dropped = np.zeros_like(self._window), 0.0
        spreads, drops = list(self._spreads), list(self._drops)
        is_low = len(spreads) >= of_collapse and max(spreads[-of_collapse:]) < health.COLLAPSED
        if is_low and spreads[-1] - spreads[0] <= _RECOVERY * (len(spreads) - 1):
            yield "collapse", health.collapsed(self._judged, health.balance_advice(self.layer))
        if len(drops) >= of_drops and min(drops[-of_drops:]) > health.MAX_DROPPED:
            yield "dropped", health.judge_drops(drops[-1])[0]
        dead, num_experts = np.flatnonzero(self._idle >= of_dead), len(self._idle)
        # In a collapse most are dead, one after the other.
        if len(dead) and spreads[-1] >= health.COLLAPSED:
            advice = health.balance_advice(self.layer)
            finding = health.dead(dead, num_experts, advice, f" in {of_dead} checks")
            now = f"At the last check {np.sum(self._idle > 0)} of {num_experts} were dead."
            yield "dead", finding._replace(text=f"{finding.text} {now}"), dead.tolist()


def _router_size(router):
    """Deviation of the largest logit for inputs of variance 1, NaN if a weight is NaN."""
    weights = [weight for weight in router.weights if "float" in weight.dtype]
    if not all(np.isfinite(ops.convert_to_numpy(weight)).all() for weight in weights):
        return np.nan
    kernel = getattr(router, "kernel", None)
    if kernel is None:
        return 0.0
    kernel = ops.convert_to_numpy(kernel).astype("float64")
    return np.linalg.norm(health.logit_sizes(kernel, router), axis=0).max()
