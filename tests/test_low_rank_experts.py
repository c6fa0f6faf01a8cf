"""Low-rank experts over one frozen base are copies of the base with LoRA."""

import keras
import numpy as np
import pytest
from backends import (
    FAST_MODE,
    assert_close,
    differentiated,
    on_one_backend,
    saved_and_loaded,
    to_numpy,
    unless_compiled,
)
from layer_checks import D, model_of, normal

from keras_moe import inspection, layers, routers

E, H, RANK, T = 4, 6, 2, 12
BASES = {
    "gated": lambda number: layers.GatedExperts(number, H),
    "gated, biased, clipped": lambda number: layers.GatedExperts(
        number, H, use_bias=True, clip=0.5, bias_initializer="normal", output_dim=5
    ),
    "two maps": lambda number: layers.FeedForwardExperts(number, H, bias_initializer="normal"),
    "one map": lambda number: layers.LinearExperts(number, 5, bias_initializer="normal"),
}


def pair(case, router=None, **kwargs):
    """A mixture over one base, and the same one with copies that have LoRA."""
    keras.utils.set_random_seed(0)
    experts = layers.LowRankExperts(BASES[case](1), E, RANK, alpha=3, b_initializer="normal")
    mixtures = [
        layers.MixtureOfExperts(bank, router or routers.TopKRouter(E, seed=1), (), **kwargs)
        for bank in (experts, BASES[case](E))
    ]
    copies = mixtures[1].experts
    for mixture in mixtures:
        mixture.build((None, D))
    copies.enable_lora(RANK, lora_alpha=3)
    for old, new in zip(experts.base.projections, copies.projections):
        new.kernel.assign(np.repeat(to_numpy(old.kernel.value), E, axis=0))
        if old.bias is not None:
            new.bias.assign(np.repeat(to_numpy(old.bias.value), E, axis=0))
            new.bias.trainable = False
        for letter in "ab":
            factor = experts.projection(f"{old.name}_lora_{letter}").kernel
            getattr(new, f"lora_{letter}").assign(factor.value)
    mixtures[1].router.set_weights(mixtures[0].router.get_weights())
    return mixtures


def results(mixture, mode, *inputs, **kwargs):
    """Outputs, and gradients for inputs and trained weights by their names."""
    state = [weight.value for weight in mixture.non_trainable_variables]
    trained = mixture.trainable_variables

    def loss(inputs):
        x, *weights = inputs
        outputs, _ = mixture.stateless_call(weights, state, x, **kwargs)
        ramp = keras.ops.reshape(keras.ops.linspace(0.5, 1.5, T * outputs.shape[-1]), outputs.shape)
        return keras.ops.sum(ramp * outputs**2), outputs

    _, outputs, gradients = differentiated(loss, mode)(
        [*inputs, *(to_numpy(weight.value) for weight in trained)]
    )
    return {"outputs": outputs, **dict(zip(["x", *(w.name for w in trained)], gradients))}


def assert_equal_results(one_base, copies, mode, *inputs, **kwargs):
    found, expected = (results(each, mode, *inputs, **kwargs) for each in (one_base, copies))
    assert found.keys() == expected.keys() and len(found) > 3
    for name in expected:
        assert np.any(expected[name])
        assert_close(found[name], expected[name])


@pytest.mark.parametrize("case", unless_compiled(BASES, ["gated, biased, clipped"]))
def test_equal_to_copies_with_lora(case, mode):
    assert_equal_results(*pair(case), mode, normal(T, D))


@on_one_backend
@pytest.mark.parametrize(
    ("router", "arguments"),
    [
        (routers.TopKRouter(E, 2, seed=1), {"capacity_factor": 0.5}),
        (routers.ExpertChoiceRouter(E, seed=1), {}),
        (routers.DenseRouter(E, seed=1), {}),
    ],
    ids=["capacity", "expert choice", "all experts"],
)
def test_equal_to_copies_with_padding_and_any_plan(router, arguments):
    one_base, copies = pair("gated, biased, clipped", router, **arguments)
    mask = np.arange(T) % 5 > 0
    x = np.where(mask[:, None], normal(T, D), np.nan).astype("float32")
    more = {"mask": mask, "training": True}
    assert_equal_results(one_base, copies, FAST_MODE, np.nan_to_num(x), **more)
    if FAST_MODE == "eager":
        assert_close(to_numpy(one_base(x, **more)), to_numpy(one_base(np.nan_to_num(x), **more)))


