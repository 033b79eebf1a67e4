"""The pages of the site name what is public, and include what is there; `make docs` builds them."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest
from sections import INCLUDE, ROOT, section

import optima_fast

ROOMS = ("losses", "taps", "distill", "bandit", "models", "tasks", "training")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs" / "pages").rglob("*.md"))
}
API = "\n".join(text for path, text in PAGES.items() if "/api/" in path)
NAMED = re.findall(r"^::: (\S+)$", API, re.MULTILINE)
HEADINGS = re.findall(r"\bheading: ([\w.]+)", API)


def test_every_public_name_is_in_the_reference():
    public = {f"optima_fast.{name}": name for name in optima_fast.__all__}
    for room in ROOMS:
        names = importlib.import_module(f"optima_fast.{room}").__all__
        public |= {f"optima_fast.{room}.{name}": name for name in names}
    named = {*NAMED, *HEADINGS}
    missing = [
        path
        for path, name in public.items()
        # a name of the package itself is not described again where it is from, nor a module
        # whose names are described one by one
        if not named & {path, f"optima_fast.{name}"}
        and not any(other.startswith(f"{path}.") for other in named)
    ]
    assert missing == []


@pytest.mark.parametrize("name", NAMED + HEADINGS)
def test_what_the_reference_names_is_there(name):
    assert pkgutil.resolve_name(name) is not None


def test_nothing_is_described_twice():
    assert len(set(NAMED)) == len(NAMED)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_includes_is_there(page):
    found = INCLUDE.findall(PAGES[page])
    assert len(found) == PAGES[page].count("<!-- include")
    for groups in found:
        assert section(*(group or None for group in groups))[0].strip()
