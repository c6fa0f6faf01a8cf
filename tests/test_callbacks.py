"""ExpertMonitor: every logged number against counts made by hand."""

import functools

import keras
import numpy as np
import pytest
from layer_checks import D, E, array, moe, normal, one_hot, one_hot_router

from keras_moe import inspection, layers, losses
from keras_moe.callbacks import ExpertMonitor

# The router sends a one-hot token to the expert of its one, and a learning rate of 0 keeps it so.
TRAINING = one_hot(0, 0, 0, 0, 0, 0, 1, 1)  # counts 6, 2, 0, 0
VALIDATION = one_hot(0, 1, 2, 3)
about = functools.partial(pytest.approx, abs=1e-6)

# Of one logit of 10 and three of 0.
ENTROPY = np.log(np.exp(10) + 3) - 10 * np.exp(10) / (np.exp(10) + 3)
BALANCED = {
    "load_imbalance": 0.0,
    "load_entropy": 1.0,
    "dead_experts": 0,
    "dropped_fraction": 0,
    "router_entropy": ENTROPY,
}
SKEWED = {
    "load_imbalance": 6 / 2 - 1,
    "load_entropy": -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4),
    "dead_experts": 2,
    "dropped_fraction": 0,
    "router_entropy": ENTROPY,
}
SHARES = {"expert_share_0": 0.75, "expert_share_1": 0.25, "expert_share_2": 0, "expert_share_3": 0}


def routed(name="moe", **kwargs):
    experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
    return moe(experts, router=one_hot_router(), router_losses=(), name=name, **kwargs)


def model_of(*moe_layers):
    model = keras.Sequential([keras.Input((E,)), *moe_layers])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model


def fit(model, *callbacks, validation=True, epochs=1, verbose=0, monitor=None, **options):
    data = (VALIDATION, VALIDATION) if validation else None
    return model.fit(
        TRAINING,
        TRAINING,
        batch_size=4,
        shuffle=False,
        epochs=epochs,
        validation_data=data,
        verbose=verbose,
        callbacks=[monitor or ExpertMonitor(), *callbacks],
        **options,
    ).history


def named(logs, prefix):
    return {f"{prefix}_{key}": value for key, value in logs.items()}


def usage(history):
    """Last logs of everything but the loss."""
    return {key: values[-1] for key, values in history.items() if key not in ("loss", "val_loss")}


class LastTestLogs(keras.callbacks.Callback):
    def on_test_end(self, logs=None):
        self.logs = {key: value for key, value in logs.items() if key != "loss"}


def evaluated(model, *callbacks):
    last = LastTestLogs()
    model.evaluate(VALIDATION, VALIDATION, callbacks=[*callbacks, last], verbose=0)
    return last.logs


def test_training_and_validation_are_reported_exactly_for_each_epoch():
    history = fit(model_of(routed()), epochs=2)
    assert usage(history) == about({**named(SKEWED, "moe"), **named(BALANCED, "val_moe")})
    for key, values in history.items():
        assert len(values) == 2
        assert values[0] == about(values[1]), f"{key}: counts of one epoch are in the next"
        assert type(values[0]) is float


def test_without_validation_only_training_is_reported():
    history = fit(model_of(routed()), validation=False)
    assert usage(history) == about(named(SKEWED, "moe"))


def test_each_share_is_reported_if_wanted():
    history = fit(model_of(routed()), monitor=ExpertMonitor(expert_shares=True))
    shares = {key: value for key, value in usage(history).items() if "share" in key}
    even = dict.fromkeys(SHARES, 0.25)
    assert shares == about({**named(SHARES, "moe"), **named(even, "val_moe")})


def test_each_router_loss_is_reported_by_its_name_before_its_weight():
    balance = losses.LoadBalance(0.5)
    layer = moe(router=one_hot_router(), router_losses=[balance, "router_z", balance], name="moe")
    inputs = keras.Input((E,))
    model = keras.Model(inputs, keras.layers.Dense(E)(layer(keras.layers.Dense(E)(inputs))))
    layer.router.kernel.assign(keras.ops.zeros((E, E)))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    history = fit(model)
    for split in ("", "val_"):
        found = {key: values[0] for key, values in history.items() if key.endswith(("loss", "_1"))}
        assert found[f"{split}moe_load_balance_loss"] == about(1.0)
        assert found[f"{split}moe_load_balance_loss_1"] == about(1.0)
        assert found[f"{split}moe_router_z_loss"] == about(np.log(4) ** 2)
        assert history[f"{split}moe_router_entropy"] == about([np.log(4)])


