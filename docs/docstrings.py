"""How a docstring that reads well in ``help()`` becomes Markdown: roles, formulas, examples."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([\w.]+)`")
MATH = re.compile(r"^\.\. math::(.*(?:\n[ \t]+\S.*|\n(?=\n[ \t]+\S))*)", re.MULTILINE)
INLINE_MATH = re.compile(r":math:`([^`]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
CODE = re.compile(r"^Example::\n((?:\n|[ \t]+\S.*(?:\n|$))+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring once the package is read, so that names can be resolved."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        self._visit(pkg, set())

    def _visit(self, here: griffe.Object, seen: set[str]) -> None:
        if here.path in seen:
            return
        seen.add(here.path)
        if here.docstring:
            here.docstring.value = markdown(here, here.docstring.value)
        for member in here.members.values():
            if not member.is_alias:
                self._visit(member, seen)


def markdown(here: griffe.Object, text: str) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1]
        title = f"<code>{name.rpartition('.')[2]}</code>"
        return f'<autoref optional identifier="{path(here, name)}">{title}</autoref>'

    def display(match: re.Match[str]) -> str:
        return "\n```math\n" + " ".join(match[1].split()) + "\n```\n"

    def code(match: re.Match[str]) -> str:
        body = match[1].strip("\n")
        indent = body[: len(body) - len(body.lstrip())]
        return f"Examples:\n{indent}```python\n{body}\n{indent}```\n"

    text = MATH.sub(display, text)
    text = INLINE_MATH.sub(lambda m: "`#!math " + " ".join(m[1].split()) + "`", text)
    text = EXAMPLE.sub("Examples:", CODE.sub(code, text))
    return ROLE.sub(link, text)


def path(here: griffe.Object, name: str) -> str:
    """The full name of what a role names: as seen from ``here``, or from the package.

    Raises:
        ValueError: there is no such thing.
    """
    package = here.package
    if name.startswith(f"{package.name}."):
        return _final(package[name.partition(".")[2]])
    first, _, rest = name.partition(".")
    at: griffe.Object | griffe.Alias | None = here
    while at is not None:
        if first in at.members:
            found = at.members[first]
            return _final(found[rest] if rest else found)
        at = at.parent
    raise ValueError(f"{here.path}: no {name}")


def _final(found: griffe.Object | griffe.Alias) -> str:
    return found.final_target.path if found.is_alias else found.path
