"""The first command of README, on made-up text that needs no network, and its parts."""

import json

import datasets
import keras
import numpy as np
import pytest
import text_classification
from made_up_text import made_up_text
from phrase_embedding import PhraseEmbedding
from vocabulary import PADDING, UNKNOWN, Vocabulary

pytestmark = pytest.mark.backends("tensorflow")


def test_the_classifier_learns_and_shows_its_experts(monkeypatch, tmp_path, capsys):
    data = made_up_text((256, 32, 32), num_words=12)
    monkeypatch.setattr(datasets, "load", lambda name, data_dir: data)
    monkeypatch.setattr(text_classification, "BATCH_SIZE", 16)
    arguments = ["--smoke", "--epochs", "3", "--experts", "4", "--output", str(tmp_path)]
    report = text_classification.main([*arguments, "--report"])
    (run,) = report["results"]["mixture of experts"]
    assert run["test_accuracy"] > 0.8 and run["active_parameters"] < run["parameters"]
    printed = capsys.readouterr().out
    assert "Share of the tokens that each expert serves" in printed
    assert f"{run['test_accuracy']:.2%}" in printed
    assert json.loads((tmp_path / "results.json").read_text()) == report
    for written in ("learning_curves.png", "experts_by_class.png", "report.html"):
        assert (tmp_path / written).stat().st_size > 1000


def test_logistic_regression_tells_topics_apart():
    splits = made_up_text((64, 16, 16))[:3]
    assert text_classification.logistic_regression(*splits) > 0.8


def test_the_twin_is_as_wide_as_the_experts_that_serve_a_token():
    sizes = []
    for experts in (text_classification.TOP_K, None):
        layer = text_classification.feedforward_of(experts, text_classification.SMOKE)
        layer.build((None, 16))
        sizes.append(sum(np.prod(weight.shape) for weight in layer.trainable_weights))
    router, second_bias = 16 * 2, 16
    assert sizes[0] - sizes[1] == router + second_bias


def test_vocabulary_encodes_unknown_empty_and_long_texts():
    vocabulary = Vocabulary(["moon", "engine"], [1.0, 2.0], length=4)
    expected = [[2, 3, PADDING, PADDING], [UNKNOWN, 0, 0, 0], [UNKNOWN, 0, 0, 0], [2, 2, 2, 2]]
    encoded = vocabulary.encode(["Moon, engine", "sun", "", "moon " * 9])
    np.testing.assert_array_equal(encoded, expected)


def test_vocabulary_takes_frequent_words_and_weighs_rare_ones_more():
    vocabulary = Vocabulary.learn(["c b a", "a b c", "a d"], size=10, length=4)
    # Equally frequent words stand in their order, in every run.
    assert vocabulary.words == ["a", "b", "c"]
    assert vocabulary.salience[0] < vocabulary.salience[1] == vocabulary.salience[2]


def test_phrase_embedding_masks_padding_and_stays_finite_without_words():
    layer = PhraseEmbedding(num_words=2, num_bigrams=7, features=3, phrase_length=2)
    ids = np.array([[2, 3, 2, 0, 0, 0], [UNKNOWN, 0, 0, 0, 0, 0]], "int32")
    phrases = keras.ops.convert_to_numpy(layer(ids))
    assert phrases.shape == (2, 3, 3) == layer.compute_output_shape((2, 6))
    assert np.isfinite(phrases).all()
    np.testing.assert_array_equal(phrases[1], 0)
    mask = keras.ops.convert_to_numpy(layer.compute_mask(keras.ops.convert_to_tensor(ids)))
    np.testing.assert_array_equal(mask, [[True, True, False], [True, False, False]])
