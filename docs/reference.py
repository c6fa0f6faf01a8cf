"""Lets the reference show examples in docstrings as code, and sections as headings."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n\S.*)*", flags=re.MULTILINE)
SECTION = re.compile(r"^(Example|Call arguments|References?):", flags=re.MULTILINE)


class ReadableDocstrings(griffe.Extension):
    """Rewrites each docstring once, before it is parsed."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value)
            obj.docstring.value = SECTION.sub(r"**\1:**", text)
