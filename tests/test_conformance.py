"""Every exported class keeps the same promises: see `layer_checks.py` for the cases."""

import doctest
import importlib
import inspect
import pkgutil
import re

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    QUICK_JIT,
    assert_close,
    on_one_backend,
    saved_and_loaded,
    unless_compiled,
)
from layer_checks import (
    ABSTRACT,
    CASES,
    LENGTH,
    OF_LAYERS,
    POLICIES,
    D,
    E,
    array,
    configured,
    constructor_arguments,
    every_output,
    exported_classes,
    held_by_models,
    holding_model,
    learning_model,
    moe,
    normal,
    plain,
    through_json,
    with_config,
)

import keras_moe
from keras_moe import layers, routers, surgery
from keras_moe._internal.keras_internals import get_keras_mask
from keras_moe.inspection import moe_layers, record_routings, replay_routings

OF_KERAS = (keras.Layer, keras.losses.Loss)
LAYERS = [cls for cls in CASES if issubclass(cls, keras.Layer)]
BLOCKS = [layers.TransformerDecoderBlock, layers.TransformerEncoderBlock]
MIXTURES = [layers.MixtureOfExperts, layers.MultiGateMixtureOfExperts]
FILES = [
    info.name
    for info in pkgutil.walk_packages(keras_moe.__path__, "keras_moe.")
    if not info.name.startswith("keras_moe.backend.")
]


def by_name(classes):
    return pytest.mark.parametrize("cls", classes, ids=lambda cls: cls.__name__)


@on_one_backend
def test_every_exported_class_has_a_case():
    assert {*exported_classes()} == {*CASES, *ABSTRACT}


@on_one_backend
@by_name(CASES)
def test_a_case_sets_every_constructor_argument(cls):
    given = {*CASES[cls].required(), *CASES[cls].options()}
    assert given >= set(constructor_arguments(cls)), "layer_checks.py leaves arguments out"


@on_one_backend
@by_name(with_config())
def test_every_argument_stands_in_the_config_with_its_value(cls):
    default, config = plain(cls).get_config(), configured(cls).get_config()
    assert set(constructor_arguments(cls)) <= set(config)
    same = [name for name in CASES[cls].options() if config[name] == default[name]]
    assert not same, "the config does not follow these arguments"


@on_one_backend
@by_name(LAYERS)
def test_arguments_of_keras_layers_are_handed_on(cls):
    kwargs = {"name": "mine", "trainable": False}
    if not issubclass(cls, routers.Router):
        kwargs["dtype"] = "mixed_bfloat16"
    layer = cls.from_config(through_json(plain(cls, **kwargs).get_config()))
    assert layer.name == "mine"
    assert not any(part.trainable for part in layer._flatten_layers())
    assert layer.compute_dtype == ("bfloat16" if "dtype" in kwargs else "float32")


@by_name(held_by_models())
def test_an_argument_that_compiled_functions_have_read_cannot_be_set(cls):
    instance = configured(cls)
    holding_model(cls, instance)
    changeable = getattr(cls, "changeable_arguments", ())
    for name in set(constructor_arguments(cls)).difference(changeable):
        with pytest.raises(AttributeError, match=f"`{name}`.*cannot be set later"):
            setattr(instance, name, getattr(instance, name))


@on_one_backend
@by_name(with_config())
def test_it_is_registered_and_survives_json(cls):
    assert keras.saving.get_registered_name(cls) == f"keras_moe>{cls.__name__}"
    instance = configured(cls)
    serialized = keras.saving.serialize_keras_object(instance)
    again = keras.saving.deserialize_keras_object(through_json(serialized))
    assert type(again) is cls
    assert again.get_config() == instance.get_config() == through_json(again.get_config())
    assert keras.saving.serialize_keras_object(again) == serialized


@on_one_backend
@by_name([cls for cls in with_config() if not issubclass(cls, OF_KERAS)])
def test_it_is_shown_as_the_call_that_makes_it(cls):
    shown = repr(configured(cls))
    assert repr(eval(shown, {cls.__name__: cls})) == shown
    assert all(f"{name}={value!r}" in shown for name, value in CASES[cls].options().items())


