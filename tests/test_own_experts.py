"""Networks of experts, also those that users write: equal to a formula, with all banks have."""

import itertools

import keras
import numpy as np
import pytest
from backends import (
    FAST_MODE,
    PLACES,
    assert_close,
    by_place,
    compiled,
    differentiated,
    on_one_backend,
    saved_and_loaded,
    to_numpy,
    to_tensors,
)
from keras import ops
from layer_checks import gradients, normal
from test_second_derivatives import along, derivatives, stateless

from keras_moe import inspection, layers, surgery
from keras_moe.ops import any_derivative

T, D, H, E = 9, 6, 5, 3


@keras.saving.register_keras_serializable("tests")
class DeepExperts(layers.StackedExperts):
    """Three layers deep."""

    def widths(self, features):
        return {"first": (features, H), "second": (H, 7), "third": (7, features)}

    def network(self, rows, linear):
        hidden = self.activation(linear("first", rows))
        return linear("third", self.activation(linear("second", hidden)))


@keras.saving.register_keras_serializable("tests")
class NormalisedExperts(layers.StackedExperts):
    """Normalised inside, with a learned scale, and dropped out."""

    def __init__(self, num_experts, rate=0.0, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.rate = rate

    def widths(self, features):
        return {"up": (features, 32), "scale": (32,), "down": (32, features)}

    def network(self, rows, linear):
        hidden = linear("up", rows)
        square = ops.mean(ops.square(hidden), axis=-1, keepdims=True)
        hidden = self.activation(hidden * ops.rsqrt(square + 1e-3) * linear("scale"))
        return linear("down", linear.dropout(hidden, self.rate))

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable("tests")
class BranchedExperts(layers.StackedExperts):
    """A residual and two branches, of which one is a product; its end is no linear map."""

    def widths(self, features):
        pair = (features, H)
        return {"left": pair, "right": pair, "join": (H, features), "short": (features, features)}

    def network(self, rows, linear):
        hidden = self.activation(linear("left", rows)) * linear("right", rows)
        return rows + linear("join", hidden) + self.activation(linear("short", rows))


BANKS = {
    "deep": lambda: DeepExperts(E, "tanh"),
    "normalised": lambda: NormalisedExperts(E, activation="tanh", use_bias=False),
    "branched": lambda: BranchedExperts(E, "tanh"),
    "gated": lambda: layers.GatedExperts(E, H, "tanh", use_bias=True, clip=0.5, up_shift=1.0),
    "linear": lambda: layers.LinearExperts(E, D),
}
OWN_BANKS = [BANKS[name] for name in ("deep", "normalised", "branched")]


class ScaledFirst(layers.StackedExperts):
    """A bank whose first map does not get the rows themselves."""

    def widths(self, features):
        return {"scale": (features,), "up": (features, features)}

    def network(self, rows, linear):
        return linear("up", rows * linear("scale"))


@on_one_backend
def test_all_experts_compute_all_tokens_in_a_network_that_changes_its_rows_first():
    bank, x = ScaledFirst(E), ops.convert_to_tensor(normal(T, D))
    bank.build((None, D))
    for expert, outputs in enumerate(ops.unstack(bank.compute_all(x), axis=1)):
        kernel, bias = bank.up_kernel[expert], bank.up_bias[expert]
        expected = ops.matmul(x * bank.scale[expert], kernel) + bias
        assert_close(to_numpy(outputs), to_numpy(expected))


class GatedBySum(layers.StackedExperts):
    """A bank whose products get an expanded gradient, of a sum."""

    def widths(self, features):
        return {"up": (features, 8)}

    def network(self, rows, linear):
        return rows * ops.sum(linear("up", rows), axis=1, keepdims=True)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("use_bias", [False, True])
def test_products_take_expanded_gradients(use_bias):
    layer = layers.MixtureOfExperts(GatedBySum(E, use_bias=use_bias), router_losses=())
    layer.build((None, 8))
    x = normal(T, 8)
    ours = gradients(layer, x, training=True)
    with any_derivative():
        plain = gradients(layer, x, training=True)
    for name, expected in plain.items():
        assert_close(ours[name], expected)


class Ends(layers.StackedExperts):
    """A bank whose network ends in a function of its last map's outputs, or of its inputs."""

    def __init__(self, num_experts, end, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.end = end

    def widths(self, features):
        return {"up": (features, features), "down": (features, features)}

    def network(self, rows, linear):
        return self.end(linear, ops.tanh(linear("up", rows)), rows)


def dropped(linear, hidden, rows):
    return linear.dropout(linear("down", hidden), 0.5)


def of_constants(linear, hidden, rows):
    return linear("down", ops.floor(4 * hidden))


def standardised(linear, hidden, rows):
    """Without a derivative where all numbers of a row are equal."""
    outputs = linear("down", hidden)
    return outputs / ops.std(outputs, axis=-1, keepdims=True)


@pytest.mark.parametrize("end", [dropped, of_constants, standardised])
def test_gradients_are_right_whatever_a_network_ends_in(end):
    model = keras.Sequential([keras.Input((D,)), mixture_of(Ends(E, end))])
    ours = gradients(model, normal(T, D), training=True)
    with any_derivative():
        plain = gradients(model, normal(T, D), training=True)
    for name, expected in plain.items():  # None if there is none
        assert_close(ours[name], np.zeros_like(ours[name]) if expected is None else expected)


@pytest.mark.backends("torch")
def test_what_linear_returns_is_not_written_into():
    def residual(linear, hidden, rows):
        outputs = linear("down", hidden)
        outputs += rows
        return outputs

    with pytest.raises(ValueError, match="must not write into what `linear` returns"):
        mixture_of(Ends(E, residual))(ops.ones((2, D)))


@pytest.mark.backends("torch")
def test_the_first_call_of_a_network_may_be_in_inference_mode():
    import torch

    def scaled(linear, hidden, rows):
        return 2 * linear("down", hidden)

    with torch.inference_mode():
        outputs = layers.MixtureOfExperts(Ends(E, scaled))(ops.ones((2, D)))
    assert outputs.shape == (2, D)


def mixture_of(bank, router="top_k"):
    keras.utils.set_random_seed(0)
    layer = layers.MixtureOfExperts(bank, router, ())
    layer.build((None, D))
    return layer


def values_of(layer):
    """Drawn tokens, and values of trainable weights that are not those of their initializers."""
    weights = [to_numpy(weight.value) for weight in layer.trainable_variables]
    moved = [x + 0.3 * normal(*x.shape, seed=number) for number, x in enumerate(weights)]
    return [normal(T, D, seed=99), *moved]


def one_expert(bank, weights, expert):
    """The `linear` of one expert: plain products of its weights, by their names."""

    def linear(name, rows=None):
        if rows is None:
            return weights[name][expert]
        outputs = ops.matmul(rows, weights[f"{name}_kernel"][expert])
        if bank.use_bias:
            outputs = outputs + weights[f"{name}_bias"][expert]
        if bank.lora_enabled:
            low = ops.matmul(rows, weights[f"{name}_lora_a"][expert])
            low = ops.matmul(low, weights[f"{name}_lora_b"][expert])
            outputs = outputs + bank.lora_scale() * low
        return outputs

    linear.dropout = lambda rows, rate: rows
    return linear


def formula(layer):
    """The layer as a function of tokens and trained weights: every expert for every token."""
    bank, kernels = layer.experts, {}
    if bank.quantization_mode is not None or bank.lora_enabled:  # before any factor has moved
        named = [each for each in bank.projections if not each.is_vector]
        kernels = {f"{each.name}_kernel": each.merged_kernel() for each in named}
    names = [variable.path.split("/")[-1] for variable in layer.trainable_variables]

    def call(inputs):
        tokens, weights = inputs[0], {**to_tensors(kernels), **dict(zip(names, inputs[1:]))}
        probs = ops.softmax(ops.matmul(tokens, weights["kernel"]))
        if layer.router.max_top_k < E:
            chosen = ops.sum(ops.one_hot(ops.top_k(probs, 2)[1], E), axis=1)
            probs = probs * chosen / ops.sum(probs * chosen, axis=1, keepdims=True)
        return sum(
            probs[:, e : e + 1] * bank.network(tokens, one_expert(bank, weights, e))
            for e in range(E)
        )

    return call


KINDS = {
    "plain": lambda bank: None,
    "low rank": lambda bank: bank.enable_lora(2, lora_alpha=3),
    "int8": lambda bank: bank.quantize("int8"),
}
FEW = [("normalised", "int8"), ("gated", "low rank"), ("branched", "plain")]


@by_place(list(itertools.product(BANKS, KINDS)), FEW)
def test_outputs_and_gradients_equal_a_formula(place, case):
    bank, kind = case
    layer = mixture_of(BANKS[bank]())
    KINDS[kind](layer.experts)
    inputs = values_of(layer)
    names = ["inputs", *(weight.name for weight in layer.trainable_variables)]
    assert any("lora" in name for name in names) == (kind == "low rank")
    ours, theirs = (results(each, inputs, place[1]) for each in (stateless(layer), formula(layer)))
    for name, actual, expected in zip(["outputs", *names], ours, theirs, strict=True):
        assert np.any(expected), name
        assert_close(actual, expected, tolerance=1e-4 if kind == "int8" else 1e-5)


def loss_of(outputs, inputs):
    return ops.sum(ops.sin(outputs) * ops.cos(inputs[0]))


def results(call, inputs, mode):
    """Outputs, and gradients of a loss of them."""

    def loss(inputs):
        outputs = call(inputs)
        return loss_of(outputs, inputs), outputs

    _, outputs, gradients = differentiated(loss, mode)(inputs)
    return [outputs, *gradients]


def second_derivatives(call, inputs, mode=FAST_MODE):
    """The products of all second derivatives of a loss with the cosines of the inputs."""

    def function(inputs, ways):
        with any_derivative():
            return along(lambda inputs: loss_of(call(inputs), inputs), ways)(inputs)

    return compiled(function, mode)(inputs, [np.cos(each) for each in inputs])


SECOND = [*((name, "top_k") for name in BANKS), ("gated", "dense")]


@on_one_backend
@pytest.mark.parametrize("bank, router", SECOND)
def test_second_derivatives_equal_a_formula(bank, router, mode, small_tiles):
    layer = mixture_of(BANKS[bank](), router)
    inputs = values_of(layer)
    actual = second_derivatives(stateless(layer), inputs, mode)
    for one, other in zip(actual, second_derivatives(formula(layer), inputs)):
        assert np.any(other)
        assert_close(one, other, tolerance=1e-4)


@on_one_backend
@pytest.mark.parametrize("name", ["gated", "linear"])
def test_all_experts_have_their_corrections_of_low_rank(name):
    bank, tokens = mixture_of(BANKS[name]()).experts, ops.convert_to_tensor(normal(T, D))
    bank.enable_lora(2, lora_alpha=6, b_initializer="normal")
    expected = super(layers.StackedExperts, bank).compute_all(tokens)  # by a plan
    assert_close(to_numpy(bank.compute_all(tokens)), to_numpy(expected))


def dropping():
    return mixture_of(NormalisedExperts(E, rate=0.4, activation="tanh"))


@pytest.mark.parametrize("place", sorted({PLACES[0], PLACES[-1]}), indirect=True, ids="-".join)
def test_dropout_is_the_same_in_both_passes_and_in_second_derivatives(place):
    layer, mode, step = dropping(), place[1], 1e-3
    inputs, trained = values_of(layer), stateless(layer)

    def call(inputs):
        return trained(inputs, training=True)  # from one state of the draws

    def loss(inputs):
        return loss_of(call(inputs), inputs)

    def moved(sign):
        return [each + sign * step * np.cos(each) for each in inputs]

    both = compiled(lambda inputs: [loss(inputs), derivatives(loss, inputs)], mode)
    here, ahead, behind = (both(moved(sign)) for sign in (0, 1, -1))
    slope = sum(np.sum(gradient * np.cos(each)) for gradient, each in zip(here[1], inputs))
    assert_close(slope, (ahead[0] - behind[0]) / (2 * step), tolerance=1e-3)
    second = second_derivatives(call, inputs, mode)
    for actual, high, low in zip(second, ahead[1], behind[1]):
        assert_close(actual, (high - low) / (2 * step), tolerance=1e-2)


def test_dropout_draws_in_training_only_and_its_draws_are_saved(tmp_path):
    layer, x = dropping(), normal(T, D)
    model = keras.Sequential([keras.Input((D,)), layer])
    still = [to_numpy(model(x)) for _ in range(2)]
    np.testing.assert_array_equal(*still)
    first = to_numpy(model(x, training=True))
    loaded = saved_and_loaded(model, tmp_path)
    np.testing.assert_allclose(to_numpy(loaded(x)), still[0], atol=1e-6)
    second, resumed = (to_numpy(each(x, training=True)) for each in (model, loaded))
    assert np.any(first != second) and np.any(second != still[0])
    np.testing.assert_allclose(resumed, second, atol=1e-6)


@on_one_backend
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_saved_and_loaded(kind, tmp_path):
    inputs = outputs = keras.Input((3, D))
    for make in OWN_BANKS:
        outputs = layers.MixtureOfExperts(make())(outputs)
    model, x = keras.Model(inputs, outputs), normal(2, 3, D)
    for layer in model.layers[1:]:
        KINDS[kind](layer.experts)
    for weight in model.trainable_weights:
        weight.assign_add(0.1 * normal(*weight.shape))
    loaded = saved_and_loaded(model, tmp_path)
    assert_close(to_numpy(loaded(x)), to_numpy(model(x)))


@on_one_backend
@pytest.mark.parametrize("make", OWN_BANKS)
def test_surgery_cuts_experts_and_does_not_merge_them(make):
    layer = mixture_of(make())
    model, x = keras.Sequential([keras.Input((D,)), layer]), normal(T, D)
    with pytest.raises(ValueError, match="hidden features cannot be matched"):
        surgery.merge_experts(model, data=[x])
    kept = [0, 2]
    before = {weight.name: to_numpy(weight)[kept] for weight in layer.experts.weights[:3]}
    surgery.prune_experts(model, by=np.array([2.0, 1.0, 3.0]), keep=2)
    for name, value in before.items():
        np.testing.assert_array_equal(to_numpy(getattr(layer.experts, name)), value)
    assert to_numpy(model(x)).shape == (T, D)


@on_one_backend
def test_tools_know_vectors():
    layer = mixture_of(BANKS["normalised"]())
    model = keras.Sequential([keras.Input((D,)), layer])
    counted = inspection.count_parameters(model)
    layer.experts.quantize("int8")
    assert inspection.count_parameters(model) == counted
