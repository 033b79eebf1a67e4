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


EAGER = "bench/bench_losses.py::test_loss[hidden2048-eager]"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two groups of losses and one of the bandit's, beside a file that says that one was faster."""
    folder = tmp_path_factory.mktemp("bench")
    fast = dict.fromkeys(("min", "max", "mean", "median", "stddev", "iqr", "ops"), 1e-9)
    fast |= {"rounds": 2, "iterations": 1, "outliers": "0;0"}
    old = {
        "name": EAGER.partition("::")[2],
        "fullname": EAGER,
        "group": "hidden2048",
        "stats": fast,
    }
    (folder / "old.json").write_text(json.dumps({"machine_info": {}, "benchmarks": [old]}))
    chosen = "image256-probs or hidden2048 or (7 and (thompson or structured))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q",
         "--device", "cpu", "bench", "--benchmark-only", "--quick", "-k", chosen,
         f"--benchmark-json={folder / 'new.json'}", f"--benchmark-compare={folder / 'old.json'}",
         "--benchmark-compare-fail=median:100%"],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (folder / "new.json").exists(), done.stdout + done.stderr
    return done, json.loads((folder / "new.json").read_text())


def test_groups_are_shapes_and_their_members_contenders(recorded):
    done, content = recorded
    assert set(done.stdout.split()[0]) == {".", "s"}
    groups = {}
    for row in content["benchmarks"]:
        groups.setdefault(row["group"], set()).add(row["extra_info"]["provider"])
    people = {"eager", "autocast", "textbrewer", "blockwise"}
    assert groups["hidden2048"] == {*people, "automodel"}
    assert groups["image256-probs"] == {*people, "tinybert"}
    assert groups["attention, image256-probs"] >= {"sdpa", "sdpa-lse"}
    assert groups["7 arms"] >= {"numpy thompson", "thompson, Python", "structured-ucb, Python"}
    assert "the Triton kernels need a CUDA device" in done.stdout
    assert "node" not in content["machine_info"]
    assert content["machine_info"]["torch"]


def test_rows_have_what_a_reader_needs(recorded):
    _, content = recorded
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


def test_a_run_is_compared_with_a_file(recorded):
    """By pytest-benchmark itself."""
    done, _ = recorded
    assert done.returncode != 0
    assert "(NOW)" in done.stdout
    assert "Performance has regressed" in done.stdout + done.stderr


def test_a_plain_pytest_does_not_collect_the_bench(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
