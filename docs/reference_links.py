"""Links from names in pages to the reference."""

import pathlib
import re

REFERENCE = pathlib.Path(__file__).parent / "api"
IDENTIFIER = re.compile(r"^::: (keras_moe\.[\w.]+)$", flags=re.MULTILINE)
# Links, programs and headings stay as they are; a name in a line of text becomes a link.
NAME = re.compile(
    r"<(a|pre|h[1-6]|autoref)\b.*?</\1>|<code>(?:keras_moe\.)?([\w.]+)(?:\(.*?\))?</code>",
    flags=re.DOTALL,
)


def identifiers():
    """Documented parts by the names that pages use, such as `TopKRouter` and `routers.TopKRouter`.

    Functions have no short name: `summary` alone may be anything.
    """
    found = {}
    for page in REFERENCE.glob("*.md"):
        for identifier in IDENTIFIER.findall(page.read_text(encoding="utf-8")):
            name = identifier.removeprefix("keras_moe.")
            name = name.replace("grouped_matmul.grouped_matmul", "grouped_matmul")
            found[name] = identifier
            last = name.split(".")[-1]
            if last[0].isupper():
                found[last] = identifier
    return found


def link_names(html, markdown):
    """Link the first mention of each documented name, but those that the page itself documents."""
    names, seen = identifiers(), set(IDENTIFIER.findall(markdown))

    def link(match):
        identifier = names.get(match[2])
        if identifier is None or identifier in seen:
            return match[0]
        seen.add(identifier)
        return f'<autoref identifier="{identifier}">{match[0]}</autoref>'

    return NAME.sub(link, html)