def test_shares_of_all_epochs_are_kept():
    monitor = ExpertMonitor()
    fit(model_of(routed()), monitor=monitor, epochs=3)
    np.testing.assert_allclose(monitor.shares["moe"], [[0.75, 0.25, 0, 0]] * 3)
    np.testing.assert_allclose(monitor.validation_shares["moe"], [[0.25] * 4] * 3)
    fit(model_of(routed()), monitor=monitor, validation=False)
    assert len(monitor.shares["moe"]) == 1 and not monitor.validation_shares


def test_a_resumed_training_continues_the_shares_of_the_epochs_before():
    monitor, one, even = ExpertMonitor(), [0.75, 0.25, 0, 0], [0.25] * 4
    monitor.shares, monitor.validation_shares = {"moe": np.array([even] * 3)}, {"moe": [even]}
    fit(model_of(routed()), monitor=monitor, initial_epoch=2, epochs=3)
    np.testing.assert_allclose(monitor.shares["moe"], [even, even, one])
    np.testing.assert_allclose(monitor.validation_shares["moe"], [even, [np.nan] * 4, even])
    fit(model_of(routed()), monitor=monitor, initial_epoch=3, epochs=5)
    np.testing.assert_allclose(monitor.shares["moe"], [even, even, one, one, one])
    # An epoch that was not watched has none.
    fit(model_of(routed()), monitor=monitor, initial_epoch=6, epochs=7)
    np.testing.assert_allclose(monitor.shares["moe"], [even, even, *[one] * 3, [np.nan] * 4, one])
    # Shares of other layers are not those before.
    for others in ({"other": [one] * 9}, {"moe": [[0.5, 0.5]] * 9}):
        monitor.shares = others
        fit(model_of(routed()), monitor=monitor, initial_epoch=8, epochs=9)
        np.testing.assert_allclose(monitor.shares["moe"], [one])
    # Those of a file begin with epoch 0, whenever this monitor began.
    monitor.shares = {"moe": [even] * 8}
    fit(model_of(routed()), monitor=monitor, initial_epoch=8, epochs=9)
    assert len(monitor.shares["moe"]) == 9


def test_epochs_without_validation_have_no_shares_of_it():
    monitor = ExpertMonitor()
    fit(model_of(routed()), monitor=monitor, epochs=4, validation_freq=2)
    nothing, even = [np.nan] * 4, [0.25] * 4
    expected = [nothing, even, nothing, even]
    np.testing.assert_allclose(monitor.validation_shares["moe"], expected)


def test_dropped_assignments_are_reported():
    history = fit(model_of(routed(capacity_factor=1.0)))  # room for one in each batch of four
    assert history["moe_dropped_fraction"] == about([(3 + 2) / 8])
    assert history["val_moe_dropped_fraction"] == [0.0]
    assert history["moe_load_imbalance"] == about([2.0]), "counted before any drop"


