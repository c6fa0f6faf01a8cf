"""Pages of the examples, links to the reference, the address of the repository: hooks of mkdocs."""

import pathlib
import re
import subprocess
import sys

from mkdocs.structure.files import File

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS))
from notebooks import ROOT, page_of  # noqa: E402

IDENTIFIER = re.compile(r"^::: (keras_moe\.[\w.]+)$", flags=re.MULTILINE)
# What is a link, a program or a heading stays; a name in a line of text becomes a link.
NAME = re.compile(
    r"<(a|pre|h[1-6]|autoref)\b.*?</\1>|<code>(?:keras_moe\.)?([\w.]+)(?:\(.*?\))?</code>",
    flags=re.DOTALL,
)


def identifiers():
    """Documented parts by the names that pages use, such as `TopKRouter` and `routers.TopKRouter`.

    Functions have no short name: `summary` alone may be anything.
    """
    found = {}
    for page in (DOCS / "api").glob("*.md"):
        for identifier in IDENTIFIER.findall(page.read_text(encoding="utf-8")):
            name = identifier.removeprefix("keras_moe.").replace("matmul.grouped_", "")
            found[name] = identifier
            last = name.split(".")[-1]
            if last[0].isupper():
                found[last] = identifier
    return found


def on_files(files, config):
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
        page = File.generated(config, f"examples/{example.stem}.md", content=page_of(source))
        files.append(page)
    return files


def on_page_markdown(markdown, config, **_):
    """Lead links to the files of examples to their pages, and fill in the address to clone."""
    markdown = re.sub(r"\(\.\./examples/(\w+)\.py\)", r"(examples/\1.md)", markdown)
    return markdown.replace("REPOSITORY_URL", config.repo_url or "REPOSITORY_URL")


def on_page_content(html, page, **_):
    """Link the first mention of each documented name on a page."""
    names = identifiers()
    seen = set(IDENTIFIER.findall(page.markdown))

    def link(match):
        identifier = names.get(match[2])
        if identifier is None or identifier in seen:
            return match[0]
        seen.add(identifier)
        return f'<autoref identifier="{identifier}">{match[0]}</autoref>'

    return NAME.sub(link, html)
