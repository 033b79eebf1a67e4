"""What the tests of the policies share."""

from __future__ import annotations

import pytest

from optima_fast import bandit
from optima_fast.bandit import core

EXTENSIONS = [None] if core.extension is None else [None, core.extension]


@pytest.fixture(params=EXTENSIONS, ids=lambda e: "python" if e is None else "c++")
def either(request, monkeypatch):
    """Every test that uses it runs on both cores; the others on the one that computes here."""
    monkeypatch.setattr(core, "extension", request.param)


@pytest.fixture
def twins(monkeypatch):
    """Makes a policy on each core, Python's first, of the same arguments."""
    if core.extension is None:
        pytest.skip("the extension is not built")

    def make(*args, **options):
        made = []
        for extension in EXTENSIONS:
            monkeypatch.setattr(core, "extension", extension)
            made.append(bandit.make(*args, **options))
        return made

    return make
