"""Lets the reference show whole signatures, examples as code, and other sections as text."""

import re
import textwrap

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n\S.*)*", flags=re.MULTILINE)
CALL_ARGUMENTS = re.compile(r"^Call arguments:\n((?:    .*\n?)+)", flags=re.MULTILINE)
ARGUMENT = re.compile(r"^(\w+):", flags=re.MULTILINE)
TEXT = re.compile(r"^(Returns|Input shape|Output shape):\n((?:    .*\n?)+)", flags=re.MULTILINE)
SECTION = re.compile(r"^(Example|References?):", flags=re.MULTILINE)


class ReadableReference(griffe.Extension):
    """Rewrites each docstring before it is parsed, and signatures once all are known."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = EXAMPLE.sub(
                lambda match: f"```pycon\n{match[0]}\n```",
                obj.docstring.value,
            )
            text = CALL_ARGUMENTS.sub(_as_list, text)
            text = TEXT.sub(_as_text, text)
            obj.docstring.value = SECTION.sub(r"**\1:**", text)

    def on_package(self, *, pkg, **kwargs):
        for cls in _classes(pkg):
            # Bases first: what they take themselves is then known.
            for each in (*reversed(cls.mro()), cls):
                _spell_out(each)


def _as_list(section):
    return "**Call arguments:**\n\n" + ARGUMENT.sub(r"- `\1`:", textwrap.dedent(section[1]))


def _as_text(section):
    return f"**{section[1]}:** {textwrap.dedent(section[2])}"


def _classes(package):
    for member in package.members.values():
        if member.is_alias:
            continue
        if member.is_class:
            yield member
        elif member.is_module:
            yield from _classes(member)


def _spell_out(cls):
    """Give a constructor that ends in `**kwargs` the optional arguments of its bases as well."""
    own = cls.members.get("__init__")
    bases = [base.members["__init__"] for base in cls.mro() if "__init__" in base.members]
    if own is None or not bases or "kwargs" not in own.parameters:
        return
    *named, kwargs = own.parameters
    inherited = [
        griffe.Parameter(
            each.name,
            annotation=each.annotation,
            kind=griffe.ParameterKind.keyword_only,
            default=each.default,
        )
        for each in bases[0].parameters
        if each.default is not None and each.name not in own.parameters and each.name != "kwargs"
    ]
    own.parameters = griffe.Parameters(*named, *inherited, kwargs)
