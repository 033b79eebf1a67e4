"""Bandit: what a select and an update cost from Python, beside MABWiser and River.

    pytest bench/bench_bandit.py --benchmark-only            # 7 to 255 arms
    pytest bench/bench_bandit.py --benchmark-only --quick    # two small sizes, seconds

Every policy in C++, where it is, and in Python, the paper's as one writes it at first in numpy, and
what MABWiser and River have for rewards that are real numbers (``pip install mabwiser river``;
without them, without those). Before they are timed all pull their arms: C++ must pull those of its
twin, and the others are checked to find the best of three plain arms. At 7 arms ``extra_info`` has
what each earns in two worlds of bench/worlds.py, of the oracle's reward; the second drifts.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import worlds
from bench_worlds import earned
from measuring import Row, Step, Timer, interleave, ratio, spread
from policies import Player

from optima_fast import bandit
from optima_fast.bandit import core

GAMMA, WARM_UP = 0.98, 2
TWINS = ("thompson", "structured-ucb", "scale-free-ucb")  # the policies that C++ computes
Maker = Callable[[int, int], Player]  # of arms and a seed


class Numpy:
    """Eq. 2 and 7 as written at first: no checks, no state, a generator that keeps a position."""

    def __init__(self, arms: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.mean = np.zeros(arms)
        self.count = np.zeros(arms, dtype=int)
        self.order = self.rng.permutation(np.repeat(np.arange(arms), WARM_UP))
        self.round = 0

    def select(self) -> int:
        if self.round < len(self.order):
            return int(self.order[self.round])
        return int(self.rng.normal(self.mean, 1 / np.sqrt(self.count + 1)).argmax())

    def update(self, arm: int, reward: float) -> None:
        if self.round < len(self.order):
            self.mean[arm] += (reward - self.mean[arm]) / (self.count[arm] + 1)
        else:
            self.mean[arm] = GAMMA * self.mean[arm] + (1 - GAMMA) * reward
        self.count[arm] += 1
        self.round += 1


class MabWiser:
    """A policy of MABWiser, which wants a reward before it chooses."""

    def __init__(self, policy: str, options: dict[str, Any], arms: int, seed: int) -> None:
        mab = importlib.import_module("mabwiser.mab")
        self.arms, self.round = arms, 0
        made = getattr(mab.LearningPolicy, policy)(**options)
        self.mab = mab.MAB(list(range(arms)), made, seed=seed)

    def select(self) -> int:
        return self.round if self.round < self.arms else int(self.mab.predict())

    def update(self, arm: int, reward: float) -> None:
        learn = self.mab.partial_fit if self.round else self.mab.fit
        learn([arm], [reward])
        self.round += 1


class River:
    """A policy of River; ``burn_in`` pulls each arm first."""

    def __init__(self, policy: str, options: dict[str, Any], arms: int, seed: int) -> None:
        river = importlib.import_module("river.bandit")
        if "reward_obj" in options:
            law = getattr(importlib.import_module("river.proba"), options["reward_obj"])
            options = {**options, "reward_obj": law()}
        self.arms = list(range(arms))
        self.policy = getattr(river, policy)(seed=seed, **options)

    def select(self) -> int:
        return int(self.policy.pull(self.arms))

    def update(self, arm: int, reward: float) -> None:
        self.policy.update(arm, reward)


RIVALS: dict[str, tuple[Callable[..., Player], dict[str, dict[str, Any]]]] = {
    "mabwiser": (
        MabWiser,
        {"UCB1": {"alpha": 1.0}, "EpsilonGreedy": {"epsilon": 0.1}, "Softmax": {"tau": 0.1}},
    ),
    "river": (
        River,
        {
            "UCB": {"delta": 1.0, "burn_in": 1},
            "EpsilonGreedy": {"epsilon": 0.1, "burn_in": 1},
            "ThompsonSampling": {"reward_obj": "Gaussian", "burn_in": 2},
        },
    ),
}


def ours(name: str, twin: bool, arms: int, seed: int) -> Player:
    options = {"gamma": GAMMA, "init_rounds": WARM_UP} if name == "thompson" else {}
    with mock.patch.object(core, "extension", None if twin else core.extension):
        return bandit.make(name, arms, seed=seed, **options)


def makers() -> dict[str, Maker]:
    """By name; of a package that is not installed too, since its tests say so."""
    names = [name for name in bandit.names() if name not in ("fixed", "greedy")]
    found: dict[str, Maker] = {"numpy thompson": Numpy}
    found |= {f"{name}, C++": functools.partial(ours, name, False) for name in TWINS}
    found |= {f"{name}, Python": functools.partial(ours, name, True) for name in names}
    for package, (player, policies) in RIVALS.items():
        for policy, options in policies.items():
            found[f"{package} {policy}"] = functools.partial(player, policy, options)
    return found


def play(
    player: Player, rounds: int, rewards: Iterator[float], means: Sequence[float]
) -> list[int]:
    pulls = []
    for _ in range(rounds):
        pulls.append(player.select())
        player.update(pulls[-1], means[pulls[-1]] + next(rewards))
    return pulls


def noise(seed: int = 0) -> Iterator[float]:
    return itertools.cycle((0.1 * np.random.default_rng(seed).standard_normal(997)).tolist())


def finds_the_best(make: Maker) -> bool:
    """Of three plain arms, oftener than by chance."""
    pulls = play(make(3, 1), 600, noise(), [0.0, 3.0, 0.5])
    return pulls.count(1) > 300


def pulls(name: str, twin: bool, arms: int) -> list[int]:
    return play(ours(name, twin, arms, 3), 2 * arms + 60, noise(), [k / arms for k in range(arms)])


def fault(name: str, arms: int) -> str:
    """What is wrong with a player, or nothing."""
    policy, _, language = name.partition(", ")
    if not language:
        return "" if finds_the_best(makers()[name]) else "does not find the best of three arms"
    same = language == "Python" or pulls(policy, False, arms) == pulls(policy, True, arms)
    return "" if same else "C++ pulls other arms than its twin"


def a_round(make: Maker, arms: int) -> Step:
    """A select and an update, past the first pulls."""
    player, rewards, means = make(arms, 0), noise(), [0.2 + k / arms for k in range(arms)]
    play(player, min(600, WARM_UP * arms + 220), rewards, means)

    def step() -> None:
        player.update(player.select(), next(rewards))

    return step


WORLDS = {
    "stationary": worlds.Scripted("stationary"),
    "drifting": worlds.Scripted("drifting", worlds.drift),
}


def fraction(make: Maker, world: worlds.World, runs: int, rounds: int) -> float:
    game = world.play(range(2000, 2000 + runs), 7, rounds, 0.5)
    players: list[Any] = [make(7, seed) for seed in range(runs)]
    return float((earned(players, game) / worlds.oracle(game)).mean())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = (3, 7) if metafunc.config.option.quick else (7, 63, 255)
    metafunc.parametrize("name", makers())
    metafunc.parametrize("arms", sizes)


def compare(
    names: Sequence[str], arms: int, *, seconds: float, least: int, runs: int, rounds: int
) -> tuple[dict[str, Row], dict[str, list[float]]]:
    """A row and samples in milliseconds of each, or what is wrong with it."""
    found: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name in names:
        try:
            if name.endswith("C++") and bandit.BACKEND != "c++":
                raise ImportError("the extension is not built")
            wrong = fault(name, arms)
        except ImportError as error:
            found[name] = {"left_out": f"{name}: {error}"}
            continue
        if wrong:
            found[name] = {"failed": f"WRONG: {name}, {arms} arms: {wrong}"}
            continue
        steps[name] = a_round(makers()[name], arms)
    samples = interleave(steps, Timer("cpu"), seconds=seconds, least=least)
    anchor = "numpy thompson" if "numpy thompson" in steps else None
    for name in steps:
        found[name] = {
            "case": f"{arms} arms",
            "provider": name,
            "ours": ", " in name,
            **spread(samples[name])._asdict(),
            "anchor": anchor,
            "ratio": anchor and ratio(samples[name], samples[anchor]),
        }
        if arms == 7:
            found[name] |= {
                f"earns, {label}": fraction(makers()[name], world, runs, rounds)
                for label, world in WORLDS.items()
            }
    return found, samples


def test_round(arms: int, name: str, pytestconfig: pytest.Config, side_by_side: Any) -> None:
    option = pytestconfig.option
    few = option.quick or option.benchmark_disable

    def measure(names: Sequence[str]) -> Any:
        return compare(
            names,
            arms,
            seconds=0.0 if few else 0.2 * float(option.benchmark_max_time) * len(names),
            least=2 if few else option.benchmark_min_rounds,
            runs=2 if few else 20,
            rounds=100 if few else 1000,
        )

    side_by_side(f"{arms} arms", measure)
