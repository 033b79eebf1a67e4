"""What the tests of the policies share."""

from __future__ import annotations

import pytest

from optima_fast import bandit
from optima_fast.bandit import _cores, backend

CORES = [_cores]
if bandit.BACKEND == "c++":
    from optima_fast import _bandit

    CORES.append(_bandit)


@pytest.fixture(params=CORES, ids=lambda m: "python" if m is _cores else "c++")
def core(request, monkeypatch):
    """Every test that names it runs on both cores."""
    monkeypatch.setattr(backend, "cores", request.param)
    return request.param


@pytest.fixture
def twins(monkeypatch):
    """A policy on each core, of the same arguments."""
    if len(CORES) < 2:
        pytest.skip("the extension is not built")

    def make(*args, **options):
        made = []
        for build in CORES:
            monkeypatch.setattr(backend, "cores", build)
            made.append(bandit.make(*args, **options))
        return made

    return make
