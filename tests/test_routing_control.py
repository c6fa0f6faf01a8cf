"""Replayed routing, and what routers of other kinds promise."""

import keras
import numpy as np
import pytest
import reference_routers as oracle
from backends import (
    FAST_MODE,
    assert_close,
    compiled,
    gradients,
    on_each_backend,
    on_one_backend,
    saved_and_loaded,
    to_numpy,
)
from keras import ops
from layer_checks import D, E, array, model_of, moe, normal

from keras_moe import callbacks, inspection, layers, losses, routers
from keras_moe.ops.matching import balanced_assignment, sinkhorn_plan

pytestmark = on_one_backend

X = normal(3, 5, D)


@on_each_backend
def test_replayed_experts_are_weighed_by_live_scores_with_their_gradient():
    router = routers.TopKRouter(E, 2)
    router.build((None, D))
    tokens = X.reshape(-1, D)
    chosen = np.tile([[3, 1]], (len(tokens), 1)).astype("int32")
    kernel = array(router.kernel)

    def first_weight(kernel):
        with keras.StatelessScope([(router.kernel, kernel)]):
            routing = router(ops.convert_to_tensor(tokens), indices=ops.convert_to_tensor(chosen))
        return ops.sum(routing.weights[:, 0])

    routing = to_numpy(router(tokens, indices=chosen))
    np.testing.assert_array_equal(routing.indices, chosen)
    pair = np.exp(routing.logits[:, [3, 1]])
    assert_close(routing.weights, pair / pair.sum(axis=1, keepdims=True))
    (gradient,) = gradients(first_weight, [kernel])
    assert np.abs(gradient[:, [1, 3]]).max() > 0


def test_replayed_numbers_that_are_no_experts_are_not_served():
    router = routers.TopKRouter(E, 2)
    chosen = ops.convert_to_tensor(np.array([[3, E], [-7, 0], [2, -1]], "int32"))
    routing = to_numpy(router(X[0, :3], indices=chosen))
    np.testing.assert_array_equal(routing.indices, [[3, -1], [-1, 0], [2, -1]])
    assert_close(routing.weights, [[1, 0], [0, 1], [1, 0]])
    assert routing.counts.tolist() == [1, 0, 1, 1]


def test_a_hash_router_takes_another_table_and_saves_it(tmp_path):
    router = routers.HashRouter(E, vocabulary_size=4)
    layer = moe(router=router)
    ids, x = keras.Input((5,), dtype="int32"), keras.Input((5, D))
    model = keras.Model([x, ids], layer(x, token_ids=ids))
    router.table.assign([[3], [3], [1], [0]])
    loaded = saved_and_loaded(model, tmp_path)
    inputs = [X, np.tile([0, 1, 2, 3, 4], (3, 1))]
    np.testing.assert_allclose(array(loaded(inputs)), array(model(inputs)), atol=1e-6)
    (layer,) = inspection.moe_layers(loaded).values()
    assert array(layer.router.table).ravel().tolist() == [3, 3, 1, 0]


@on_each_backend
def test_masks_are_found_in_compiled_calls_with_several_tensors():
    ids = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(10, D, mask_zero=True)(ids)
    hashed = moe(router=routers.HashRouter(E, vocabulary_size=10, top_k=2), router_losses=())
    decoder = layers.TransformerDecoderBlock(2, moe(router_losses=()), cross_attention=True)
    outputs = decoder(hashed(embedded, token_ids=ids), context=embedded)
    model = keras.Model(ids, outputs)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    batch = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
    model.fit(batch, normal(2, 5, D), epochs=1, verbose=0)
    for layer in (hashed, decoder.feedforward):
        assert array(layer.expert_counts).sum() == 5 * 2


def test_gshard_visits_the_second_expert_as_often_as_its_weight_deserves():
    router = routers.GShardRouter(
        2, threshold=0.5, kernel_initializer=keras.initializers.Identity(), seed=3
    )
    # The second of two experts has the weight 0.1: at a threshold of 0.5 it serves one in five.
    logits = np.tile(np.log([[0.9, 0.1]]), (5000, 1)).astype("float32")
    routing = to_numpy(router(logits, training=True))
    visits = routing.indices[:, 1] >= 0
    assert abs(visits.mean() - 0.2) < 0.02
    assert not routing.weights[~visits, 1].any()
    assert routing.counts.tolist() == [5000, visits.sum()]


def test_the_sinkhorn_plan_has_even_rows_and_columns_even_for_huge_logits():
    logits = 200 * np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
    mask = np.arange(12) < 10
    plan = compiled(lambda z, m: sinkhorn_plan(z, m, 500), FAST_MODE)(logits, mask)
    plan = np.exp(plan)
    assert not plan[~mask].any()
    assert_close(plan[mask].sum(axis=1), np.ones(10))
    assert_close(plan.sum(axis=0), np.full(4, 2.5), tolerance=0.15)


