"""Pages of the examples, and links to the reference: hooks of mkdocs."""

import json
import pathlib
import re
import subprocess
import sys
import textwrap

from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from notebooks import FOLDER, ROOT, outputs_of, page_of  # noqa: E402
from reference_links import link_names  # noqa: E402

# Examples whose pages are in docs/, and end with the program.
TUTORIALS = ("text_classification", "translation", "tuning")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./((?!examples/)[\w./#-]+)\)")
ALERT = re.compile(r"^> \[!(\w+)\]\n((?:>.*\n)+)", flags=re.MULTILINE)


def on_config(config):
    init = (ROOT / "keras_moe/__init__.py").read_text(encoding="utf-8")
    config.site_name += " " + re.search(r'__version__ = "(.*)"', init)[1]


def on_files(files, config):
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    changes = changes.replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    for example in (ROOT / "examples").glob("*.py"):
        if example.stem in TUTORIALS:
            continue
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
        content = page_of(source, _notebook(example.stem))
        content += _colab_link(example.stem, config.repo_url or "")
        files.append(File.generated(config, f"examples/{example.stem}.md", content=content))
    return files


def _notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def _colab_link(name, repository):
    """The end of the page of an example, where the repository is on GitHub."""
    _, on_github, owner_and_name = repository.partition("https://github.com/")
    if not on_github:
        return ""
    address = f"https://colab.research.google.com/github/{owner_and_name.strip('/')}"
    return f"\n\n[Run it in Colab]({address}/blob/main/docs/notebooks/{name}.ipynb)\n"


def on_page_markdown(markdown, page, config, **_):
    """Lead links to examples to their pages, add programs to tutorials, and write alerts as the
    theme shows them.

    In the repository alerts are written as GitHub shows them, `> [!WARNING]`.
    """
    name = page.file.src_uri.removesuffix(".md")
    if name in TUTORIALS:
        example = ROOT / "examples" / f"{name}.py"
        program = textwrap.indent(example.read_text(encoding="utf-8"), "    ")
        markdown += f'\n\n??? example "The whole program"\n\n    ```python\n{program}    ```\n'
        outputs = textwrap.indent(outputs_of(_notebook(name)), "    ")
        if outputs:
            markdown += f'\n\n??? example "Its output"\n\n{outputs}\n'
        markdown += _colab_link(name, config.repo_url or "")
    markdown = ALERT.sub(_admonition, markdown)
    markdown = re.sub(r"\(\.\./examples/(\w+)\.py\)", _page_of_example, markdown)
    return OUTSIDE.sub(lambda match: _repository_link(match, config.repo_url), markdown)


def _page_of_example(match):
    return f"({match[1]}.md)" if match[1] in TUTORIALS else f"(examples/{match[1]}.md)"


def _repository_link(match, repository):
    """A link to a file that is not on the site; its text alone until `repo_url` is set."""
    if not repository:
        return match[1]
    return f"[{match[1]}]({repository.rstrip('/')}/blob/main/{match[2]})"


def _admonition(match):
    text = re.sub(r"^> ?", "    ", match[2], flags=re.MULTILINE)
    return f"!!! {match[1].lower()}\n\n{text}"


def on_page_content(html, page, **_):
    return link_names(html, page.markdown)
