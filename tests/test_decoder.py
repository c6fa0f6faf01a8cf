"""The decoder block: what it may see, and that decoding with a cache changes nothing."""

import warnings

import keras
import numpy as np
import pytest
from backends import BACKEND, FAST_MODE, compiled, gradients, on_each_backend, on_one_backend
from keras import ops
from layer_checks import POLICIES, D, E, array, moe, normal, one_hot_router

from keras_moe import layers, routers
from keras_moe._internal.keras_internals import get_keras_mask
from keras_moe.layers.transformer_decoder_block import rotate

pytestmark = on_one_backend

B, L, S = 2, 6, 4
BLOCKS = {"plain": {}, "without positions": {"rotary": False}, "context": {"cross_attention": True}}


def dense():
    return keras.Sequential([keras.layers.Dense(16, "gelu"), keras.layers.Dense(D)])


def make_block(feedforward=None, **kwargs):
    block = layers.TransformerDecoderBlock(2, feedforward or moe(), **kwargs)
    block.build((None, None, D), (None, None, D) if block.cross_attention else None)
    return block


def context_of(block):
    return {"context": normal(B, S, D, seed=1)} if block.cross_attention else {}


def decode(block, inputs, cache, lengths, mask=None):
    """Outputs of the block on pieces of the inputs, one after the other."""
    outputs, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        piece_mask = None if mask is None else mask[:, piece]
        output, cache = block(inputs[:, piece], mask=piece_mask, cache=cache, position=start)
        outputs.append(array(output))
        start += length
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("kwargs", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("lengths", [[1] * L, [4, 1, 1], [2, 4]], ids=str)
def test_decoding_with_a_cache_equals_decoding_without(kwargs, lengths):
    block = make_block(**kwargs)
    x, context = normal(B, L, D), context_of(block)
    cache = block.make_cache(B, L + 3, **context)
    outputs = decode(block, x, cache, lengths)
    np.testing.assert_allclose(outputs, array(block(x, **context)), atol=1e-5)


def test_a_cache_holds_the_padding_mask():
    block = make_block(cross_attention=True)
    x, context = normal(B, L, D), normal(B, S, D, seed=1)
    mask = np.array([[True] * L, [False] * 2 + [True] * (L - 2)])
    context_mask = np.arange(S) < np.array([[S], [2]])
    masks = dict(context_mask=context_mask)
    expected = array(block(x, mask=mask, context=context, **masks))
    cache = block.make_cache(
        B, L, context=np.where(context_mask[..., None], context, np.nan), **masks
    )
    outputs = decode(block, np.where(mask[..., None], x, np.nan), cache, [3, 1, 2], mask)
    np.testing.assert_allclose(outputs[mask], expected[mask], atol=1e-5)
    alone = block(x[1:, 2:], context=context[1:, :2])
    np.testing.assert_allclose(expected[1:, 2:], array(alone), atol=1e-5)


@on_each_backend
def test_a_cache_is_carried_through_a_compiled_loop_and_gathered_by_beam():
    block = make_block(cross_attention=True)
    x, context = normal(B, L, D), normal(B, S, D, seed=1)
    beams = np.array([1, 0], "int32")

    def run(x, context, beams):
        def step(position, outputs, cache):
            token = ops.slice(x, [0, position, 0], [B, 1, D])
            output, cache = block(token, cache=cache, position=position)
            outputs = ops.slice_update(outputs, [0, position, 0], output)
            cache = keras.tree.map_structure(lambda rows: ops.take(rows, beams, axis=0), cache)
            return position + 1, outputs, cache

        state = (ops.zeros((), "int32"), ops.zeros_like(x), block.make_cache(B, L, context))
        return ops.while_loop(lambda position, *_: position < L, step, state)[1]

    mode = "xla" if BACKEND == "tensorflow" else FAST_MODE
    outputs = compiled(run, mode)(x, context, beams)
    # Every other token belongs to the other sequence, and so does the context it is given.
    crossed = np.where(np.arange(L)[:, None] % 2 == 0, x[::-1], x)
    expected = array(block(crossed, context=context[::-1]))[:, -1]
    np.testing.assert_allclose(outputs[:, -1], expected, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_has_the_dtype_of_the_policy_and_stays_close(policy):
    block = make_block(dtype=policy)
    cache = block.make_cache(B, L)
    assert keras.backend.standardize_dtype(cache["keys"].dtype) == block.compute_dtype
    x = normal(B, L, D)
    outputs = decode(block, x, cache, [3, 3])
    np.testing.assert_allclose(outputs, array(block(x)), atol=1e-5 if policy == "float32" else 0.1)


def test_padding_of_any_content_has_no_gradient_and_changes_nothing():
    block = make_block(cross_attention=True)
    mask = np.array([[True] * L, [False] * L])
    x = np.where(mask[..., None], normal(B, L, D), np.nan).astype("float32")
    context_mask = np.array([[True] * 3 + [False], [False] * 4])
    context = np.where(context_mask[..., None], normal(B, S, D), np.nan).astype("float32")

    def objective(x, context):
        outputs = block(x, mask=mask, context=context, context_mask=context_mask)
        return ops.sum(ops.where(mask[..., None], outputs, 0.0) ** 2)

    for gradient, real in zip(gradients(objective, [x, context]), (mask, context_mask)):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[~real], 0)
        assert (gradient[0][real[0]] != 0).any(axis=-1).all()


@pytest.mark.parametrize("cross_attention", [False, True])
def test_masks_that_hang_on_the_inputs_are_found(cross_attention):
    block = make_block(cross_attention=cross_attention)
    x = normal(B, L, D)
    x[:, 4:] = 0
    masked = keras.layers.Masking()(x)
    mask = np.arange(L) < np.full((B, 1), 4)
    given = dict(context=x, context_mask=mask) if cross_attention else {}
    hanging = dict(context=masked) if cross_attention else {}
    outputs = block(masked, **hanging)
    np.testing.assert_allclose(array(outputs), array(block(x, mask=mask, **given)), atol=1e-6)
    assert array(get_keras_mask(outputs)).tolist() == mask.tolist()
    if cross_attention:
        cache = block.make_cache(B, L, context=masked)
        assert array(cache["context_mask"]).tolist() == mask.tolist()


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    x, positions = ops.convert_to_tensor(normal(1, 5, 1, 8)), np.arange(5)
    scores = []
    for offset in (0, 7):
        rotated = array(rotate(x, positions + offset))[0, :, 0]
        scores.append(rotated @ rotated.T)
    np.testing.assert_allclose(*scores, atol=1e-5)
    lengths = np.sum(array(x)[0, :, 0] ** 2, axis=-1)
    np.testing.assert_allclose(np.diag(scores[0]), lengths, atol=1e-5)
    # By hand: the slowest of four pairs turns by 10000 ** (-3 / 4) a position.
    one = array(rotate(ops.eye(8)[None, :, None], np.ones(8)))
    np.testing.assert_allclose(one[0, 3, 0, [3, 7]], [np.cos(1e-3), np.sin(1e-3)], atol=1e-7)


def test_a_block_without_positions_forgets_the_order():
    x = normal(1, L, D)
    reordered = x[:, [2, 0, 1, 3, 4, 5]]
    for rotary, same in ((False, True), (True, False)):
        block = make_block(dense(), rotary=rotary)
        last = [array(block(inputs))[0, -1] for inputs in (x, reordered)]
        assert np.allclose(*last, atol=1e-5) == same


class Anticausal(type(one_hot_router())):
    causal = False


@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: keras.Sequential([layer])])
def test_a_router_that_looks_ahead_is_warned_of(wrap):
    with pytest.warns(UserWarning) as warned:
        layers.TransformerDecoderBlock(2, wrap(moe(router=Anticausal(E))))
    (warning,) = warned
    assert "Anticausal chooses the experts of a token by later tokens" in str(warning.message)
    assert warning.filename == __file__