@on_one_backend
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_base_is_saved_and_trains_as_its_floats(mode, tmp_path):
    keras.utils.set_random_seed(0)
    base = layers.GatedExperts(1, H, use_bias=True, bias_initializer="normal")
    experts = layers.LowRankExperts(base, E, RANK, b_initializer="normal")
    model = keras.Sequential([keras.Input((D,)), layers.MixtureOfExperts(experts)])
    x, exact = normal(T, D), to_numpy(model(normal(T, D)))
    experts.quantize(mode)
    assert base.quantization_mode == mode and experts.quantization_mode is None
    assert len(model.trainable_weights) == 7  # factors and the router
    near = to_numpy(model(x))
    assert 0 < np.mean((near - exact) ** 2) < 0.05 * np.mean(exact**2)
    assert_close(to_numpy(saved_and_loaded(model, tmp_path)(x)), near)
    floats = layers.MixtureOfExperts(experts.merge(), routers.TopKRouter(E), ())
    floats.build((None, D))
    floats.router.set_weights(model.layers[0].router.get_weights())
    assert_close(to_numpy(floats(x)), near)
    rows = {"x": model.layers[0], "merged": floats}
    of_x = [results(each, FAST_MODE, x)["x"] for each in rows.values()]
    assert_close(*of_x)


@on_one_backend
@pytest.mark.parametrize("case", BASES)
def test_merged_experts_are_banks_of_the_same_outputs(case):
    mixture, _ = pair(case)
    x, experts = normal(T, D), mixture.experts
    of_all = to_numpy(experts.compute_all(keras.ops.convert_to_tensor(x)))
    for chosen in (None, [2], [3, 0]):
        merged = experts.merge(chosen)
        assert type(merged) is type(experts.base) and merged.num_experts == len(chosen or of_all[0])
        outputs = merged.compute_all(keras.ops.convert_to_tensor(x))
        assert_close(to_numpy(outputs), of_all[:, chosen] if chosen else of_all)


@on_one_backend
def test_only_factors_train_and_the_base_stays_frozen():
    mixture, _ = pair("gated")
    mixture.trainable = False
    assert not mixture.trainable_weights
    mixture.trainable = True
    trained = {weight.name for weight in mixture.experts.trainable_weights}
    assert trained == {f"{name}_lora_{x}" for name in ("gate", "up", "down") for x in "ab"}
    base = [to_numpy(weight.value) for weight in mixture.experts.base.weights]
    model = model_of(mixture, optimizer="adam")
    model.fit(normal(T, D), normal(T, D), verbose=0)
    for weight, before in zip(mixture.experts.base.weights, base, strict=True):
        np.testing.assert_array_equal(to_numpy(weight.value), before)
    with pytest.raises(NotImplementedError, match="has factors of low rank"):
        mixture.experts.enable_lora(2)


def base(network, **more_widths):
    """A bank of other linear maps."""
    widths = {"up": (D, D), "down": (D, D), **more_widths}
    methods = {"widths": lambda self, features: widths, "network": network}
    return type("Own", (layers.GatedExperts,), methods)(1, H)


OTHERS = {
    "must have linear maps": lambda _, x, linear: x + linear("down", linear("up", x)),
    "no vectors": lambda _, x, linear: linear("down", linear("up", x) * linear("scale")),
    "'middle'": lambda _, x, linear: linear("down", linear("middle", linear("up", x))),
}


@on_one_backend
@pytest.mark.parametrize("words", OTHERS)
def test_a_base_of_another_form_is_refused(words):
    more = {"no vectors": {"scale": (D,)}, "'middle'": {"middle": (D, D)}}
    experts = layers.LowRankExperts(base(OTHERS[words], **more.get(words, {})), E, RANK)
    with pytest.raises(ValueError, match=words):
        experts.build((None, D))


@on_one_backend
@pytest.mark.parametrize("mode", [None, "int4"])
def test_the_base_works_on_every_token(mode):
    base = layers.GatedExperts(1, 2 * D)
    layer = layers.MixtureOfExperts(layers.LowRankExperts(base, 4, rank=2), name="moe")
    model = keras.Sequential([keras.Input((D,)), layer])
    if mode:
        base.quantize(mode)
    of_base, of_expert = 3 * D * 2 * D, 3 * 2 * (D + 2 * D)
    active = of_base + 2 * of_expert + D * 4
    (row,) = inspection.summarize(model)
    assert (row.parameters, row.active_parameters) == (active + 2 * of_expert, active)
    assert inspection.count_parameters(model)[1] == active
