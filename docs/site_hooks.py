"""Pages of the examples, and links to the reference: hooks of mkdocs."""

import json
import pathlib
import re
import subprocess
import sys

from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from notebooks import FOLDER, ROOT, page_of  # noqa: E402
from reference_links import link_names  # noqa: E402

ALERT = re.compile(r"^> \[!(\w+)\]\n((?:>.*\n)+)", flags=re.MULTILINE)


def on_config(config):
    init = (ROOT / "keras_moe/__init__.py").read_text(encoding="utf-8")
    config.site_name += " " + re.search(r'__version__ = "(.*)"', init)[1]


def on_files(files, config):
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    changes = changes.replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    for example in (ROOT / "examples").glob("*.py"):
        source = subprocess.run(
            [
                sys.executable,
                "-m",
                "ruff",
                "format",
                "--line-length",
                "76",
                "-",
            ],
            input=example.read_text(encoding="utf-8"),
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        path = FOLDER / f"{example.stem}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        content = page_of(source, notebook) + _colab_link(example.stem, config.repo_url or "")
        files.append(File.generated(config, f"examples/{example.stem}.md", content=content))
    return files


def _colab_link(name, repository):
    """The end of the page of an example, where the repository is on GitHub."""
    _, on_github, owner_and_name = repository.partition("https://github.com/")
    if not on_github:
        return ""
    address = f"https://colab.research.google.com/github/{owner_and_name.strip('/')}"
    return f"\n\n[Run it in Colab]({address}/blob/main/docs/notebooks/{name}.ipynb)\n"


def on_page_markdown(markdown, **_):
    """Lead links to the files of examples to their pages; write alerts as the theme shows them.

    In the repository they are written as GitHub shows them, `> [!WARNING]`.
    """
    markdown = ALERT.sub(_admonition, markdown)
    return re.sub(r"\(\.\./examples/(\w+)\.py\)", r"(examples/\1.md)", markdown)


def _admonition(match):
    text = re.sub(r"^> ?", "    ", match[2], flags=re.MULTILINE)
    return f"!!! {match[1].lower()}\n\n{text}"


def on_page_content(html, page, **_):
    return link_names(html, page.markdown)
