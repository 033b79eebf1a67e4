"""The bandit's bench: who is timed, who is found out, and what is said of those not installed."""

from __future__ import annotations

import json
import sys

import bench_bandit
import pytest

from optima_fast import bandit


@pytest.fixture
def alone(monkeypatch):
    """Without the other packages, installed or not."""
    for package in bench_bandit.RIVALS:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.usefixtures("alone")
def test_the_smoke_form_times_every_policy(tmp_path, capsys):
    path = tmp_path / "bandit.jsonl"
    assert bench_bandit.main(["--smoke", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    for package in ("mabwiser", "river"):
        assert f"{package} is left out: pip install {package} to compare (" in printed
    rows = {row["policy"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert set(rows) == {*bandit.names(), "numpy paper"} - {"fixed", "greedy"}
    for name, row in rows.items():
        assert f"| {name} | " in printed
        times = {key: value for key, value in row.items() if "arms" in key}
        own = name != "numpy paper" and bandit.BACKEND == "c++"
        assert len(times) == (4 if own else 2)
        assert all(0.01 < value < 1e5 for value in times.values())
        assert all(0.3 < row[f"earns, {world}"] <= 1 for world in ("stationary", "drifting"))


@pytest.mark.usefixtures("alone")
def test_who_does_not_find_the_best_arm_is_not_timed(monkeypatch, capsys):
    class Backwards(bench_bandit.Numpy):
        def update(self, arm, reward):
            super().update(arm, -reward)

    monkeypatch.setattr(bench_bandit, "Numpy", Backwards)
    assert bench_bandit.main(["--smoke"]) == 1
    printed = capsys.readouterr().out
    assert "numpy paper: does not find the best of three arms" in printed
    assert "Microseconds" not in printed


@pytest.mark.skipif(bandit.BACKEND != "c++", reason="the extension is not built")
@pytest.mark.usefixtures("alone")
def test_a_core_that_is_not_its_twin_is_found(monkeypatch, capsys):
    ours = bench_bandit.ours

    def other(name, twin, arms, seed):
        return ours(name, twin, arms, seed + (twin and name == "random"))

    monkeypatch.setattr(bench_bandit, "ours", other)
    assert bench_bandit.main(["--smoke"]) == 1
    assert "random, 7 arms: C++ pulls other arms than its twin" in capsys.readouterr().out


def test_a_rival_is_told_every_reward(monkeypatch):
    """MABWiser's interface: a fit, then partial fits; each arm once before it is asked."""
    told = []

    class Mab:
        def __init__(self, arms, policy, seed):
            assert (arms, policy, seed) == ([0, 1, 2], ("UCB1", 2.0), 5)

        def fit(self, arms, rewards):
            told.append(("fit", arms, rewards))

        def partial_fit(self, arms, rewards):
            told.append(("partial_fit", arms, rewards))

        def predict(self):
            return 2

    class LearningPolicy:
        UCB1 = staticmethod(lambda alpha: ("UCB1", alpha))

    module = type(sys)("mabwiser.mab")
    module.MAB, module.LearningPolicy = Mab, LearningPolicy
    monkeypatch.setitem(sys.modules, "mabwiser", type(sys)("mabwiser"))
    monkeypatch.setitem(sys.modules, "mabwiser.mab", module)
    player = bench_bandit.MabWiser("UCB1", {"alpha": 2.0}, 3, 5)
    assert bench_bandit.play(player, 4, bench_bandit.noise(), [0.0] * 3) == [0, 1, 2, 2]
    assert [(kind, arms) for kind, arms, _ in told] == [
        ("fit", [0]),
        *(("partial_fit", [k]) for k in (1, 2, 2)),
    ]
