"""ExpertMonitor: every logged number against counts made by hand. Schedules of router losses."""

import functools

import keras
import layer_checks
import numpy as np
import pytest
from backends import QUICK_JIT, on_each_backend, on_one_backend
from layer_checks import E, array, moe, one_hot, one_hot_router

from keras_moe import layers, losses, routers
from keras_moe.callbacks import ExpertMonitor, RouterLossSchedule

pytestmark = on_one_backend

# The router sends a one-hot token to the expert of its one, and a learning rate of 0 keeps it so.
TRAINING = one_hot(0, 0, 0, 0, 0, 0, 1, 1)  # counts 6, 2, 0, 0
VALIDATION = one_hot(0, 1, 2, 3)
about = functools.partial(pytest.approx, abs=1e-6)

# Of one logit of 10 and three of 0.
ENTROPY = np.log(np.exp(10) + 3) - 10 * np.exp(10) / (np.exp(10) + 3)
COMMON = {"dropped_fraction": 0, "router_entropy": ENTROPY / np.log(4)}
BALANCED = {"load_imbalance": 0.0, "load_entropy": 1.0, "dead_experts": 0, **COMMON}
SKEWED_ENTROPY = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
SKEWED = {"load_imbalance": 2.0, "load_entropy": SKEWED_ENTROPY, "dead_experts": 2, **COMMON}


def named(logs, prefix):
    return {f"{prefix}_{key}": value for key, value in logs.items()}


EVEN = {"load_imbalance": 0.0, "dead_experts": 0}
BOTH = {"load_imbalance": 2.0, "dead_experts": 2, "val_load_imbalance": 0.0}
OF_LAYER = {**named(SKEWED, "moe"), **named(BALANCED, "val_moe")}


def routed(name="moe", **kwargs):
    experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
    return moe(experts, router=one_hot_router(), router_losses=(), name=name, **kwargs)


def model_of(*moe_layers):
    optimizer = keras.optimizers.SGD(0.0)
    return layer_checks.model_of(*moe_layers, shape=(E,), optimizer=optimizer)


def fit(model, *callbacks, validation=True, **options):
    """The history of a training under callbacks, by default a monitor."""
    data = (VALIDATION, VALIDATION) if validation else None
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, "validation_data": data, **options}
    callbacks = callbacks or [ExpertMonitor()]
    return model.fit(TRAINING, TRAINING, callbacks=list(callbacks), **options).history


def usage(history):
    """Last logs of everything but the loss."""
    return {key: values[-1] for key, values in history.items() if key not in ("loss", "val_loss")}


def evaluated(model, *callbacks, **options):
    """Logs of an evaluation without the loss."""
    logs = {}
    last = keras.callbacks.LambdaCallback(on_test_end=logs.update)
    model.evaluate(VALIDATION, VALIDATION, callbacks=[*callbacks, last], verbose=0, **options)
    return {key: value for key, value in logs.items() if key != "loss"}


def test_shares_of_a_gate_of_selectors_are_shares_of_its_weights():
    selectors = [routers.DSelectKRouter(8, per_example=False, gamma=9.0, seed=n) for n in range(2)]
    layer = layers.MultiGateMixtureOfExperts(
        layers.LinearExperts(8, E), 2, selectors, task_names=["a", "b"], name="gates"
    )
    inputs = keras.Input((E,))
    model = keras.Model(inputs, keras.layers.Add()(layer(inputs)))
    for router in selectors:  # All experts serve, unevenly.
        router.bias.assign(np.linspace(-3, 3, 8))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=QUICK_JIT)
    monitor = ExpertMonitor()
    fit(model, monitor, validation=False)
    weights = array(selectors[0](TRAINING).weights)[0]
    np.testing.assert_allclose(monitor.shares["gates_a"][-1], weights, rtol=1e-4)
    imbalance = monitor.history["gates_a_load_imbalance"][-1]
    assert imbalance == pytest.approx(8 * weights.max() - 1, rel=1e-3)


def busiest(counts):
    """A user-defined metric."""
    return np.max(counts)


