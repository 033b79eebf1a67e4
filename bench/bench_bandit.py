"""Bandit: the cost of one select and one update, called from Python.

    python bench/bench_bandit.py            # the table, 7 to 255 arms
    python bench/bench_bandit.py --smoke    # two small cells; CI runs this

Providers: the C++ core, its Python twin, and the few lines of numpy that one writes at first. Each
first pulls its arms and is checked: the cores against each other, arm by arm and bit by bit; numpy,
which has its own generator, by its pull shares. One that is wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

import optima_fast
from optima_fast import _bandit_py, bandit

GAMMA, WARM_UP, SEED = 0.98, 2, 0


class Player(Protocol):
    def select(self) -> int: ...
    def update(self, arm: int, reward: float, /) -> None: ...


class Numpy:
    """Eq. 2 and 7 as written at first: no checks, no state, a generator that keeps a position."""

    def __init__(self, arms: int) -> None:
        self.rng = np.random.default_rng(SEED)
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


def policy(arms: int, *, twin: bool) -> bandit.GaussianThompson:
    made = bandit.GaussianThompson(arms, gamma=GAMMA, init_rounds=WARM_UP, seed=SEED)
    if twin:
        made._core = _bandit_py.GaussianThompson(arms, GAMMA, WARM_UP, 1.0, SEED)
    return made


PROVIDERS: dict[str, Callable[[int], Player]] = {
    "c++": functools.partial(policy, twin=False),
    "python": functools.partial(policy, twin=True),
    "numpy": Numpy,
}


def play(player: Player, arms: int, rounds: int) -> list[int]:
    pulls = []
    for _ in range(rounds):
        pulls.append(player.select())
        player.update(pulls[-1], 3.0 * pulls[-1] / arms)
    return pulls


def wrong(name: str, pulls: list[int], reference: list[int], arms: int) -> str:
    """Why these pulls are not those of the policy; empty if they are."""
    if name != "numpy":
        return "" if pulls == reference else "arms differ from the Python twin's"
    upper = [sum(arm >= arms // 2 for arm in p) / len(p) for p in (pulls, reference)]
    return "" if abs(upper[0] - upper[1]) < 0.1 else f"pulls the better half {upper[0]:.2f}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two small cells, quickly")
    parser.add_argument("--arms", type=int, nargs="+", default=[7, 63, 255])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a cell")
    parser.add_argument("--json", metavar="FILE", help="append one line a cell")
    args = parser.parse_args()
    if args.smoke:
        args.arms, args.seconds = [2, 7], 0.02

    versions = {
        "optima_fast": optima_fast.__version__,
        "backend": bandit.BACKEND,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    print("  ".join(f"{k} {v}" for k, v in versions.items()), f" {time.strftime('%Y-%m-%d')}")
    print(f"{'arms':>4} {'provider':>8} {'select us':>10} {'select + update us':>20}  IQR")
    failed = False
    for arms in args.arms:
        rounds = 20 * arms + 200
        reference = play(PROVIDERS["python"](arms), arms, rounds)
        for name, make in PROVIDERS.items():
            if name == "c++" and bandit.BACKEND != "c++":
                print(f"{arms:4d} {name:>8} not built")
                continue
            player = make(arms)
            if reason := wrong(name, play(player, arms, rounds), reference, arms):
                failed = True
                print(f"{arms:4d} {name:>8} WRONG ({reason})")
                continue

            def step(player: Player = player) -> None:
                player.update(player.select(), 0.5)

            select = statistics.median(microseconds(player.select, args.seconds))
            both = microseconds(step, args.seconds)
            low, median, high = statistics.quantiles(both, n=4)
            print(f"{arms:4d} {name:>8} {select:10.2f} {median:20.2f}  {low:.2f}-{high:.2f}")
            if args.json:
                cell = {"arms": arms, "provider": name, "select_us": select, "round_us": median}
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**versions, **cell}) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
