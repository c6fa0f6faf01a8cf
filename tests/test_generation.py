"""Texts written token by token are those of passes over the whole text."""

import concurrent.futures
import functools

import keras
import numpy as np
import pytest
from backends import BACKEND, on_each_backend, on_one_backend, to_numpy

import keras_moe
from keras_moe import layers

# One block is in the model twice.
pytestmark = on_one_backend

V, PROMPTS = 30, [[3, 4, 5, 6], [7], [9, 8]]


class Positions(keras.layers.Layer):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def call(self, inputs):
        length = keras.ops.shape(inputs)[1]
        place = keras.ops.cast(keras.ops.arange(length), "float32")
        of_even = np.resize([1.0, 0.0], inputs.shape[-1]).astype("float32")
        return inputs + self.factor * place[:, None] * keras.ops.convert_to_tensor(of_even)


def model_of(*extra, mask_zero=False, **block):
    keras.utils.set_random_seed(0)
    hidden = ids = keras.Input((None,), dtype="int32")
    experts = layers.GatedExperts(4, 16)
    once = layers.TransformerDecoderBlock(2, layers.MixtureOfExperts(experts, name="moe"), **block)
    for layer in (keras.layers.Embedding(V, 16, mask_zero=mask_zero), *extra, once, once):
        hidden = layer(hidden)
    return keras.Model(ids, keras.layers.Dense(V)(hidden))


@pytest.fixture(scope="module")
def model():
    return model_of()


def best_continuation(model, prompt, num_tokens):
    text = list(prompt)
    for _ in range(num_tokens):
        padded = np.zeros((1, 9), "int32")  # of one shape: blocks are causal
        padded[0, : len(text)] = text
        text.append(int(np.argmax(to_numpy(model(padded))[0, len(text) - 1])))
    return text


@on_each_backend
def test_the_likeliest_tokens_are_those_of_whole_passes(model, tmp_path):
    texts = keras_moe.generate(model, PROMPTS, 4)
    for prompt, text in zip(PROMPTS, texts):
        assert text.tolist() == best_continuation(model, prompt, 4)
    if BACKEND == "torch":  # The others compile it again.
        of_one = keras_moe.generate(model, PROMPTS, 4, temperature=1, top_k=1)
        assert [text.tolist() for text in of_one] == [text.tolist() for text in texts]
    model.save_weights(tmp_path / "model.weights.h5")  # as before it wrote
    model.load_weights(tmp_path / "model.weights.h5")
    if BACKEND == "jax":  # Embeddings of the others refuse it themselves.
        with pytest.raises(ValueError, match="ids from 0 to 29"):
            keras_moe.generate(model, [[30]], 2)


def test_another_number_of_experts_for_each_token_holds_for_texts_too():
    model = model_of()
    keras_moe.generate(model, PROMPTS, 2)
    keras_moe.surgery.set_top_k(model, 1)
    text = keras_moe.generate(model, PROMPTS, 4)[0]
    assert text.tolist() == best_continuation(model, PROMPTS[0], 4)


@on_each_backend
def test_texts_are_those_of_the_weights_and_arguments_of_now():
    model = model_of()
    keras_moe.generate(model, PROMPTS, 2)
    block = next(part for part in model.layers if hasattr(part, "feedforward"))
    bank = block.feedforward.experts
    bank.enable_lora(2, b_initializer="he_uniform")
    text = keras_moe.generate(model, PROMPTS[:1], 4)[0]
    assert text.tolist() == best_continuation(model, PROMPTS[0], 4)
    bank.merge_factors()
    bank.quantize("int4")
    text = keras_moe.generate(model, PROMPTS[:1], 4)[0]
    assert text.tolist() == best_continuation(model, PROMPTS[0], 4)


def test_each_token_of_a_long_text_has_draws_of_its_own(model, monkeypatch):
    kernel = np.array(to_numpy(model.layers[-1].kernel.value))
    model.layers[-1].kernel.assign(np.zeros_like(kernel))  # so that only draws decide
    draw = functools.partial(keras_moe.generate, model, [[3], [4]], 70, temperature=1, seed=0)
    texts = draw()
    for limit in ("TOKENS_AT_ONCE", "DRAWS_AT_ONCE"):
        monkeypatch.setattr(keras_moe.generation, limit, 9 if limit[0] == "T" else 5 * 2 * V)
        assert np.array_equal(draw(), texts)
        monkeypatch.undo()
    counts = np.bincount(np.ravel(texts), minlength=V)
    assert np.count_nonzero(counts) > 25 and counts.max() < 20
    model.layers[-1].kernel.assign(kernel)