@on_each_backend
def test_training_and_validation_are_reported_exactly_for_each_epoch(capsys):
    model, stopping = model_of(routed()), keras.callbacks.EarlyStopping("val_load_imbalance")
    stopping.patience, stopping.mode = 1, "min"
    monitor = ExpertMonitor()
    history = fit(model, monitor, stopping, epochs=9, verbose=1)
    assert usage(history) == about(BOTH) and usage(monitor.history) == about(OF_LAYER)
    for key, values in {**history, **monitor.history}.items():
        assert len(values) == 2, "other callbacks see the logs"
        assert values[0] == about(values[1]), f"{key}: counts of one epoch are in the next"
        assert type(values[0]) is float
    last = capsys.readouterr().out.splitlines()[-1]
    assert " load_imbalance: 2.0000" in last and " val_load_imbalance: 0.0000" in last
    history = fit(model, keras.callbacks.ProgbarLogger(), ExpertMonitor(), verbose=1)
    assert usage(history) == about(BOTH)
    assert "imbalance" not in capsys.readouterr().out
    history = fit(model, ExpertMonitor(per_layer=True))
    assert usage(history) == about({**BOTH, **OF_LAYER})
    monitor = ExpertMonitor(metrics=[busiest])
    fit(model, monitor, validation=False)
    assert usage(monitor.history) == about(named({**SKEWED, "busiest": 6}, "moe"))


def test_each_router_loss_is_reported_by_its_name_before_its_weight():
    class KLToUniform(losses.RouterLoss):
        def compute(self, routing):
            return keras.ops.sum(routing.probs)

    class SpreadLoss(KLToUniform):
        pass

    balance = losses.LoadBalance(0.5)
    router_losses = [balance, "router_z", balance, KLToUniform(0.1), SpreadLoss(0.1)]
    layer = moe(router=one_hot_router(), router_losses=router_losses, name="moe")
    inputs = keras.Input((E,))
    model = keras.Model(inputs, keras.layers.Dense(E)(layer(keras.layers.Dense(E)(inputs))))
    layer.router.kernel.assign(keras.ops.zeros((E, E)))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = fit(model, ExpertMonitor(per_layer=True))
    assert "val_router_loss" not in logs, "training alone adds them"
    for split in ("", "val_"):
        found = {key: values[0] for key, values in logs.items() if key.startswith(f"{split}moe")}
        assert found[f"{split}moe_load_balance_loss"] == about(1.0)
        assert found[f"{split}moe_load_balance_loss_1"] == about(1.0)
        assert found[f"{split}moe_router_z_loss"] == about(np.log(4) ** 2)
        assert found[f"{split}moe_router_entropy"] == about(1.0)
        assert found[f"{split}moe_kl_to_uniform_loss"] == found[f"{split}moe_spread_loss"] > 1
    expected = 0.5 + 1e-3 * np.log(4) ** 2 + 0.5 + 2 * 0.1 * logs["moe_spread_loss"][0]
    assert logs["router_loss"] == [pytest.approx(expected, rel=1e-5)]


