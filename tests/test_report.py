"""The HTML report: its numbers and words, and its behaviour in a real browser."""

import functools
import json
import re

import keras
import numpy as np
import pytest
from backends import on_one_backend
from browser import run_in_page
from layer_checks import E, moe, one_hot, one_hot_router, wide_identity

import keras_moe
from keras_moe import layers, routers

# Pages are made of NumPy arrays, whichever backend computes them.
pytestmark = on_one_backend
EVIL = "<script>window.broken = true</script>"


def one_hot_model(*names, mask_zero=False):
    """Token id n, from 1 on, goes to expert n - 1."""
    inputs = keras.Input((None,), dtype="int32")
    table = np.concatenate([np.zeros((1, E)), np.eye(E)])
    embed = keras.layers.Embedding(
        E + 1, E, embeddings_initializer=lambda shape, dtype: table, mask_zero=mask_zero
    )
    outputs = embed(inputs)
    for name in names:
        experts = layers.LayerExperts([keras.layers.Identity() for _ in range(E)])
        layer = moe(experts, router=one_hot_router(top_k=2), router_losses=(), name=name)
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name="demo")


def written(tmp_path, *args, **kwargs):
    path = keras_moe.report(*args, path=tmp_path / "report.html", **kwargs)
    return path, path.read_text(encoding="utf-8")


def data_of(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html).group(1))["layers"]


def verdicts(html):
    return re.findall(r"<strong>(.*?)</strong>", html)


def balanced(repeat=20):
    return np.tile([[1, 2, 3, 4], [4, 3, 2, 1]], (1, repeat))


def test_the_choices_of_each_token_are_on_the_page(tmp_path):
    model = one_hot_model("first", "second", mask_zero=True)
    words = [["red", "green", "pad"], ["blue", "pad", "pad"]]
    _, html = written(tmp_path, model, [[1, 2, 0], [4, 0, 0]], ["warm", "cold"], words)
    first, second = data_of(html)
    assert (first["name"], second["name"]) == ("first", "second")
    assert first["texts"] == ["red", "green", "pad", "blue", "pad", "pad"]
    assert first["experts"][::2] == [0, 1, -1, 3, -1, -1]
    assert first["counts"] == [3, 2, 0, 1]
    assert first["labels"] == ["warm", "cold"]
    weights = np.array(first["weights"]).reshape(-1, 2).sum(axis=1)
    np.testing.assert_array_equal(weights, [100, 100, 0, 100, 0, 0])
    _, html = written(tmp_path, model, [[1] * 3, [4] * 3] * 4, ["a", "b"] * 4)
    cells = re.findall(r"<td>(.*?)</td>", html)[:10]
    assert cells[:4] == ["first", f"2 of {E}", "16", "16"]
    bits, shuffled = map(float, re.findall(r"[\d.]+", cells[-1]))
    assert bits == 0.5 and shuffled < 0.4, "bits that label and expert share"


def test_of_a_layer_that_is_called_twice_the_first_call_is_shown(tmp_path):
    once = one_hot_model("moe")
    layer = once.get_layer("moe")
    twice = keras.Model(once.input, layer(layer(once.layers[1].output)))
    documents = [[1, 2]] * 40  # two batches
    page = [data_of(written(tmp_path, model, documents)[1])[0] for model in (once, twice)]
    assert page[0]["texts"] == page[1]["texts"] and page[0]["experts"] == page[1]["experts"]


def test_layers_have_their_own_labels_and_tokens(tmp_path):
    model = one_hot_model("first", "second")
    words = {"first": ["red green", "blue red"], "second": ["uno dos", "tres uno"]}
    labels = {"second": [["warm", "cold"], ["cold", "cold"]]}
    _, html = written(tmp_path, model, [[1, 2], [4, 1]], labels, words)
    first, second = data_of(html)
    assert first["texts"] == ["red", "green", "blue", "red"]
    assert second["texts"] == ["uno", "dos", "tres", "uno"]
    assert first["labels"] is None and "warm" in html


def test_integer_data_are_shown_as_they_are_and_texts_are_split():
    from keras_moe.reporting.page import token_texts

    data = np.array([[5, 6, 7, 8], [9, 1, 0, 0]])
    assert token_texts(None, data, 4, 2) == ["5", "6", "7", "8", "9", "1", "0", "0"]
    assert token_texts(["a b c d", "e f"], data, 2, 2) == ["a b", "c d", "e f", ""]
    assert token_texts(None, np.zeros((1, 2, 3)), 2, 1) == ["#0", "#1"]
    assert token_texts([[["a"], ["b"]], [["c"], "d"]], data, 2, 2) == ["a b", "", "c d", ""]
    assert token_texts([["a", "  "]], data, 4, 1) == ["a", "␣␣", "", ""]


def test_verdicts_are_plain_words(tmp_path):
    _, html = written(tmp_path, one_hot_model("only"), np.ones((2, 80), int))
    collapse = "only: The experts have collapsed: 100% of the work goes to 2 of 4."
    assert verdicts(html)[0] == collapse
    _, html = written(tmp_path, one_hot_model("only"), [[1]])
    assert verdicts(html)[0] == "only: 2 assignments are too few to judge 4 experts."


