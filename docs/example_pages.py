"""A page of the site for each example: hooks of mkdocs."""

import pathlib
import re
import sys

from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from notebooks import ROOT, page_of  # noqa: E402


def on_files(files, config):
    for example in (ROOT / "examples").glob("*.py"):
        page = page_of(example.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"examples/{example.stem}.md", content=page))
    return files


def on_page_markdown(markdown, **_):
    """Lead links to the files of examples to their pages."""
    return re.sub(r"\(\.\./examples/(\w+)\.py\)", r"(examples/\1.md)", markdown)
