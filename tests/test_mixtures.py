"""Many tasks, whole samples, outputs of single experts, and routers of other features."""

import keras
import numpy as np
import pytest
from backends import (
    MODES,
    assert_close,
    compiled,
    gradients,
    on_one_backend,
    to_numpy,
    unless_compiled,
)
from keras import ops
from layer_checks import D, E, array, model_of, moe, normal
from reference_routers import soft

from keras_moe import inspection, layers, losses, routers
from keras_moe._internal.keras_internals import get_keras_mask

WIDE = keras.initializers.RandomNormal(stddev=1.0, seed=0)
BANKS = {
    "feed-forward": lambda: layers.FeedForwardExperts(E, 16, output_dim=5),
    "gated": lambda: layers.GatedExperts(E, 16, use_bias=True, clip=1.0, output_dim=5),
    "linear": lambda: layers.LinearExperts(E, 5),
    "layers": lambda: layers.LayerExperts([keras.layers.Dense(5, "tanh") for _ in range(E)]),
}
ROUTERS = {
    "dense": lambda: routers.DenseRouter(kernel_initializer=WIDE),
    "top-2": lambda: routers.TopKRouter(top_k=2, kernel_initializer=WIDE),
}
by_router = pytest.mark.parametrize("router", unless_compiled(ROUTERS, ["top-2"]))


@pytest.mark.parametrize("bank", unless_compiled(BANKS, ["gated"]))
@pytest.mark.parametrize("router", unless_compiled([*ROUTERS, "expert choice", "relu"], ["relu"]))
@pytest.mark.parametrize("mode", MODES[-1:])
def test_single_outputs_are_those_of_the_experts_and_sum_to_the_output(bank, router, mode):
    made = {
        **ROUTERS,
        "expert choice": lambda: routers.ExpertChoiceRouter(kernel_initializer=WIDE),
        "relu": lambda: routers.ReLURouter(kernel_initializer=WIDE),
    }
    layer = moe(BANKS[bank](), router=made[router]())
    x, mask = normal(2, 5, D), np.arange(5) < np.array([[5], [3]])
    layer.build(x.shape)

    def call(x, mask):
        arguments = {"mask": mask, "return_routing": True}
        return layer(x, **arguments, return_expert_outputs=True), layer(x, mask=mask)

    (outputs, routing, single), alone = compiled(call, mode)(x, mask)
    assert_close(outputs, alone)
    weights = routing.weights.reshape(*single.shape[:-1], 1)
    assert_close((weights * single).sum(-2), alone)
    indices = routing.indices.reshape(single.shape[:-1])
    every = array(layer.experts.compute_all(ops.convert_to_tensor(x.reshape(-1, D))))
    every = every.reshape(2, 5, E, 5)
    served = (indices >= 0) & mask[..., None]
    expected = np.take_along_axis(every, np.maximum(indices, 0)[..., None], axis=2)
    assert_close(single, np.where(served[..., None], expected, 0.0))


@on_one_backend
def test_single_outputs_of_dropped_assignments_are_zero():
    layer = moe(router=ROUTERS["top-2"](), capacity_factor=0.5)
    outputs, routing, single = layer(
        normal(8, D), training=True, return_routing=True, return_expert_outputs=True
    )
    dropped = (array(single) == 0).all(-1)
    assert dropped.mean() == pytest.approx(float(routing.dropped)) and dropped.any()
    weights = array(routing.weights)[..., None]
    assert_close((weights * array(single)).sum(1), array(outputs))


@on_one_backend
def test_single_outputs_have_gradients_of_a_plain_formula():
    layer = moe(layers.LinearExperts(E, 3), router=ROUTERS["top-2"]())
    x = normal(6, D)
    _, routing = layer(x, return_routing=True)
    indices, kernel = array(routing.indices), array(layer.experts.up_kernel)
    factor = normal(6, 2, 3, seed=1)

    def objective(x):
        return ops.sum(layer(x, return_expert_outputs=True)[1] * ops.convert_to_tensor(factor))

    (gradient,) = gradients(objective, [x])
    assert_close(gradient, np.einsum("tko,tkdo->td", factor, kernel[indices]))