def untrained(router):
    inputs = keras.Input((None,), dtype="int32")
    layer = layers.MixtureOfExperts(layers.FeedForwardExperts(E, 8), router, name="new")
    return keras.Model(inputs, layer(keras.layers.Embedding(9, 8)(inputs)))


def test_an_untrained_router_has_no_preference(tmp_path):
    model = untrained(routers.TopKRouter(top_k=1))
    _, html = written(tmp_path, model, balanced(5))
    assert "new: The router hardly prefers an expert: the scores of a token are close" in html
    # Nor is the load left out, and what helps is said once.
    model.layers[1].embeddings.assign(np.eye(9, 8))
    model.layers[2].router.kernel.assign(1e-5 * np.eye(8, E))
    _, html = written(tmp_path, model, np.repeat([0, 1, 2], [112, 32, 16]).reshape(2, 80))
    texts = ["Expert 3 of 4 is de", "The busiest expert ", "The router hardly p"]
    assert [text.removeprefix("new: ")[:19] for text in verdicts(html)] == texts
    assert html.count("Try the same as above.") == 1
    # Sigmoids are close to each other without a verdict.
    model = untrained(routers.TopKRouter(top_k=1, score="sigmoid"))
    assert "hardly prefers" not in written(tmp_path, model, balanced(5))[1]


ALIGNED = {"kernel": np.eye(E, 256), "directions": np.eye(256, E)}
ROUTERS = {
    "cosine": (routers.CosineRouter, {**ALIGNED, "log_scale": np.log(60.0)}, None),
    "cosine of NaN": (routers.CosineRouter, {**ALIGNED, "log_scale": np.nan}, "logits are NaN"),
    "exploded": (routers.TopKRouter, {"kernel": 60 * np.eye(E)}, "Router logits explode"),
    "offset": (routers.TopKRouter, {"kernel": np.full((E, E), 9.0)}, None),
    "sigmoids": (
        functools.partial(routers.TopKRouter, score="sigmoid"),
        {"kernel": np.full((E, E), 9.0)},
        "Router logits explode",
    ),
    "infinite": (routers.TopKRouter, {"kernel": np.full((E, E), np.inf)}, "logits are NaN"),
}


@pytest.mark.parametrize("kind, weights, problem", ROUTERS.values(), ids=ROUTERS)
def test_router_logits_explode_by_what_differs_between_experts(kind, weights, problem, tmp_path):
    router = kind()
    model = keras.Sequential([keras.Input((E,)), moe(router=router)])
    for name, value in weights.items():
        getattr(router, name).assign(value)
    _, html = written(tmp_path, model, 10 * np.eye(E, dtype="float32"))
    told = [text for text in ("Router logits explode", "logits are NaN") if text in html]
    assert told == [problem] * (problem is not None)


def test_data_of_any_structure_and_of_no_token_layout_are_reported(tmp_path):
    left, right = keras.Input((E,), name="left"), keras.Input((E,), name="right")
    added = keras.layers.Add()([left, right])
    model = keras.Model({"left": left, "right": right}, moe(router=one_hot_router())(added))
    x = one_hot(0, 1, 2, 3)
    _, html = written(tmp_path, model, {"left": x, "right": x.tolist()}, np.arange(4))
    assert data_of(html)[0]["texts"] == ["#0"] * 4
    assert data_of(html)[0]["experts"] == [0, 1, 2, 3]
    inputs = keras.Input((E,))
    outputs = moe(router=one_hot_router(), router_losses=())(inputs[:3, :])
    _, html = written(tmp_path, keras.Model(inputs, outputs), x, ["a"] * 4)
    assert data_of(html) == [] and "3 tokens routed" in html


def test_text_from_data_is_never_markup(tmp_path):
    model = one_hot_model("first")
    words = [[EVIL, "</script>", "$x_$", "<!--"] * 20] * 2
    path, html = written(tmp_path, model, balanced(), [EVIL, "</svg>"], words)
    assert EVIL not in html
    found = "window.broken, texts('.token')[0], texts('b')[0], texts('#words')[0].includes('<!--')"
    code = f"return [{found}, all('figure svg').length]"
    assert run_in_page(path, code) == [None, EVIL, EVIL, True, 2]


ACTIVE = "a\u202eb\x1b[31m\nc\x00\u2066\u200d"