def test_a_text_ends_with_its_stop_token(model):
    text = keras_moe.generate(model, [PROMPTS[0]], 5)[0]
    stop = int(text[-2])
    first = text.tolist().index(stop, 4) + 1
    stopped = keras_moe.generate(model, [PROMPTS[0]], 5, stop_token=stop)[0]
    assert stopped.tolist() == text[:first].tolist()


def test_draws_follow_seed_and_probabilities(model):
    first = keras_moe.generate(model, [[3]] * 200, 1, temperature=1, seed=1)
    assert np.array_equal(first, keras_moe.generate(model, [[3]] * 200, 1, temperature=1, seed=1))
    probs = np.exp(to_numpy(model(np.array([[3]])))[0, 0].astype("float64") / 2)
    probs /= probs.sum()
    drawn = keras_moe.generate(model, [[3]] * 2000, 1, temperature=2, seed=0)
    shares = np.bincount([text[1] for text in drawn], minlength=V) / 2000
    assert np.all(np.abs(shares - probs) < 5 * np.sqrt(probs / 2000))
    likely = np.argsort(-probs)
    few = keras_moe.generate(model, [[3]] * 200, 1, temperature=2, top_k=5, seed=0)
    assert {int(text[1]) for text in few} == set(likely[:5].tolist())
    number = int(np.sum(np.cumsum(probs[likely]) < 0.3)) + 1
    few = keras_moe.generate(model, [[3]] * 200, 1, temperature=2, top_p=0.3, seed=0)
    assert {int(text[1]) for text in few} == set(likely[:number].tolist())


def test_of_equal_words_no_more_are_drawn_than_wanted(model):
    kernel = np.array(to_numpy(model.layers[-1].kernel.value))
    model.layers[-1].kernel.assign(np.zeros_like(kernel))
    for limit in ({"top_k": 2}, {"top_p": 1.5 / V}):
        texts = keras_moe.generate(model, [[3]] * 200, 1, temperature=1, seed=0, **limit)
        assert len({int(text[1]) for text in texts}) == 2
    model.layers[-1].kernel.assign(kernel)


def test_an_id_of_padding_in_a_prompt_is_a_token(model):
    texts = keras_moe.generate(model_of(mask_zero=True), [[3, 4, 0]], 2)
    assert np.array_equal(texts, keras_moe.generate(model, [[3, 4, 0]], 2))


def test_several_threads_write_at_once(model):
    texts = [text.tolist() for text in keras_moe.generate(model, PROMPTS, 8)]
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        written = pool.map(lambda prompt: keras_moe.generate(model, [prompt], 8)[0], PROMPTS)
        assert [text.tolist() for text in written] == texts


def test_a_model_that_counts_positions_elsewhere_is_refused(model):
    with pytest.raises(ValueError, match="each position alone"):
        keras_moe.generate(model_of(Positions()), PROMPTS, 2)
    of_last = to_numpy(model(np.array(PROMPTS[:1])))[0, -1]
    # It moves the logits of the sixth token by a fourteenth of their range.
    little = Positions(float(np.ptp(of_last)) / 14 / 5)
    with pytest.raises(ValueError, match="each position alone"):
        keras_moe.generate(keras.Sequential([model, little]), PROMPTS, 2)
    probabilities = keras.Sequential([model, keras.layers.Softmax()])
    with pytest.raises(ValueError, match="logits"):
        keras_moe.generate(probabilities, PROMPTS, 2, temperature=1.0)
    with pytest.raises(ValueError, match=f"from 3 to {2**40}"):
        keras_moe.generate(model, [[3], [2**40]], 2)  # in 32 bits it is 0
    with pytest.raises(ValueError, match="`stop_token` must be an id from 0 to 29"):
        keras_moe.generate(model, PROMPTS, 2, stop_token=30)
    with pytest.raises(ValueError, match="TransformerDecoderBlock"):
        dense = [keras.Input((None,), dtype="int32"), keras.layers.Embedding(V, V)]
        keras_moe.generate(keras.Sequential(dense), PROMPTS, 2)
