"""Converts the examples to notebooks in docs/notebooks/, and executes them.

    python docs/notebooks.py                           # keeps the outputs of unchanged code
    python -m tox -e notebooks                         # all, executed
    python -m tox -e notebooks -- density tabular

A string on its own in an example is a cell of prose, what is between two of them a cell of code.
The site has a page of the same cells and outputs for each example, see `site_hooks.py`.
"""

import argparse
import ast
import base64
import io
import json
import os
import pathlib
import re
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
# Colab opens a notebook without the repository that it is part of.
SET_UP = """import pathlib

if not pathlib.Path("../../setup.cfg").exists():
    !git clone -q {url} keras_moe
    %cd keras_moe/docs/notebooks
!{install}"""
# The last cell of an executed notebook, whose output says where it ran.
MACHINE = """import os
import platform

print(f"Python {platform.python_version()}, Keras {keras.version()}, backend "
      f"{keras.backend.backend()}, {os.cpu_count()} cores, {platform.machine()}")"""
LARGEST_PNG = 60_000  # bytes; larger pictures become JPEG


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--execute", action="store_true", help="run the notebooks")
    parser.add_argument("names", nargs="*", help="examples, by default all")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for example in sorted((ROOT / "examples").glob("*.py")):
        if options.names and example.stem not in options.names:
            continue
        path = FOLDER / f"{example.stem}.ipynb"
        notebook = notebook_of(example.read_text(encoding="utf-8"))
        if options.execute:
            print(f"{example.stem} ...", flush=True)
            execute(notebook)
        elif path.exists():
            keep_outputs(json.loads(path.read_text(encoding="utf-8")), notebook)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def notebook_of(source):
    """The notebook (nbformat 4) of an example, without outputs."""
    set_up = _code_cell(SET_UP.format(url=repository_url(), install=_install_line(source)))
    cells = [_code_cell(text) if not prose else _prose_cell(text) for prose, text in _cells(source)]
    return {
        "cells": [set_up, *cells],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 4,
    }


def without_outputs(notebook):
    """A notebook as `notebook_of` makes it."""
    cells = [
        {**cell, "outputs": [], "execution_count": None} if "outputs" in cell else cell
        for cell in notebook["cells"]
        if "machine" not in cell["metadata"].get("tags", ())
    ]
    return {**notebook, "cells": cells}


def keep_outputs(old, notebook):
    """Copy the outputs of an old notebook that has the same code but for the set-up."""
    (_, *before), (_, *now) = (
        [cell for cell in each["cells"] if cell["cell_type"] == "code"] for each in (old, notebook)
    )
    if [cell["source"] for cell in before[: len(now)]] == [cell["source"] for cell in now]:
        for cell, done in zip(now, before):
            cell["outputs"] = done["outputs"]
        notebook["cells"] += before[len(now) :]  # the one that says where it ran


def execute(notebook):
    """Run a notebook in an empty folder, without its set-up, and fill in its outputs."""
    import nbclient
    import nbformat

    machine = _code_cell(MACHINE)
    machine["metadata"]["tags"] = ["machine"]
    notebook["cells"].append(machine)
    without_set_up = {**notebook, "cells": notebook["cells"][1:]}
    run = nbformat.reads(json.dumps(without_set_up), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        client = nbclient.NotebookClient(run, timeout=None, resources=where, record_timing=False)
        client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"})
    for cell, done in zip(notebook["cells"][1:], run["cells"]):
        if cell["cell_type"] == "code":
            cell["outputs"] = list(_clean(done["outputs"]))


def _clean(outputs):
    """What a cell printed, without progress bars and warnings, and its pictures."""
    printed = "".join(
        each["text"] for each in outputs if each.get("name") == "stdout" and "text" in each
    )
    printed = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    lines = [re.sub(r".*[\r\x08](?=.)", "", line) for line in printed.splitlines()]
    lines = [re.sub(r"━+ ", "", line).strip("\r\x08").rstrip() for line in lines]
    text = "\n".join(lines).strip("\n")
    if text:
        source = (text + "\n").splitlines(keepends=True)
        yield {"name": "stdout", "output_type": "stream", "text": source}
    for each in outputs:
        picture = each.get("data", {}).get("image/png")
        if picture:
            data = dict([_small_picture(picture)])
            yield {"data": data, "metadata": {}, "output_type": "display_data"}


def _small_picture(png):
    """The type of a picture, and it in base64."""
    png = png.replace("\n", "")
    content = base64.b64decode(png)
    if len(content) <= LARGEST_PNG:
        return "image/png", png
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.open(io.BytesIO(content)).convert("RGB").save(file, "JPEG", quality=60)
    return "image/jpeg", base64.b64encode(file.getvalue()).decode()


def page_of(source, notebook=None):
    """The Markdown of an example, with the outputs of its notebook."""
    executed, machine = _executed(notebook)
    parts = []
    for prose, text in _cells(source):
        parts.append(text if prose else f"```python\n{text}\n```")
        if not prose:
            parts += next(executed, ())
    return "\n\n".join([*parts, *machine])


def outputs_of(notebook):
    """The Markdown of all outputs of a notebook; an empty string if it was not executed."""
    executed, machine = _executed(notebook)
    return "\n\n".join([each for outputs in executed for each in outputs] + machine)


def _executed(notebook):
    """The outputs of each cell of code as Markdown, and those that say where they were made."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"] if notebook else []
    machine = []
    if code and "machine" in code[-1]["metadata"].get("tags", ()):
        said = "The outputs are from one run, which other programs slowed down, with:"
        machine = [said, *_outputs(code.pop())]
    return (_outputs(cell) for cell in code[1:]), machine


def _outputs(cell):
    """The outputs of a cell as Markdown."""
    for each in cell["outputs"]:
        if "text" in each:
            yield f"```text\n{''.join(each['text'])}```"
        for kind, picture in each.get("data", {}).items():
            yield f"![Picture that the code above draws](data:{kind};base64,{picture})"


def is_prose(node):
    """Whether a statement is nothing but a string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def repository_url():
    """The `repo_url` of the site, or a placeholder until a maintainer has set it."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    found = re.search(r"^repo_url: (\S+)$", settings, flags=re.MULTILINE)
    return found[1] if found else "REPOSITORY_URL"


def _install_line(source):
    """That of the docstring, in the folder of the notebooks."""
    (line,) = re.findall(r"^    (pip install .*)$", source, flags=re.MULTILINE)
    return line.replace('".[', '"../..[')


def _cells(source):
    """Yield whether a cell is prose, and its text."""
    lines = source.splitlines()
    title, _, rest = ast.get_docstring(ast.parse(source)).partition("\n")
    prose = [node for node in ast.parse(source).body if is_prose(node)]
    ends = [node.lineno - 1 for node in prose[1:]] + [len(lines)]
    for node, end in zip(prose, ends):
        text = node.value.value.strip() if node is not prose[0] else f"# {title}\n{rest}"
        yield True, text
        code = "\n".join(lines[node.end_lineno : end]).strip("\n")
        if code:
            yield False, code


def _prose_cell(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def _code_cell(text):
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": text.splitlines(keepends=True),
    }


if __name__ == "__main__":
    main()
