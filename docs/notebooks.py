"""Converts the examples to notebooks: `python docs/notebooks.py` writes docs/notebooks/.

A string on its own in an example is a cell of prose, what is between two of them a cell of code.
The site has a page of the same cells for each example, see `site_hooks.py`.
"""

import ast
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
# Colab opens a notebook without the repository that it is part of.
SET_UP = """import pathlib

if not pathlib.Path("../../setup.cfg").exists():
    !git clone -q {url} keras_moe
    %cd keras_moe/docs/notebooks
!{install}"""


def main():
    FOLDER.mkdir(exist_ok=True)
    for example in sorted((ROOT / "examples").glob("*.py")):
        path = FOLDER / f"{example.stem}.ipynb"
        path.write_text(notebook_of(example.read_text(encoding="utf-8")), encoding="utf-8")


def notebook_of(source):
    """The text of the notebook (nbformat 4) of an example."""
    notebook = {
        "cells": [
            _code_cell(SET_UP.format(url=repository_url(), install=_install_line(source))),
            *(_prose_cell(text) if prose else _code_cell(text) for prose, text in _cells(source)),
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
        },
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def page_of(source):
    """The Markdown of an example."""
    return "\n\n".join(
        text if prose else f"```python\n{text}\n```" for prose, text in _cells(source)
    )


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
