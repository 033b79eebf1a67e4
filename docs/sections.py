"""Files of the repository, and sections of them, that pages include; see hooks.py."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^<!-- include (\S+?)(?:#(\S+))?( alone)?(?: at (\d))? -->$", re.MULTILINE)


def slug(title: str) -> str:
    """The anchor of a heading, as Python-Markdown and GitHub make it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", title)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def headings(text: str) -> list[tuple[int, int, str]]:
    """Line, level and anchor of each heading of a Markdown text."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines()):
        fenced ^= line.startswith("```")
        if not fenced and (match := re.match(r"(#+) (.*)", line)):
            found.append((number, len(match[1]), slug(match[2])))
    return found


def section(
    file: str, anchor: str | None = None, alone: str | None = None, level: str | None = None
) -> tuple[str, set[str]]:
    """What an ``INCLUDE`` with these groups stands for as Markdown, and the anchors in it.

    Raises:
        ValueError: there is no such file or heading.
    """
    if not (ROOT / file).is_file():
        raise ValueError(f"no file {file}")
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, heads = text.splitlines(), headings(text)
    begin, end = 0, len(lines)
    if anchor is not None:
        at = next((i for i, head in enumerate(heads) if head[2] == anchor), None)
        if at is None:
            raise ValueError(f"{file} has no heading #{anchor}")
        begin, own, _ = heads[at]
        end = next((line for line, other, _ in heads[at + 1 :] if alone or other <= own), end)
    heads = [head for head in heads if begin <= head[0] < end]
    if level is not None:
        for line, own, _ in heads:
            lines[line] = "#" * (own + int(level) - heads[0][1]) + lines[line][own:]
    return "\n".join(lines[begin:end]), {anchor for _, _, anchor in heads}
