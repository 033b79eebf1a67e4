"""Bandit: what a select and an update cost from Python, beside MABWiser and River.

    python bench/bench_bandit.py            # the tables, 7 to 255 arms, a minute or two
    python bench/bench_bandit.py --smoke    # two small sizes, seconds

Microseconds of every policy in C++ and in its Python twin, of the paper's as one writes it at first
in numpy, and of what MABWiser and River have for rewards that are real numbers (``pip install
mabwiser river``; without them, without those lines). Before it is timed everyone pulls its arms:
C++ must pull those of its twin, and the others are checked to find the best of three plain arms.
Then what each earns in two worlds of bench/worlds.py, the second of which drifts.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, Protocol
from unittest import mock

import numpy as np
import worlds
from bench_worlds import earned

import optima_fast
from optima_fast import bandit
from optima_fast.bandit import _cores, backend

GAMMA, WARM_UP = 0.98, 2


class Player(Protocol):
    def select(self) -> int: ...
    def update(self, arm: int, reward: float, /) -> None: ...


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
    options = {"gamma": GAMMA, "init_rounds": WARM_UP} if name == "paper" else {}
    with mock.patch.object(backend, "cores", _cores if twin else backend.cores):
        return bandit.make(name, arms, seed=seed, **options)


def rivals() -> tuple[dict[str, Maker], list[str]]:
    """Policies of what is installed, and what to say of it."""
    found: dict[str, Maker] = {}
    said = []
    for package, (player, policies) in RIVALS.items():
        try:
            player(*next(iter(policies.items())), 2, 0)
        except ImportError as error:
            said.append(f"{package} is left out: pip install {package} to compare ({error})")
            continue
        said.append(f"{package} {metadata.version(package)}")
        for policy, options in policies.items():
            found[f"{package} {policy}"] = functools.partial(player, policy, options)
    return found, said


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


def microseconds(step: Callable[[], object], seconds: float) -> list[float]:
    """Time of one step, several times: each over enough steps for the clock."""
    step()
    samples: list[float] = []
    steps = 1
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 3:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        took = time.perf_counter() - start
        if took < 2e-4:  # well below a time slice, so that few samples are interrupted
            steps *= 2
        else:
            samples.append(took / steps * 1e6)
    return samples


def round_time(make: Maker, arms: int, seconds: float) -> float:
    """Median of a select and an update, past the first pulls."""
    player, rewards, means = make(arms, 0), noise(), [0.2 + k / arms for k in range(arms)]
    play(player, min(600, WARM_UP * arms + 220), rewards, means)

    def step() -> None:
        arm = player.select()
        player.update(arm, next(rewards))

    return statistics.median(microseconds(step, seconds))


def fraction(make: Maker, world: worlds.World, runs: int, rounds: int) -> float:
    game = world.play(range(2000, 2000 + runs), 7, rounds, 0.5)
    players: list[Any] = [make(7, seed) for seed in range(runs)]
    return float((earned(players, game) / worlds.oracle(game)).mean())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two small sizes, quickly")
    parser.add_argument("--arms", type=int, nargs="+", default=[7, 63, 255])
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing a cell")
    parser.add_argument("--runs", type=int, default=20, help="of a world")
    parser.add_argument("--json", metavar="FILE", help="append a line a provider")
    args = parser.parse_args(argv)
    rounds = 1000
    if args.smoke:
        args.arms, args.seconds, args.runs, rounds = [3, 7], 0.005, 2, 100

    others, said = rivals()
    facts = {
        "optima_fast": optima_fast.__version__,
        "backend": bandit.BACKEND,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print("  ".join(f"{k} {v}" for k, v in facts.items()))
    print("\n".join(said))

    names = [name for name in bandit.names() if name not in ("fixed", "greedy")]
    wrong = [
        f"{name}, {arms} arms: C++ pulls other arms than its twin"
        for name in names
        for arms in args.arms
        if len({
            tuple(play(ours(name, twin, arms, 3), 2 * arms + 60, noise(), np.arange(arms) / arms))
            for twin in (False, True)
        }) > 1
    ]  # fmt: skip
    wrong += [
        f"{name}: does not find the best of three arms"
        for name, make in {"numpy paper": Numpy, **others}.items()
        if not finds_the_best(make)
    ]
    if wrong:
        print("\n".join(wrong))
        return 1

    makers: dict[str, tuple[Maker | None, Maker]] = {
        name: (
            functools.partial(ours, name, False) if bandit.BACKEND == "c++" else None,
            functools.partial(ours, name, True),
        )
        for name in names
    }
    makers |= {name: (None, make) for name, make in {"numpy paper": Numpy, **others}.items()}
    plain = {"stationary": worlds.Scripted("stationary")}
    plain["drifting"] = worlds.Scripted("drifting", worlds.drift)
    head = [f"{arms} arms, {kind}" for arms in args.arms for kind in ("C++", "Python")]
    head += [f"earns, {world}" for world in plain]
    print(f"\nMicroseconds of select and update; fraction of the oracle, {rounds} rounds")
    print(f"\n| {' | '.join(['policy', *head])} |")
    print("|---" * (len(head) + 1) + "|")
    for name, pair in makers.items():
        times = [
            round_time(make, arms, args.seconds) if make else math.nan
            for arms in args.arms
            for make in pair
        ]
        fastest = pair[0] or pair[1]
        shares = [fraction(fastest, world, args.runs, rounds) for world in plain.values()]
        cells = ["" if math.isnan(t) else f"{t:.2f}" if t < 10 else f"{t:.0f}" for t in times]
        print(f"| {' | '.join([name, *cells, *(f'{share:.3f}' for share in shares)])} |")
        if args.json:
            values = dict(zip(head, [*times, *shares], strict=True))
            values = {k: v for k, v in values.items() if not math.isnan(v)}
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "policy": name, **values}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
