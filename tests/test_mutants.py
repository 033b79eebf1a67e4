"""The planted faults of `make mutants` still apply; whether tests catch them takes minutes."""

from __future__ import annotations

import mutants
import pytest

LISTED = mutants.mutants()


def test_each_applies_exactly_once() -> None:
    assert {m.name: why for m in LISTED if (why := mutants.misfit(m))} == {}
    assert not [m.name for m in LISTED if m.fault == m.original]


def test_names_are_unique() -> None:
    assert len({m.name for m in LISTED}) == len(LISTED) >= 12


def test_what_no_longer_applies_is_named(tmp_path) -> None:
    mutant = mutants.Mutant("m", "a.py", "x = 1", "x = 2", ("test_a.py::test",))
    assert "there is no a.py" in mutants.misfit(mutant, tmp_path)
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    assert "got 2 times" in mutants.misfit(mutant, tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert "there is no test_a.py" in mutants.misfit(mutant, tmp_path)
    (tmp_path / "test_a.py").write_text("")
    assert mutants.misfit(mutant, tmp_path) == ""


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """A tree of one module and its test instead of this one; returns what judges a fault there."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_sums.py").write_text(
        "from sources.sums import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "COPIED", ("sources", "test_sums.py"))
    monkeypatch.setattr(mutants.misfit, "__defaults__", (tmp_path,))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # pytest alone starts at once

    def judged(original: str, fault: str) -> str:
        mutant = mutants.Mutant("m", "sources/sums.py", original, fault, ("test_sums.py",))
        return mutants.judge(mutant)[0]

    return judged


def test_verdicts(small_tree, tmp_path) -> None:
    assert small_tree("a + b", "a - b") == "killed"
    assert small_tree("a + b", "b + a") == "SURVIVED"
    assert small_tree("def add(a, b):", "def add(a, b:").startswith("NOT RUN")
    assert small_tree("a * b", "a").startswith("DOES NOT APPLY")
    assert (tmp_path / "sources" / "sums.py").read_text().endswith("return a + b\n")