@on_one_backend  # `test_resuming.py` has all of them, on each backend
@by_name(held_by_models())
def test_a_model_that_holds_it_is_saved_and_loaded(cls, tmp_path):
    model = holding_model(cls, configured(cls))
    again = saved_and_loaded(model, tmp_path)
    x = normal(2, 5, D)
    np.testing.assert_array_equal(array(again(x)), array(model(x)))
    if type(model.layers[-1]).__module__.startswith("keras_moe"):  # a layer of ours
        assert [each.path for each in again.weights] == [each.path for each in model.weights]
    assert through_json(again.get_config()) == through_json(model.get_config())


def documentation(cls):
    """A docstring, and those of the classes that it refers to."""
    text = inspect.getdoc(cls)
    for referred in re.findall(r"as (?:for|in)\s+`(\w+)`", text):
        text += documentation(next(c for c in [*CASES, *ABSTRACT] if c.__name__ == referred))
    return text


@on_one_backend
@by_name(CASES)
def test_a_docstring_says_what_goes_in_what_comes_out_and_what_goes_wrong(cls):
    text = documentation(cls)
    assert "Args:" in text and ">>> " in text
    documented = set(re.findall(r"^    (\w+): ", text, re.MULTILINE))
    assert documented >= set(constructor_arguments(cls))
    assert "Raises:" in text
    if issubclass(cls, keras.Layer):
        assert re.search(r"Call arguments:\n    \w+: \([\w, .]+\) ", text), "shapes of the call"
        assert "Returns:" in text or "Output shape:" in text


class AnyBackend(doctest.OutputChecker):
    """Reads the shapes of PyTorch as tuples."""

    def check_output(self, want, got, optionflags):
        got = re.sub(r"torch\.Size\(\[(.*?)\]\)", r"(\1)", got)
        return super().check_output(want, got, optionflags)


