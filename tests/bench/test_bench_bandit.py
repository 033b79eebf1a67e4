"""The bandit's bench: who is timed, who is found out, and what is said of those not installed."""

from __future__ import annotations

import sys

import bench_bandit
import pytest

from optima_fast import bandit


@pytest.fixture
def alone(monkeypatch):
    """Without the other packages, installed or not."""
    for package in bench_bandit.RIVALS:
        monkeypatch.setitem(sys.modules, package, None)


def compare(*names, arms=7):
    return bench_bandit.compare(names, arms, seconds=0.0, least=2, runs=2, rounds=100)


@pytest.mark.usefixtures("alone")
def test_every_policy_is_timed_and_who_is_not_installed_is_named():
    found, samples = compare(*bench_bandit.makers())
    names = {f"{name}, Python" for name in set(bandit.names()) - {"fixed", "greedy"}}
    if bandit.BACKEND == "c++":
        names |= {f"{name}, C++" for name in bench_bandit.TWINS}
    assert set(samples) == {"numpy thompson", *names}
    for name in samples:
        row = found[name]
        assert 1e-5 < row["ms"] < 100
        assert row["ratio"] > 0
        assert row["ours"] == (name != "numpy thompson")
        assert all(0.3 < row[f"earns, {world}"] <= 1 for world in ("stationary", "drifting"))
    for name in ("mabwiser UCB1", "river ThompsonSampling"):
        assert found[name]["left_out"].startswith(f"{name}: ")


def test_what_is_earned_is_of_seven_arms():
    found, _ = compare("random, Python", arms=3)
    assert not any(key.startswith("earns") for key in found["random, Python"])


def test_who_does_not_find_the_best_arm_is_not_timed(monkeypatch):
    class Backwards(bench_bandit.Numpy):
        def update(self, arm, reward):
            super().update(arm, -reward)

    monkeypatch.setattr(bench_bandit, "Numpy", Backwards)
    found, samples = compare("numpy thompson", "random, Python")
    assert (
        "numpy thompson, 7 arms: does not find the best of three"
        in found["numpy thompson"]["failed"]
    )
    assert set(samples) == {"random, Python"}
    assert found["random, Python"]["ratio"] is None


@pytest.mark.skipif(bandit.BACKEND != "c++", reason="the extension is not built")
def test_a_core_that_is_not_its_twin_is_found(monkeypatch):
    ours = bench_bandit.ours

    def other(name, twin, arms, seed):
        return ours(name, twin, arms, seed + (twin and name == "thompson"))

    monkeypatch.setattr(bench_bandit, "ours", other)
    found, samples = compare("thompson, C++", "thompson, Python", "structured-ucb, C++")
    wrong = found["thompson, C++"]["failed"]
    assert wrong == "WRONG: thompson, C++, 7 arms: C++ pulls other arms than its twin"
    assert set(samples) == {"thompson, Python", "structured-ucb, C++"}


def test_what_c_plus_plus_computes_is_what_it_is_timed_for():
    for name in set(bandit.names()) - {"fixed"}:
        cores = [bench_bandit.ours(name, twin, 3, 0)._core for twin in (False, True)]
        different = type(cores[0]) is not type(cores[1])
        assert different == (name in bench_bandit.TWINS and bandit.BACKEND == "c++")


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