@pytest.mark.parametrize("num_real", [0, 1, 7, 16])
def test_balanced_assignment_of_equal_or_broken_scores_is_balanced(num_real):
    mask = np.arange(16) < num_real
    for scores in (np.zeros((16, 4)), np.full((16, 4), np.nan), np.eye(16, 4) * 0 + [9, 0, 0, 0]):
        chosen = compiled(balanced_assignment, FAST_MODE)(scores.astype("float32"), mask)
        counts = np.bincount(chosen[mask], minlength=4)
        assert counts.max(initial=0) <= -(-num_real // 4)


def test_a_soft_mixture_equals_the_oracle_with_padding(slots=2):
    bank = layers.FeedForwardExperts(3, 4, activation="tanh", use_bias=False)
    router = routers.SoftRouter(3, slots=slots)
    layer = layers.MixtureOfExperts(bank, router=router, router_losses=())
    x = normal(2, 6, D)
    mask = np.ones((2, 6), bool)
    mask[1, 4:] = False
    padded = np.where(mask[..., None], x, np.nan).astype("float32")
    layer.build(x.shape)
    router.scale.assign(3.0)
    outputs, routing = layer(padded, mask=mask, return_routing=True)
    up, down, kernel = map(array, (bank.up_kernel, bank.down_kernel, router.kernel))
    experts = [lambda row, e=e: np.tanh(row @ up[e]) @ down[e] for e in range(3)]
    for b in range(2):
        expected = oracle.soft(x[b], kernel, 3.0, experts, slots, mask[b])
        assert_close(array(outputs)[b], expected)
    flat = np.nan_to_num(padded).reshape(-1, D)
    own = router(flat, mask=mask.reshape(-1), sequence_length=6)
    to_slots, back = map(array, router.plan(own, own.indices))
    assert_close(to_slots.sum(axis=1), np.ones((2, 3 * slots)))
    assert_close(back[mask].sum(axis=1), np.ones(mask.sum()))
    assert array(routing.counts).tolist() == [2 * slots] * 3


@pytest.mark.parametrize("steps", [1, 4])
def test_the_strength_of_a_relu_router_follows_its_load_and_does_not_vanish(steps):
    ones, arguments = np.ones((6, D), "float32"), {"max_top_k": 2, "initial_strength": 1e-3}
    router = routers.ReLURouter(E, 2, accumulation_steps=steps, **arguments)
    router.build((None, D))

    def strength_after(sign, trainable=True, **kwargs):
        """The strength after one step of an optimizer."""
        router.trainable = trainable
        router.kernel.assign(sign * np.ones((D, E)))
        for _ in range(steps):
            router(ones, training=True, **kwargs)
        return array(router.strength)

    assert_close(strength_after(1, trainable=False), 1e-3)
    assert_close(strength_after(1), 1.2e-3)  # Its limit hides two of the four that are above zero.
    assert_close(strength_after(1, mask=np.zeros(6, bool)), 1.2e-3)
    for _ in range(3):
        assert_close(strength_after(-1), 1e-3)


def test_experts_without_computation_do_what_they_are_named_for():
    """Experts 0 and 1 compute, then come one of zeros, one that is the identity, and a constant."""
    bank = layers.FeedForwardExperts(2, 4, activation="tanh")
    wide = layers.ZeroComputationExperts(bank, num_zero=1, num_identity=1, num_constant=1)
    layer = layers.MixtureOfExperts(wide, router=routers.TopKRouter(top_k=3, renormalize=False))
    x = normal(20, D)
    layer.build(x.shape)
    wide.constant.assign(np.full((1, D), 3.0))
    wide.mixing_kernel.assign(np.zeros((D, 1, 2)))
    outputs, routing = layer(x, return_routing=True)
    up, down = array(bank.up_kernel), array(bank.down_kernel)
    expected, counts = np.zeros_like(x), np.zeros(5)
    for t, (experts, weights) in enumerate(zip(array(routing.indices), array(routing.weights))):
        for e, weight in zip(experts, weights):
            counts[e] += 1
            made = [np.tanh(x[t] @ up[e]) @ down[e]] if e < 2 else [0, x[t], (x[t] + 3.0) / 2]
            expected[t] += weight * made[max(e - 2, 0)]
    assert_close(array(outputs), expected)
    np.testing.assert_array_equal(array(routing.counts), counts)


@on_each_backend
def test_the_weight_of_a_loss_changes_in_training_and_nothing_is_compiled_again():
    traces = []

    @keras.saving.register_keras_serializable("tests")
    class Traced(losses.LoadBalance):
        def compute(self, routing):
            traces.append(1)
            return super().compute(routing)

    # Another scope is another loss.
    layer = moe(router_losses=[Traced(0.5), "router_z", losses.LoadBalance(0.0, "sequence")])
    layer.set_router_loss_weight(2, 1e-9)
    model = model_of(layer, shape=(5, D), optimizer=keras.optimizers.SGD(0.0))
    schedule = callbacks.RouterLossSchedule(lambda epoch: 0.5 * (epoch + 1))
    first = model.fit(X, X, batch_size=3, epochs=1, callbacks=[schedule], verbose=0)
    seen = len(traces)
    both = model.fit(X, X, batch_size=3, epochs=2, callbacks=[schedule], verbose=0)
    if keras.backend.backend() != "torch":
        assert len(traces) <= seen + (keras.backend.backend() == "jax")
    one, two = both.history["loss"]
    assert_close(one, first.history["loss"][0])
    balance = float(array(losses.LoadBalance(0.5)(layer(X, return_routing=True)[1])))
    assert_close(two - one, balance, tolerance=1e-3)
    assert array(layer.router_loss_weights).tolist() == pytest.approx([1.0, 1e-3, 1e-9])


def test_by_default_sinkhorn_evens_out_a_skewed_load_and_the_scale_of_cosines_is_limited():
    identity = keras.initializers.Identity()
    router = routers.SinkhornRouter(4, kernel_initializer=identity)
    tokens = normal(256, 4) + np.float32([2, 1, 0, 0])
    counts = array(router(tokens, training=True).counts)
    assert counts.max() < 80  # of 64 at balance; after one round 93
    router = routers.CosineRouter(4, projection_dim=4, kernel_initializer=identity)
    router.build((None, 4))
    router.log_scale.assign(99.0)
    assert_close(array(router(np.eye(4, dtype="float32")).logits), 100 * np.eye(4))