def test_control_characters_stand_as_text_in_the_page_and_on_the_terminal(tmp_path, capsys):
    name, documents = ACTIVE.replace("\x00", ""), balanced()
    model = one_hot_model(name)
    words = [[ACTIVE] * documents.shape[1]] * len(documents)
    _, html = written(tmp_path, model, documents, [ACTIVE] * len(documents), words)
    shown = r"a\u202eb\x1b[31m\nc\x00\u2066" + "\u200d"
    layer = data_of(html)[0]
    assert layer["labels"][0] == layer["texts"][0] == shown
    assert layer["name"] == shown.replace(r"\x00", "")
    assert not set(ACTIVE) & set(html) - set("abc[31m\n\u200d")
    model = keras.Sequential([keras.Input((E,)), moe(name=name)], name=name)
    keras_moe.summary(model)
    assert not set(ACTIVE) & set(capsys.readouterr().out) - set("abc[31m\n\u200d")


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, one_hot_model("moe"), [[1]])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("router", ["dense", "expert_choice", "soft", "top_p"])
def test_every_kind_of_router_is_reported(tmp_path, router):
    inputs = keras.Input((6,), dtype="int32")
    outputs = keras.layers.Embedding(9, E)(inputs)
    outputs = moe(router=router, router_losses=(), name="moe")(outputs)
    path, html = written(tmp_path, keras.Model(inputs, outputs), np.arange(24).reshape(4, 6) % 9)
    assert "moe: " in verdicts(html)[0]
    assert len(data_of(html)[0]["texts"]) == 24


def test_a_token_without_an_expert_is_shown_and_padding_is_not(tmp_path):
    inputs = keras.Input((3, E))
    router = routers.ReLURouter(E, kernel_initializer=wide_identity)
    outputs = moe(router=router, router_losses=())(keras.layers.Masking()(inputs))
    x = one_hot(0, 0, 0) * np.array([[1.0], [-1.0], [0.0]], "float32")
    path, _ = written(tmp_path, keras.Model(inputs, outputs), x[None], tokens=["yes no padding"])
    found = run_in_page(path, "point('.unserved'); return [...texts('.token'), hover.textContent]")
    assert found == ["yes", "no", "nono expert serves it"]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    return keras_moe.report(one_hot_model("first", "second"), balanced(100), ["a", "b"], path=path)


def test_documents_are_whole_and_colours_have_a_key(page_path):
    labels, lengths, numbers, colours = run_in_page(
        page_path,
        """
        all(".block").filter((block) => !block.firstChild).forEach(fill);
        const documents = all(".document");
        const first = (each) => each.style.getPropertyValue("--first");
        return [texts("#text b"), documents.map((each) => each.querySelectorAll(".token").length),
          texts("#key span"), [first(all("#key span")[0]), first(all(".token")[0])]];
        """,
    )
    assert labels == ["a", "b"] and lengths == [400, 400] and numbers == ["0", "1", "2", "3"]
    assert colours[0] == colours[1], "of expert 0"


def test_many_documents_scroll_in_a_box_and_bars_have_the_numbers_of_experts(tmp_path):
    documents = np.tile([[1, 2, 3, 4]], (400, 5))
    path = keras_moe.report(one_hot_model("moe"), documents, path=tmp_path / "report.html")
    height, all_of_it, title, numbers, filled = run_in_page(
        path,
        """
        const numbers = all(".bars i").map((bar) => bar.dataset.number);
        text.scrollTop = text.scrollHeight;
        const filled = () => all(".block").at(-1).children.length;
        for (let turn = 0; turn < 50 && !filled(); turn++)  // a busy machine takes longer
          await new Promise((done) => setTimeout(done, 500));
        return [text.offsetHeight, text.scrollHeight, texts("h1")[0], numbers, filled()];
        """,
    )
    assert height < 900 < all_of_it and filled
    assert title == "Experts of the model “demo”" and numbers == ["0", "1", "2", "3"]


def test_the_filter_filters(page_path):
    before, served, others, matches, count, name, after = run_in_page(
        page_path,
        """
        const others = () => all(".other").length, found = [others()];
        choose(expertSelect, 2);
        found.push(all(".token:not(.other)").every((token) =>
          choicesOf(Number(token.dataset.index)).some((choice) => choice.expert === 2)));
        found.push(others() / all(".token").length, texts("#matches")[0], layer().counts[2]);
        choose(layerSelect, 1);
        return [...found, layer().name, others()];
        """,
    )
    assert before == after == 0 and served and 0 < others < 1
    assert matches.startswith(f"{count:,} ") and name == "second"


def test_mouse_and_keyboard_reach_every_token(page_path):
    hidden, shown, away, last, following, expert, focused, escaped = run_in_page(
        page_path,
        """
        const index = () => document.activeElement.dataset.index, found = [hover.hidden];
        point(".token:nth-of-type(3)");
        found.push(hover.textContent);
        send(text, new MouseEvent("mouseout"));
        found.push(hover.hidden);
        all(".token")[0].focus();
        for (let i = 0; i < 399; i++) press("ArrowRight");
        found.push(index());
        press("ArrowRight");
        found.push(index());
        press("ArrowLeft");
        press("Enter");
        found.push(expertSelect.value, hover.hidden);
        press("Escape");
        return [...found, hover.hidden];
        """,
    )
    assert hidden and away and not focused and escaped
    assert shown.startswith("3expert 2weight ") and "probability 100%" in shown
    assert (last, following, expert) == ("399", "400", "3"), "400 is in the next document"