def test_usage_stands_in_the_last_line_of_the_progress_bar(capsys):
    fit(model_of(routed()), verbose=1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "moe_load_imbalance: 2.0000" in last
    assert "val_moe_load_imbalance: 0.0000" in last
    assert "moe_dead_experts: 2.0000" in last


@pytest.mark.parametrize("monitored", ["moe_load_imbalance", "val_moe_dead_experts"])
def test_early_stopping_can_watch_usage(monitored):
    stopping = keras.callbacks.EarlyStopping(monitored, mode="min", patience=1)
    assert len(fit(model_of(routed()), stopping, epochs=9)["loss"]) == 2


def test_an_evaluation_alone_is_reported():
    model = model_of(routed())
    assert evaluated(model, ExpertMonitor()) == about(named(BALANCED, "moe"))
    assert evaluated(model) == {}


def test_a_model_that_was_evaluated_before_is_counted_all_the_same():
    model = model_of(routed())
    model.evaluate(VALIDATION, VALIDATION, verbose=0)
    assert fit(model)["val_moe_dead_experts"] == [0.0]
    assert evaluated(model, ExpertMonitor())["moe_load_entropy"] == about(1.0)


def test_counts_made_before_the_first_epoch_are_left_out():
    layer = routed()
    model = model_of(layer)
    layer(one_hot(3, 3, 3, 3), training=True)
    assert usage(fit(model)) == about({**named(SKEWED, "moe"), **named(BALANCED, "val_moe")})


def test_prediction_counts_nothing():
    layer = routed()
    model = model_of(layer)
    fit(model)
    layer(one_hot(3), training=True)
    before = array(layer.expert_counts)
    model.predict(VALIDATION, verbose=0)
    np.testing.assert_array_equal(array(layer.expert_counts), before)
    assert before.sum() == 1


def test_an_evaluation_without_the_monitor_counts_nothing_after_one_with_it():
    layer = routed()
    model = model_of(layer)
    fit(model)
    model.evaluate(VALIDATION, VALIDATION, verbose=0)
    assert array(layer.expert_counts).sum() == 0


class Evaluates(keras.callbacks.Callback):
    """Evaluates behind each epoch, on its own."""

    def __init__(self, *callbacks):
        super().__init__()
        self._callbacks = callbacks

    def on_epoch_end(self, epoch, logs=None):
        self.model.evaluate(VALIDATION, VALIDATION, callbacks=[*self._callbacks], verbose=0)


def test_validation_counts_behind_evaluations_without_the_monitor():
    layer = routed()
    model = model_of(layer)
    history = fit(model, Evaluates(), epochs=2)
    assert usage(history) == about({**named(SKEWED, "moe"), **named(BALANCED, "val_moe")})
    assert array(layer.expert_counts).sum() == 0


def test_a_monitor_is_in_one_call_at_a_time():
    model, monitor = model_of(routed()), ExpertMonitor()
    data = (VALIDATION, VALIDATION)
    for inner, validation in ((ExpertMonitor(), None), (monitor, None), (monitor, data)):
        with pytest.raises(ValueError, match="must have one `ExpertMonitor`, in one call"):
            callbacks = [Evaluates(inner), monitor]
            model.fit(*data, validation_data=validation, callbacks=callbacks, verbose=0)
    # What was interrupted is over, and behind the monitor its counts are read already.
    history = fit(model, Evaluates(monitor), monitor=monitor, epochs=2)
    assert usage(history) == about({**named(SKEWED, "moe"), **named(BALANCED, "val_moe")})


def test_a_model_keeps_a_test_step_of_its_own():
    model = model_of(routed())
    own_step = model.test_step = functools.partial(model.test_step)
    assert evaluated(model, ExpertMonitor()) == about(named(BALANCED, "moe"))
    assert model.test_step is own_step


def test_two_layers_have_logs_of_their_own():
    forget = keras.layers.Rescaling(0.0)  # equal scores: every token goes to the first expert
    logs = usage(fit(model_of(routed("first"), forget, routed("second"))))
    alone = {"load_imbalance": 3, "load_entropy": 0, "dead_experts": 3, "dropped_fraction": 0}
    alone["router_entropy"] = np.log(4)
    expected = {**named(SKEWED, "first"), **named(BALANCED, "val_first")}
    expected |= {**named(alone, "second"), **named(alone, "val_second")}
    assert logs == about(expected)


@pytest.mark.parametrize("wrap", ["sequential", "functional"])
def test_two_layers_of_one_name_are_told_apart(wrap):
    def inner(name):
        inputs = keras.Input((E,))
        if wrap == "sequential":
            return keras.Sequential([inputs, routed()], name=name)
        return keras.Model(inputs, routed()(inputs), name=name)

    logs = usage(fit(model_of(inner("first"), keras.layers.Rescaling(0.0), inner("second"))))
    found = [key for key in logs if key.endswith("load_imbalance") and not key.startswith("val_")]
    assert sorted(logs[key] for key in found) == about([2.0, 3.0]), found


def test_a_layer_inside_other_layers_is_found():
    experts = layers.FeedForwardExperts(E, 4)
    block = layers.TransformerEncoderBlock(2, moe(experts, name="moe"))
    model = keras.Sequential([keras.Input((3, D)), block])
    model.compile("sgd", "mse")
    x = normal(4, 3, D)
    history = model.fit(x, x, callbacks=[ExpertMonitor()], verbose=0).history
    assert "moe_load_entropy" in history


def test_an_unbuilt_model_is_counted_from_its_first_batch():
    model = keras.Sequential([routed()])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    assert usage(fit(model)) == about({**named(SKEWED, "moe"), **named(BALANCED, "val_moe")})


def test_names_of_losses_are_those_that_keras_would_give():
    class KLToUniform(losses.RouterLoss):
        def compute(self, routing):
            return keras.ops.sum(routing.probs)

    class SpreadLoss(KLToUniform):
        pass

    model = keras.Sequential([moe(router_losses=[KLToUniform(0.1), SpreadLoss(0.1)], name="moe")])
    model.compile("sgd", "mse")
    history = model.fit(normal(4, D), normal(4, D), callbacks=[ExpertMonitor()], verbose=0).history
    assert {"moe_kl_to_uniform_loss", "moe_spread_loss"} <= set(history)


class Interruption(Exception):
    pass


class Interrupts(keras.callbacks.Callback):
    """Raises in the hook of this name, the second time that it is called."""

    def __init__(self, hook):
        super().__init__()
        self.calls = 0
        setattr(self, hook, self._raise)

    def _raise(self, *arguments, **kwargs):
        self.calls += 1
        if self.calls == 2:
            raise Interruption


class OwnData(keras.utils.PyDataset):
    """Data of which the second batch cannot be read."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index:
            raise Interruption
        return VALIDATION[:2], VALIDATION[:2]


class BreaksInTheStep(keras.losses.Loss):
    def call(self, y_true, y_pred):
        raise Interruption


def interrupted_evaluation(model, place):
    """An evaluation with a monitor that ends in the middle."""
    kwargs = {"callbacks": [ExpertMonitor()], "verbose": 0}
    if place == "data":
        model.evaluate(OwnData(), **kwargs)
    elif place == "step":
        model.compile("sgd", BreaksInTheStep())
        model.evaluate(VALIDATION, VALIDATION, **kwargs)
    else:
        kwargs["callbacks"].append(Interrupts(place))
        model.evaluate(VALIDATION, VALIDATION, batch_size=2, **kwargs)


PLACES = ["on_test_batch_begin", "on_test_batch_end", "data", "step"]


@pytest.mark.parametrize("place", PLACES)
def test_nothing_counts_after_an_evaluation_that_was_interrupted(place):
    model = model_of(routed())
    layer = model.layers[0]
    with pytest.raises(Exception):  # noqa: B017 - TensorFlow wraps what the data raises
        interrupted_evaluation(model, place)
    # On JAX Keras leaves a model without its variables there, whatever its layers.
    getattr(model, "jax_state_sync", lambda: None)()
    assert not layer.counts_in_evaluation
    before = array(layer.expert_counts)
    model.predict(VALIDATION, verbose=0)
    np.testing.assert_array_equal(array(layer.expert_counts), before)
    if place == "step":
        model.compile("sgd", "mse")
    model.evaluate(VALIDATION, VALIDATION, batch_size=1, verbose=0)
    model.test_on_batch(VALIDATION, VALIDATION)
    counted = array(layer.expert_counts) - before
    # A step that was announced and never made counts the next one.
    assert counted.sum() <= (place == "on_test_batch_begin")


def test_a_monitor_after_an_evaluation_that_was_interrupted_counts_anew():
    model = model_of(routed())
    with pytest.raises(Interruption):
        interrupted_evaluation(model, "on_test_batch_end")
    assert evaluated(model, ExpertMonitor()) == about(named(BALANCED, "moe"))
    history = fit(model, epochs=2)
    expected = {**named(SKEWED, "moe"), **named(BALANCED, "val_moe")}
    assert usage(history) == about(expected)


@pytest.mark.parametrize("validation", [True, False])
def test_a_second_monitor_is_refused_as_it_would_find_no_counts(validation):
    with pytest.raises(ValueError, match="must have one `ExpertMonitor`"):
        fit(model_of(routed()), ExpertMonitor(), validation=validation)


def test_a_context_counts_and_ends_with_any_exit():
    model = model_of(routed())
    layer = model.layers[0]
    with pytest.raises(Interruption), inspection.count_in_evaluation(model):
        model(VALIDATION)
        raise Interruption
    model(VALIDATION)
    np.testing.assert_array_equal(array(layer.expert_counts), [1, 1, 1, 1])