@on_one_backend
def test_a_masked_density_counts_no_padding():
    ids = keras.Input((5,), dtype="int32")
    layer = moe(layers.LinearExperts(E, 1), router=ROUTERS["dense"]())
    embedded = keras.layers.Embedding(9, D, mask_zero=True)(ids)
    _, routing, single = layer(embedded, return_routing=True, return_expert_outputs=True)
    model = keras.Model(ids, losses.pack_mixture(routing, single))
    loss = losses.MixtureNegativeLogLikelihood()
    model.compile("sgd", loss)
    x, y = np.array([[3, 4, 5, 0, 0], [6, 7, 8, 2, 1]]), normal(2, 5, 1)
    expected = array(loss.call(y, model(x)))[x > 0].mean()
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)


@on_one_backend
@pytest.mark.parametrize("name", sorted({*routers.IDENTIFIERS} - {"soft"}))
def test_a_functional_model_returns_what_the_layer_returns(name):
    layer, x = moe(layers.LinearExperts(E, E), router=name), normal(6, D)
    returned = {"return_routing": True, "return_expert_outputs": True}
    inputs = keras.Input((D,))
    outputs, routing, single = layer(inputs, **returned)
    outputs = {"outputs": outputs, "weights": routing.weights, "single": single}
    if name == "dselect_k":
        outputs["selectors"] = routing.details["selectors"]
    of_model, (outputs, routing, single) = keras.Model(inputs, outputs)(x), layer(x, **returned)
    of_layer = {**routing._asdict(), **routing.details, "outputs": outputs, "single": single}
    for name, value in of_model.items():
        np.testing.assert_allclose(array(value), array(of_layer[name]), rtol=1e-5, err_msg=name)


@on_one_backend
def test_a_symbolic_routing_of_a_table_has_the_shapes_of_a_call():
    layer, inputs = moe(router=routers.HashRouter(vocabulary_size=9)), keras.Input((5, D))
    ids = keras.Input((5,), dtype="int32")
    _, routing = layer(inputs, token_ids=ids, return_routing=True)
    model = keras.Model([inputs, ids], {"indices": routing.indices, "probs": routing.probs})
    found = model([normal(2, 5, D), np.ones((2, 5), "int32")])
    assert {name: tuple(each.shape) for name, each in found.items()} == {
        "indices": (10, 1),
        "probs": (10, E),
    }


class UnitExperts(layers.StackedExperts):
    """Experts that have no derivative at zero."""

    def widths(self, features):
        return {"up": (features, 8), "down": (8, features)}

    def network(self, rows, linear):
        hidden = linear("up", rows)
        return linear("down", hidden / ops.norm(hidden, axis=-1, keepdims=True))


@by_router
def test_padding_reaches_no_gradient_of_any_task(router):
    bank = UnitExperts(E, use_bias=False)
    layer = layers.MultiGateMixtureOfExperts(bank, 2, ROUTERS[router]())
    x, mask = normal(2, 5, D), np.arange(5) < [[5], [2]]

    def objective(kernel, x):
        with keras.StatelessScope([(bank.up_kernel, kernel)]):
            return sum(ops.sum(each**2) for each in layer(x, mask=mask))

    layer(x, mask=mask)
    kernel = ops.convert_to_tensor(array(bank.up_kernel))
    dense, of_inputs = gradients(objective, [kernel, x])
    assert np.isfinite(dense).all() and (of_inputs[~mask] == 0).all()


@on_one_backend
def test_gates_of_a_seeded_router_differ():
    router = routers.TopKRouter(seed=0, logit_noise=1.0)
    layer = layers.MultiGateMixtureOfExperts(layers.LinearExperts(E, 2), 2, router)
    layer(normal(4, D))
    first, second = (array(task.router.kernel) for task in layer.tasks)
    assert (first != second).any() and router.seed == 0