def capacity(priority="position", **kwargs):
    return layers.Capacity(0.5, priority=priority, **kwargs)


CAPACITIES = {  # of top-k routers: the capacity, K, and whether later tokens leak
    "none": (None, 2, False),
    "earlier tokens first": (capacity(), 1, False),
    "in each sequence": (capacity(per_sequence=True), 1, False),
    "second choices": (capacity(), 2, True),
    "the surest first": (capacity("probability"), 1, True),
    "by chance": (capacity("random"), 1, True),
}


@pytest.mark.parametrize("limit, top_k, leaks", CAPACITIES.values(), ids=CAPACITIES)
def test_a_capacity_is_warned_of_where_later_tokens_take_the_room_of_earlier_ones(
    limit, top_k, leaks
):
    router = routers.TopKRouter(E, top_k, kernel_initializer=keras.initializers.Identity())
    layer = moe(router=router, capacity_factor=limit, router_losses=())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers.TransformerDecoderBlock(2, layer)
    assert len(caught) == leaks and all("A capacity" in str(each.message) for each in caught)

    # And so it is: only then what the second half of the tokens is decides about the first.
    layer.build((None, None, D))
    state = [ops.convert_to_tensor(v) for v in layer.non_trainable_variables]
    trainable = [ops.convert_to_tensor(v) for v in layer.trainable_variables]
    run = compiled(lambda x: layer.stateless_call(trainable, state, x, training=True)[0], FAST_MODE)
    early = [
        run(np.concatenate([normal(1, 8, D), scale * normal(1, 8, D, seed=seed)], axis=1))[:, :8]
        for seed, scale in enumerate([0.1, 1.0, 10.0] * 2)
    ]
    assert leaks == any(np.abs(one - early[0]).max() > 1e-4 for one in early)


def test_a_capacity_in_evaluation_is_warned_of():
    limit = layers.Capacity(1.0, evaluation_factor=1.0)
    layer = moe(router=routers.TopKRouter(E, top_k=1), capacity_factor=limit)
    with pytest.warns(UserWarning, match="decoded token by token"):
        layers.TransformerDecoderBlock(2, layer)