class SmallLogits(routers.TopKRouter):
    """A router with a loss of its own, and one of a layer in it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.identity = keras.layers.ActivityRegularization(l2=0.1)

    def route(self, tokens, mask, training, **context):
        routing = super().route(tokens, mask, training, **context)
        if training:
            self.add_loss(keras.ops.mean(keras.ops.abs(self.identity(routing.logits))) + 0.1)
        return routing


@on_each_backend
def test_the_logged_router_loss_is_what_mixtures_add_to_the_loss():
    relu = routers.ReLURouter(initial_strength=0.5, kernel_initializer="ones")
    twice = moe(router_losses=[losses.LoadBalance(0.5)], name="twice")
    parts = [
        moe(router=relu, name="relu"),
        twice,
        moe(router_losses=["router_z", losses.RouterZ(0.1)], name="own"),
        moe(router=SmallLogits(), name="custom"),
    ]
    inputs = keras.Input((E,))
    outputs = functools.reduce(lambda x, layer: layer(x), [*parts, twice], inputs)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mse"], jit_compile=QUICK_JIT)
    monitor = ExpertMonitor()
    logs = fit(model, monitor, validation=False)
    added = logs["loss"][0] - logs["mse"][0]
    reported = [*(monitor.history[f"{layer.name}_router_loss"][0] for layer in parts)]
    assert reported[1] > 0.5 and min(reported) > 0.01
    assert sum(reported) + reported[1] == pytest.approx(added, rel=1e-4)
    assert logs["router_loss"] == [pytest.approx(sum(reported))]


ROUTERS = [cls for cls in layer_checks.CASES if issubclass(cls, routers.Router)]


@pytest.mark.parametrize("cls", [*ROUTERS, SmallLogits], ids=lambda cls: cls.__name__)
def test_a_mixture_reports_what_it_adds_to_the_loss(cls):
    case = layer_checks.CASES.get(cls, layer_checks.CASES[routers.TopKRouter])
    layer = case.layer(cls(**case.required()))
    layer(layer_checks.normal(2, 3, layer_checks.D), training=True)
    (mixture,) = (part for part in layer._flatten_layers() if isinstance(part, layers.MoE))
    added = sum(float(array(loss)) for loss in mixture.losses)
    assert mixture.read_counts().means.added == pytest.approx(added)


@pytest.mark.backends("tensorflow")  # Keras writes event files by TensorFlow.
def test_tensorboard_after_a_monitor_gets_the_numbers_of_each_layer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor, board = ExpertMonitor(per_layer=True), keras.callbacks.TensorBoard(tmp_path)
    fit(model_of(routed()), monitor, board)
    for folder, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        written = {tag for tag in events.Tags()["tensors"] if tag.startswith("epoch_moe_")}
        keys = {key for key in monitor.history if key.startswith("val_") == bool(prefix)}
        assert written == {f"epoch_{key.removeprefix(prefix)}" for key in keys}


def test_a_batch_of_nan_does_not_end_the_counts_of_weights():
    layer = moe(router="dense", name="moe")
    model, monitor = model_of(layer), ExpertMonitor()
    layer(np.full((3, E), np.nan, "float32"), training=True)
    fit(model, monitor, validation=False)
    assert np.isfinite([*monitor.shares["moe"], array(layer.expert_counts)]).all()


def test_shares_of_all_epochs_are_kept():
    model, monitor, one, even = model_of(routed()), ExpertMonitor(), [0.75, 0.25, 0, 0], [0.25] * 4
    nothing = [np.nan] * 4
    fit(model, monitor, epochs=4, validation_freq=2)
    np.testing.assert_allclose(monitor.shares["moe"], [one] * 4)
    np.testing.assert_allclose(monitor.validation_shares["moe"], [nothing, even, nothing, even])
    fit(model, monitor, validation=False)
    assert len(monitor.shares["moe"]) == 1
    np.testing.assert_allclose(monitor.validation_shares["moe"], [nothing])
    fit(model, monitor, initial_epoch=3, epochs=5)
    np.testing.assert_allclose(monitor.shares["moe"], [one, one])


def test_dropped_assignments_are_reported_of_a_model_that_its_first_batch_builds():
    model = keras.Sequential([routed(capacity_factor=1.0)])  # a slot for one in each batch of four
    model.compile(keras.optimizers.SGD(0.0), "mse")
    monitor = ExpertMonitor()
    history = fit(model, monitor)
    assert history["dropped_fraction"] == about([(3 + 2) / 8])
    assert monitor.history["val_moe_dropped_fraction"] == [0.0]
    assert history["load_imbalance"] == about([2.0]), "counted before any drop"
    assert evaluated(model, ExpertMonitor())["dropped_fraction"] == 0


def test_only_evaluations_with_the_monitor_count():
    layer = routed()
    model = model_of(layer)
    model.evaluate(VALIDATION, VALIDATION, verbose=0)
    layer(one_hot(3, 3, 3, 3), training=True)
    assert usage(fit(model)) == about(BOTH), "of what came before the first epoch nothing is left"
    usual, own_step = model.test_function, functools.partial(model.test_step)
    model.test_step = own_step
    assert evaluated(model, ExpertMonitor()) == about(EVEN)
    assert (model.test_function, model.test_step) == (usual, own_step)
    layer(one_hot(3), training=True)
    before = array(layer.expert_counts)
    model.predict(VALIDATION, verbose=0)
    assert evaluated(model) == {}
    np.testing.assert_array_equal(array(layer.expert_counts), before)


def evaluates(model, *callbacks):
    """A callback that evaluates at the end of each epoch."""
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: evaluated(model, *callbacks))


def test_monitors_do_not_change_what_others_report():
    model, monitor, other = model_of(routed()), ExpertMonitor(), ExpertMonitor()
    assert usage(fit(model, monitor, other, epochs=2)) == about(BOTH)
    assert monitor.history == other.history
    evaluations = evaluates(model), evaluates(model, other)
    for callbacks in ([monitor, *evaluations], [*evaluations, monitor]):
        assert usage(fit(model, *callbacks, epochs=2)) == about(BOTH)
        logs = usage(fit(model, *callbacks, validation=False))
        assert logs == about({"load_imbalance": 2.0, "dead_experts": 2})


@pytest.mark.backends("torch")
def test_a_monitor_is_in_one_call_at_a_time():
    model, monitor = model_of(routed()), ExpertMonitor()
    with pytest.raises(ValueError, match="in one call at a time"):
        fit(model, evaluates(model, monitor), monitor, validation=False)
    with pytest.raises(ValueError, match="once in its `callbacks`"):
        fit(model, monitor, monitor)
    # What was interrupted is over.
    assert usage(fit(model, monitor, evaluates(model, monitor), epochs=2)) == about(BOTH)


def test_two_layers_of_one_name_inside_other_models_have_logs_of_their_own():
    inputs = keras.Input((E,))
    first = keras.Sequential([inputs, routed()], name="first")
    second = keras.Model(inputs, routed()(inputs), name="second")
    forget = keras.layers.Rescaling(0.0)  # equal scores: every token goes to the first expert
    logs = usage(fit(model_of(first, forget, second), ExpertMonitor(per_layer=True)))
    alone = {"load_imbalance": 3, "load_entropy": 0, "dead_experts": 3, "dropped_fraction": 0}
    alone["router_entropy"] = 1
    expected = {**named(SKEWED, "first_moe"), **named(BALANCED, "val_first_moe")}
    expected |= {"load_imbalance": 3, "dead_experts": 2 + 3, "val_load_imbalance": 3}
    # A functional model calls its layers before it has a name.
    expected |= {**named(alone, "moe"), **named(alone, "val_moe")}
    assert logs == about(expected)


def interrupted(run, model, place, **options):
    """Break a run off at the end of a batch or an epoch."""
    stops = keras.callbacks.LambdaCallback(**{place: lambda *_, **__: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        run(model, ExpertMonitor(), stops, **options)
    # On JAX Keras leaves a model without its variables there, whatever its layers.
    getattr(model, "jax_state_sync", lambda: None)()


def test_a_run_with_a_monitor_ends_an_evaluation_that_was_interrupted():
    model = model_of(routed())
    layer = model.layers[0]
    interrupted(evaluated, model, "on_test_batch_end", batch_size=2)
    assert evaluated(model, ExpertMonitor()) == about(EVEN)
    before = layer.read_counts(evaluation=True)
    model.predict(VALIDATION, verbose=0)
    assert evaluated(model) == {}
    assert not layer.read_counts(evaluation=True).since(before).assignments.any()
    assert not array(layer.expert_counts).any()
    assert usage(fit(model, epochs=2)) == about(BOTH)


@on_each_backend
@pytest.mark.parametrize("validation", [True, False])
def test_nothing_counts_after_a_training_that_was_interrupted(validation):
    model = model_of(routed())
    interrupted(fit, model, "on_epoch_end", validation=validation)
    before = model.layers[0].read_counts(evaluation=True)
    model.predict(VALIDATION, verbose=0)
    counted = model.layers[0].read_counts(evaluation=True).since(before)
    assert not counted.assignments.any()


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (keras.optimizers.schedules.CosineDecay(0.5, decay_steps=2), 0.25),
        (lambda epoch: np.float32(0.5) / (epoch + 1), 0.25),
        (lambda epoch: keras.ops.array(0.1 if epoch < 1 else 0.3), 0.3),
    ],
)
def test_a_schedule_of_the_epoch_sets_the_weight(schedule, expected):
    layer = moe(router_losses=["router_z", losses.LoadBalance(0.1)])
    callback = RouterLossSchedule(schedule)
    callback.set_model(model_of(layer))
    callback.on_train_begin()
    for epoch, weight in ((0, None), (1, expected), (1, expected)):
        callback.on_epoch_begin(epoch)
        assert weight is None or layer.loss_weights_in_force == about([1e-3, weight])