def convolutional():
    return keras.Sequential(
        [
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )


@pytest.mark.parametrize("mode", MODES[-1:])
def test_whole_samples_go_to_the_expert_that_is_chosen_for_them(mode):
    router = routers.TopKRouter(top_k=1, kernel_initializer=WIDE)
    bank = layers.LayerExperts([convolutional() for _ in range(3)])
    layer = moe(bank, router=router, token_axes=1, shared_expert=convolutional())
    images = normal(6, 6, 6, 2)
    inputs = keras.Input(images.shape[1:])
    outputs, routing = layer(inputs, return_routing=True)
    model = keras.Model(inputs, [outputs, routing.indices, routing.weights])
    outputs, indices, weights = compiled(model, mode)(images)
    assert outputs.shape == (6, 5) and router.kernel.shape == (72, 3)
    shared = array(layer.shared_expert(images))
    for image, expert, weight, output, rest in zip(images, indices, weights, outputs, shared):
        expected = weight * array(bank.layers[expert[0]](image[None]))[0]
        assert_close(output, expected + rest)


@on_one_backend
@pytest.mark.parametrize("token_axes, length", [(1, 6), (2, 3)])
def test_slots_are_means_of_whole_samples(token_axes, length):
    bank = layers.LayerExperts([keras.layers.Conv1D(4, 3, padding="same") for _ in range(3)])
    layer = moe(bank, router=routers.SoftRouter(slots=2), token_axes=token_axes)
    x = normal(*[(6,), (2, 3)][token_axes - 1], 7, 4)
    outputs = array(layer(x)).reshape(6, 28)
    experts = [
        lambda slot, layer=layer: array(layer(slot.reshape(1, 7, 4).astype("float32"))).ravel()
        for layer in bank.layers
    ]
    for sequence, output in zip(x.reshape(-1, length, 28), outputs.reshape(-1, length, 28)):
        weights = array(layer.router.kernel), array(layer.router.scale)
        assert_close(output, soft(sequence, *weights, experts, 2, np.ones(length, bool)))


def mixture_of(task):
    """A mixture with the router and the bank of a task, which it shares."""
    return layers.MixtureOfExperts(*task.banks, task.router)


@on_one_backend
@by_router
def test_gradients_of_tasks_are_those_of_mixtures(router):
    layer = layers.MultiGateMixtureOfExperts(BANKS["gated"](), 2, ROUTERS[router]())
    x = normal(9, D)
    layer.build(x.shape)
    mixtures = list(map(mixture_of, layer.tasks))
    for mixture in mixtures:
        mixture.build(x.shape)

    def together(x, *weights):
        state = [variable.value for variable in layer.non_trainable_variables]
        outputs, _ = layer.stateless_call(list(weights), state, x)
        return sum(ops.sum(ops.sin((1 + n) * output)) for n, output in enumerate(outputs))

    def apart(x, *weights):
        mapping = list(zip(layer.trainable_variables, weights))
        with keras.StatelessScope(state_mapping=mapping):
            outputs = [mixture(x) for mixture in mixtures]
        return sum(ops.sum(ops.sin((1 + n) * output)) for n, output in enumerate(outputs))

    values = [x, *map(array, layer.trainable_variables)]
    for one, other in zip(gradients(together, values), gradients(apart, values)):
        assert_close(one, other, scale=max(np.abs(other).max(), 1e-3))


@on_one_backend
@by_router
def test_each_expert_computes_a_token_at_most_once(router, monkeypatch):
    rows = []
    bank = layers.LinearExperts(E, 5)
    call, every = type(bank).call, type(bank).compute_all

    def counted(self, tokens, plan, training=None):
        rows.append(int(ops.sum(plan.sizes)))
        return call(self, tokens, plan, training)

    def counted_all(self, tokens, training=None):
        rows.append(E * len(tokens))
        return every(self, tokens, training)

    layer = layers.MultiGateMixtureOfExperts(bank, 3, ROUTERS[router]())
    x = normal(9, D)
    layer(x)
    monkeypatch.setattr(layers.LinearExperts, "call", counted)
    monkeypatch.setattr(layers.LinearExperts, "compute_all", counted_all)
    layer(x)
    chosen = [array(task.router(x).indices) for task in layer.tasks]
    distinct = sum(len(set(row)) for row in np.concatenate(chosen, axis=1).tolist())
    assert rows == [distinct] and distinct <= E * len(x)


@on_one_backend
@by_router
def test_layered_extraction_is_that_of_a_plain_model(router):
    own = [layers.FeedForwardExperts(2, 6) for _ in range(2)]
    layer = layers.MultiGateMixtureOfExperts(
        layers.FeedForwardExperts(3, 6), 2, ROUTERS[router](), own, shared_output=True
    )
    inputs = [normal(5, D, seed=seed) for seed in range(3)]
    outputs = layer([ops.convert_to_tensor(each) for each in inputs])
    shared = array(layer.experts.compute_all(ops.convert_to_tensor(inputs[-1])))
    of_tasks = [array(b.compute_all(ops.convert_to_tensor(x))) for b, x in zip(own, inputs)]
    banks = [[shared, of_tasks[0]], [shared, of_tasks[1]], [shared, *of_tasks]]
    for output, task, seen, bank in zip(outputs, layer.tasks, inputs, banks):
        routing = task.router(seen)
        experts = np.concatenate(bank, axis=1)
        taken = np.take_along_axis(experts, array(routing.indices)[..., None], axis=1)
        assert_close(array(output), (array(routing.weights)[..., None] * taken).sum(1))


@on_one_backend
def test_each_task_has_the_mask_of_its_own_input():
    own = [layers.FeedForwardExperts(1, 6) for _ in range(2)]
    layer = layers.MultiGateMixtureOfExperts(
        layers.FeedForwardExperts(2, 6), 2, task_experts=own, shared_output=True
    )
    masks = [np.arange(4) < np.array([[length], [3]]) for length in (1, 2, 4)]
    inputs = [keras.layers.Masking()(normal(2, 4, D) * mask[..., None]) for mask in masks]
    outputs = layer(inputs)
    for output, mask in zip(outputs, masks, strict=True):
        np.testing.assert_array_equal(array(get_keras_mask(output)), mask)


@on_one_backend
def test_a_gate_may_have_a_hidden_layer_and_a_temperature():
    router = routers.TopKRouter(E, top_k=2, hidden_dim=5, temperature=0.5)
    x = normal(6, D)
    routing = to_numpy(router(x)._asdict())
    kernels = [array(w) for w in (router.hidden_kernel, router.hidden_bias, router.kernel)]
    logits = 2 * np.maximum(x @ kernels[0] + kernels[1], 0) @ kernels[2]
    assert_close(routing["logits"], logits)
    np.testing.assert_array_equal(routing["indices"], np.argsort(-logits, axis=1)[:, :2])


def test_replay_reaches_compiled_functions_and_ends_with_its_context():
    model = model_of(moe(name="a"), optimizer=keras.optimizers.SGD(0.0))
    x, first = normal(4, D), np.tile([[0, 1]], (4, 1))

    def computed():
        history = model.fit(x, x, verbose=0).history["loss"]
        return [model.predict(x, verbose=0), model.evaluate(x, x, verbose=0), *history]

    def replayed(choices):
        return array(model.layers[0](x, indices=choices))

    usual = computed()
    with inspection.replay_routings(model, {"a": first}):
        outputs, mean_square, loss = computed()
        assert_close(outputs, replayed(first))
        assert_close(mean_square, np.mean((outputs - x) ** 2))
        assert loss != usual[2]
        with inspection.replay_routings(model, {"a": first + 2}):
            assert_close(model.predict(x, verbose=0), replayed(first + 2))
        assert_close(model.predict(x, verbose=0), outputs)
    for value, expected in zip(computed(), usual):
        assert_close(value, expected)


@on_one_backend
def test_a_replay_that_is_refused_changes_nothing():
    model = keras.Sequential([keras.Input((D,)), moe(name="a"), moe(name="b")])
    x, choices = normal(4, D), np.tile([[0, 1]], (4, 1))
    before = array(model(x))
    for wrong, rule in (({"b": choices + E}, "from 0 to"), ({"c": choices}, "names of MoE layers")):
        with pytest.raises(ValueError, match=rule):
            with inspection.replay_routings(model, {"a": choices, **wrong}):
                pass
        np.testing.assert_array_equal(array(model(x)), before)
