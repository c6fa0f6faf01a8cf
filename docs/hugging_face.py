"""The table of Hugging Face's MoE families in `docs/convert.md`, from the installed transformers.

`python docs/hugging_face.py` prints it. A family is compared with those that are converted by the
source text of its block, its router and its experts.
"""

import ast
import collections
import os
import pathlib

import transformers

from keras_moe.convert.families import IN_FILES

FOLDER = pathlib.Path(transformers.__file__).parent / "models"


def table():
    """Rows of Markdown: what blocks share with a converted family, and their families."""
    blocks = {path.parent.name: parts_of(path) for path in sorted(FOLDER.glob("*/modeling_*.py"))}
    known = [blocks[name] for name in IN_FILES]
    rows = collections.defaultdict(list)
    for name, parts in blocks.items():
        if parts is not None and name not in IN_FILES:
            shared = (kind for kind in parts if any(parts[kind] == each[kind] for each in known))
            rows[", ".join(shared) or "nothing"].append(f"`{name}`")
    return [f"| {shared} | {', '.join(names)} |" for shared, names in sorted(rows.items())]


def parts_of(path):
    """The text of each kind of class in a MoE block, or None for a family without experts."""
    text = path.read_text(encoding="utf-8")
    nodes = ast.parse(text).body if "Experts(" in text else []
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    experts = [name for name in classes if name.endswith("Experts")]
    blocks = [
        name
        for name in classes
        if name not in experts
        and any(f" {expert}(" in ast.unparse(classes[name].body) for expert in experts)
    ]
    if not blocks:
        return None
    block = ast.unparse(classes[blocks[0]])
    used = [name for name in classes if name != blocks[0] and f"{name}(" in block]
    family = os.path.commonprefix([blocks[0], *used])
    texts = {"block": [block], "router": [], "experts": []}
    for name in used:
        text = ast.unparse(without_notes(classes[name]))
        if name in experts:
            texts["experts"].append(text)
        elif any(word in name for word in ("Rout", "Gat")):
            texts["router"].append(text)
    return {kind: "\n".join(each).replace(family, "") for kind, each in texts.items()}


def without_notes(node):
    """The class without docstrings and annotations."""
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef):
            each.returns = None
            for argument in each.args.args:
                argument.annotation = None
        if isinstance(each, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(each) is not None:
            each.body = each.body[1:] or [ast.Pass()]
    return node


if __name__ == "__main__":
    print("\n".join(table()))