@on_one_backend  # the others compile them
@pytest.mark.parametrize("module", FILES)
def test_the_examples_in_the_docstrings_run(module):
    module = importlib.import_module(module)
    runner = doctest.DocTestRunner(AnyBackend(), optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    names = {"keras": keras, "keras_moe": keras_moe}
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    return keras.config.dtype_policy()


@pytest.mark.parametrize("policy", unless_compiled(POLICIES, ["mixed_float16"]), indirect=True)
@by_name(unless_compiled(LAYERS, OF_LAYERS))  # `test_routers.py` traces every router
def test_symbolic_and_eager_calls_have_the_shape_and_dtype_of_the_policy(cls, policy):
    layer = CASES[cls].layer(plain(cls))
    symbolic = layer(keras.Input((3, D), batch_size=2))
    eager = layer(normal(2, 3, D))
    assert symbolic.dtype == keras.backend.standardize_dtype(eager.dtype) == policy.compute_dtype
    assert symbolic.shape == tuple(eager.shape) == layer.compute_output_shape((2, 3, D))
    assert layer.compute_output_shape((None, None, D)) == (None, None, D)
    assert np.isfinite(array(eager)).all()
    for weight in layer.weights:
        if keras.backend.is_int_dtype(weight.dtype):
            continue  # a table or a number of steps
        kept = re.search("router|count|value_totals", weight.path)
        assert weight.dtype == ("float32" if kept else policy.variable_dtype), weight.path


@by_name(unless_compiled(LAYERS, [layers.MixtureOfExperts, layers.TransformerDecoderBlock]))
def test_padding_of_any_content_changes_no_real_token_and_its_mask_goes_on(cls):
    layer = CASES[cls].layer(plain(cls))
    x = normal(2, 5, D)
    mask = np.arange(5) < np.array([[5], [3]])
    poisoned = np.where(mask[..., None], x, np.nan)
    clean, outputs = array(layer(x, mask=mask)), array(layer(poisoned, mask=mask))
    np.testing.assert_allclose(outputs[mask], clean[mask], rtol=1e-6, atol=1e-6)
    assert np.isfinite(outputs).all()
    np.testing.assert_allclose(array(layer(x[1:, :3])), outputs[1:, :3], rtol=1e-5, atol=1e-5)
    masked = keras.layers.Masking()(np.where(mask[..., None], x, 0.0))
    for name, output in every_output(layer, masked).items():
        kept = array(get_keras_mask(output))
        assert kept.shape == output.shape[:-1], name
        real = np.repeat(mask, kept.size // mask.size)
        np.testing.assert_array_equal(kept.reshape(-1), real, err_msg=name)
        if name != "indices":
            loss = keras.losses.MeanSquaredError()(keras.ops.zeros_like(output), output)
            np.testing.assert_allclose(array(loss), np.mean(array(output)[kept] ** 2), rtol=1e-5)


IDS = np.random.default_rng(0).integers(1, 20, (8, LENGTH))


@on_one_backend
@by_name([cls for cls in OF_LAYERS if cls not in BLOCKS])  # Their feed-forward layers keep theirs.
def test_a_dtype_reaches_every_part(cls):
    parts = configured(cls, dtype="mixed_bfloat16")._flatten_layers()
    policies = [(part.name, part.dtype_policy.name) for part in parts if type(part) in OF_LAYERS]
    assert {policy for _, policy in policies} == {"mixed_bfloat16"}, policies


def fitted(model, ids, batch_size, accumulated=None, **kwargs):
    """The loss of an epoch, and all values of the model after it."""
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulated)
    model.compile(optimizer, "mse", jit_compile=QUICK_JIT, **kwargs)
    targets = {name: normal(len(ids), *v.shape[1:]) for name, v in model.output.items()}
    fit = model.fit(ids, targets, batch_size=batch_size, shuffle=False, verbose=0)
    return fit.history["loss"], [array(variable) for variable in model.variables]


MODES = {layers.MixtureOfExperts: "list_of_layers", layers.TransformerEncoderBlock: "larger_than"}


@by_name(unless_compiled(OF_LAYERS, [layers.MixtureOfExperts]))
def test_recomputation_changes_nothing_and_frozen_weights_stay(cls):
    """Losses, weights, counters, selection biases and the states of random draws."""
    results = []
    for mode in (None, MODES.get(cls, "full")):
        keras.utils.set_random_seed(3)
        with keras.RematScope(mode, output_size_threshold=10, layer_names=["recomputed"]):
            instance = configured(cls, name="recomputed")
        model = learning_model(cls, instance)
        frozen = model.trainable_variables[1::2]
        before = [array(weight) for weight in frozen]
        for weight in frozen:
            weight.trainable = False
        results.append(fitted(model, np.where(IDS > 15, 0, IDS), batch_size=4))
        assert all((array(weight) == value).all() for weight, value in zip(frozen, before))
    (loss, values), (loss_again, values_again) = results
    assert_close(loss_again, loss)
    for again, value in zip(values_again, values, strict=True):
        assert_close(again, value, scale=1.0)


@by_name(unless_compiled(OF_LAYERS, MIXTURES[:1]))
def test_two_accumulated_steps_in_one_execution_are_one_step_on_both_batches(cls):
    in_one = {} if BACKEND == "torch" else {"steps_per_execution": 2}  # Keras refuses it there.
    results = []
    for arguments in ({"batch_size": 8}, {"batch_size": 4, "accumulated": 2, **in_one}):
        keras.utils.set_random_seed(3)
        model = learning_model(cls, plain(cls))
        before = [array(weight) for weight in model.trainable_variables]
        for layer in moe_layers(model).values():  # Router losses are no mean over the batch.
            for index in range(len(layer.router_losses)):
                layer.set_router_loss_weight(index, 0)
        fitted(model, IDS, **arguments)
        counts = [array(layer.expert_counts) for layer in moe_layers(model).values()]
        results.append([*map(array, model.trainable_variables), *counts])
        assert all((new != old).any() for new, old in zip(results[-1], before))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@on_one_backend
@by_name(held_by_models())
def test_surgery_is_done_or_refused_before_anything_changes(cls, tmp_path):
    model, x = holding_model(cls, plain(cls)), normal(2, LENGTH, D)
    for weight in model.trainable_variables[::2]:
        weight.trainable = False
    trainable = {weight.path: weight.trainable for weight in model.weights}
    before = array(model(x))
    try:
        surgery.prune_experts(model, keep=0.5, data=[x])
    except ValueError:
        np.testing.assert_array_equal(array(model(x)), before)
    assert {weight.path: weight.trainable for weight in model.weights} == trainable
    again = saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(array(again(x)), array(model(x)))


@on_one_backend
@by_name(OF_LAYERS)
def test_recorded_choices_are_replayed(cls):
    model, x = holding_model(cls, configured(cls)), normal(2, LENGTH, D)
    before = array(model(x))
    recorded = {name: calls[0] for name, calls in record_routings(model, [x]).items()}
    with replay_routings(model, recorded):
        assert_close(array(model(x)), before)
        for layer in moe_layers(model).values():
            layer.router.kernel.assign(-array(layer.router.kernel))
        again = record_routings(model, [x])
    for name, routing in recorded.items():
        np.testing.assert_array_equal(again[name][0].indices, routing.indices)


ROUTERS = [each for each in CASES if issubclass(each, routers.Router)]


@on_one_backend
def test_dir_shows_what_is_public():
    assert dir(keras_moe) == sorted([*keras_moe.__all__, "tuner", "visualization", "__version__"])
    for name in dir(keras_moe):
        part = getattr(keras_moe, name)
        assert part is not None
        if inspect.ismodule(part):
            assert dir(part) == sorted({*part.__all__}) == sorted(part.__all__), name
            assert all(hasattr(part, name) for name in part.__all__), name


def public_functions():
    """Functions, and constructors and documented methods of classes."""
    parts = [getattr(keras_moe, name) for name in dir(keras_moe)]
    names = [(part, name) for part in parts for name in getattr(part, "__all__", ())]
    for each in [*parts, *(getattr(part, name) for part, name in names)]:
        if not inspect.isclass(each):
            yield inspect.unwrap(each) if callable(each) else None
            continue
        for cls in each.__mro__:
            for name, member in vars(cls).items() if "keras_moe" in cls.__module__ else ():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                if name in ("__init__", "call") or not name.startswith("_") and member.__doc__:
                    yield inspect.unwrap(member)


@on_one_backend
def test_public_parameters_and_returns_have_types():
    functions = {each for each in public_functions() if inspect.isfunction(each)}
    assert len(functions) > 150
    for function in functions:
        names = {*inspect.signature(function).parameters, "return"} - {"self", "cls"}
        untyped = names - function.__annotations__.keys()
        assert untyped == ({"return"} if function.__name__ == "__init__" else set()), function


@on_one_backend
@pytest.mark.parametrize("with_options", [True, False])
@pytest.mark.parametrize("router_class", ROUTERS)
def test_a_router_takes_the_number_of_experts_of_its_layer(router_class, with_options):
    case = CASES[router_class]
    arguments = {**case.required(), **(case.options() if with_options else {})}
    router = router_class(**{**arguments, "num_experts": None})
    config = router.get_config()
    assert config["num_experts"] is None
    router.bind(E)
    router.bind(9)
    expected = router_class.from_config({**config, "num_experts": E})
    ours, theirs = ({**each.get_config(), "name": None} for each in (router, expected))
    assert ours == theirs
    assert (router.top_k, router.max_top_k) == (expected.top_k, expected.max_top_k)


class Tempered(routers.TopKRouter):
    def __init__(self, temperature, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature


@on_one_backend
@pytest.mark.parametrize(
    "router", [routers.TopKRouter(top_k=1, balancer="loss_free"), Tempered(0.5, top_k=1)]
)
def test_the_router_of_a_layer_is_the_one_it_was_given(router):
    router.trainable = router.updates_selection_bias = False
    layer = moe(router=router)
    assert layer.router is router and router.num_experts == E
    assert not router.trainable and not router.updates_selection_bias
    assert layer(normal(3, D)).shape == (3, D)
