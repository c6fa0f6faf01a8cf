"""Links from names in pages to the reference."""

import pathlib
import re

REFERENCE = pathlib.Path(__file__).parent / "api"
IDENTIFIER = re.compile(r"^::: (keras_moe\.[\w.]+)$", flags=re.MULTILINE)
# Links, programs and headings stay as they are; a name in a line of text becomes a link.
NAME = re.compile(
    r"<(a|pre|h[1-6]|autoref)\b.*?</\1>|<code>([\w.]+)(?:\(.*?\))?</code>",
    flags=re.DOTALL,
)


def identifiers():
    """Documented parts by the names that pages use: `keras_moe.routers.TopKRouter`,
    `routers.TopKRouter` and `TopKRouter`, but only `keras_moe.summary`: `summary` may be anything.
    """
    found = {}
    for page in REFERENCE.glob("*.md"):
        for identifier in IDENTIFIER.findall(page.read_text(encoding="utf-8")):
            # A function that is called as the module it is in.
            name = identifier.replace("grouped_matmul.grouped_matmul", "grouped_matmul")
            _, *parts = name.split(".")
            found[name] = identifier
            if len(parts) > 1:
                found[".".join(parts)] = identifier
            if parts[-1][0].isupper():
                found[parts[-1]] = identifier
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
