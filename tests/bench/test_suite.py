"""`pytest bench`: its quick form in a process of its own, what it records, and that it compares."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed"
)


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q",
         "--device", "cpu", *map(str, arguments)],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two groups of losses and one of the bandit's."""
    file = tmp_path_factory.mktemp("bench") / "new.json"
    chosen = "image256-probs or hidden2048 or (7 and (thompson or structured))"
    done = run("bench", "--benchmark-only", "--quick", "-k", chosen, f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, file, json.loads(file.read_text())


def test_groups_are_shapes_and_their_members_contenders(recorded):
    out, _, content = recorded
    groups = {}
    for row in content["benchmarks"]:
        groups.setdefault(row["group"], set()).add(row["extra_info"]["provider"])
    people = {"eager", "autocast", "textbrewer", "blockwise"}
    assert groups["hidden2048"] == {*people, "automodel"}
    assert groups["image256-probs"] == {*people, "tinybert"}
    assert groups["attention, image256-probs"] >= {"sdpa", "sdpa-lse"}
    assert groups["7 arms"] >= {"numpy thompson", "thompson, Python", "structured-ucb, Python"}
    assert "the Triton kernels need a CUDA device" in out
    assert "node" not in content["machine_info"]
    assert content["machine_info"]["torch"]


def test_rows_have_what_a_reader_needs(recorded):
    _, _, content = recorded
    for row in content["benchmarks"]:
        info, stats = row["extra_info"], row["stats"]
        assert stats["median"] == pytest.approx(info["ms"] / 1e3)
        assert stats["rounds"] == info["runs"] == 2
        assert "data" not in stats
        assert info["ratio"] > 0
        if row["group"].endswith("arms"):
            assert 0.3 < info["earns, drifting"] <= 1
            continue
        assert info["peak_mb"] > 0
        assert info["error"] < 0.1
        assert (info["floor_ms"], info["share"]) == (None, None)
        assert (info["flop"] is None) == row["group"].startswith("attention")


def test_a_run_is_compared_with_a_file(recorded, tmp_path):
    """pytest-benchmark's own comparison, with a file that says it was faster."""
    content = recorded[2]
    for row in content["benchmarks"]:
        row["stats"]["median"] /= 1e6
    old = tmp_path / "old.json"
    old.write_text(json.dumps(content))
    done = run(
        "bench/bench_losses.py", "--benchmark-only", "--quick", "-k", "hidden2048-eager",
        f"--benchmark-compare={old}", "--benchmark-compare-fail=median:100%",
    )  # fmt: skip
    assert done.returncode != 0
    assert "(NOW)" in done.stdout
    assert "Performance has regressed" in done.stdout + done.stderr


def test_a_plain_pytest_does_not_collect_the_bench(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
