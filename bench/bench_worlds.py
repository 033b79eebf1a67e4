"""Bandit policies in simulated worlds: what they earn, as a fraction of what the oracle earns.

    python bench/bench_worlds.py            # the tables, minutes
    python bench/bench_worlds.py --smoke    # few worlds and runs, seconds
    python bench/bench_worlds.py --part many --policies structured-ucb random

Policies are those of optima_fast.bandit and the contenders of bench/policies.py, compared with
``thompson``, the paper's, run by run: the same world, seed and noise. Parts: ``suite``, all of them
in every world at 7 arms, 1,000 rounds, noise half as large as the rewards; ``range``, the best and
the paper's over noise and rounds; ``many``, worlds of 63 and 255 arms that are subsets of 6 and 8
units. bench/worlds.py says what the worlds are. ``greedy`` is left out: it is for rewards that are
known of every arm. Figures are the same on every machine but for what numpy's versions draw.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TextIO

import numpy as np
import policies
import worlds as w
from numpy.typing import NDArray
from policies import Player
from worlds import Closed, Game, Scripted, World

import optima_fast
from optima_fast import bandit

Array = NDArray[np.float64]

DEFAULT = "structured-ucb"
REFERENCE = "thompson"

# The defaults' constants were chosen on these, with other seeds,
TUNED: tuple[World, ...] = (
    Scripted("stationary"),
    Scripted("drifting", w.drift),
    Scripted("abrupt", w.abrupt),
    Scripted("decaying", level=w.hyperbola, fading=2.5),
    Scripted("correlated", w.drift, w.additive, w.hyperbola),
    Scripted("heavy tails", w.drift, noise=w.heavy),
    Scripted("early rush", w.drift, level=w.rush),
    Scripted("common trend", w.drift, shift=w.trend),
    Closed("flattening", w.Flattening),
)
# had a look at on these before they were settled,
LOOKED_AT: tuple[World, ...] = (
    Scripted("seasonal", w.season, level=w.hyperbola),
    Scripted("swap", w.swap),
    Scripted("lone arm", w.lone),
    Scripted("clipped", w.drift, level=w.hyperbola, clipped=True),
    Scripted("outliers", w.abrupt, w.additive, noise=w.outliers),
    Scripted("steady noise", w.drift, level=w.linear, steady=True),
    Scripted("signed walk", w.abrupt, level=w.hyperbola, shift=w.walk),
    Scripted("overlap", w.drift, w.union),
    Scripted("best member", w.drift, w.best_member, w.hyperbola),
    Scripted("shared", w.abrupt, w.shared),
    Scripted("mixed", w.drift, w.mixed),
    Closed("rotting", w.Rotting),
)
# and never tried on these.
HELD_OUT: tuple[World, ...] = (
    Scripted("late bloomer", w.bloom),
    Scripted("crossing", w.crossing, level=w.hyperbola, noise=w.skewed),
    Scripted("one by one", w.one_by_one),
    Scripted("wandering", w.wandering, level=w.linear),
    Scripted("uneven noise", w.drift, noise=w.uneven),
    Scripted("restarts", w.drift, level=w.restarts),
    Scripted("weakest member", w.drift, w.weakest_member, w.hyperbola),
    Closed("tiring", w.Tired),
)
# The same for more arms, which are sets of units. In all but one they have something in common.
MANY_TUNED: tuple[World, ...] = (
    Scripted("many constant", w.constant, w.additive),
    Scripted("many drifting", w.drift, w.additive),
    Scripted("many abrupt", w.abrupt, w.additive, w.hyperbola),
    Scripted("many seasonal", w.season, w.additive, w.hyperbola),
    Scripted("many overlapping", w.drift, w.union),
    Scripted("many best", w.drift, w.best_member, w.hyperbola),
    Scripted("many shared", w.abrupt, w.shared),
    Scripted("many mixed", w.drift, w.mixed),
    Scripted("many, trend", w.drift, w.additive, w.hyperbola, shift=w.trend),
    Scripted("many unrelated", w.drift),
    Closed("many flattening", w.Flattening),
)
MANY_HELD_OUT: tuple[World, ...] = (
    Scripted("many one by one", w.one_by_one, w.additive),
    Scripted("many weakest", w.drift, w.weakest_member),
    Scripted("many crossing", w.crossing, w.union, w.hyperbola, w.skewed),
    Scripted("many restarts", w.drift, w.mixed, w.restarts, w.uneven),
)
GROUPS = {
    "tuned on": TUNED + MANY_TUNED,
    "looked at": LOOKED_AT,
    "held out": HELD_OUT + MANY_HELD_OUT,
}


@dataclass(frozen=True)
class Cell:
    """One world at one size, and who plays in it."""

    part: str
    world: World
    policies: tuple[str, ...]
    runs: int
    arms: int = 7
    rounds: int = 1000
    noise: float = 0.5
    first_seed: int = 0

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.runs)


def earned(players: Sequence[Player], game: Game) -> Array:
    """What each player earns over its run of the game, [runs]."""
    game.restart()
    total = np.zeros(game.runs)
    for _ in range(game.rounds):
        pulled = [player.select() for player in players]
        seen, value = game.step(np.array(pulled))
        total += value
        for player, arm, reward in zip(players, pulled, seen.tolist(), strict=True):
            player.update(arm, reward)
    return total


def play(cell: Cell) -> dict[str, Array]:
    """Fraction of the oracle that every policy earns, [runs] each."""
    game = cell.world.play(cell.seeds, cell.arms, cell.rounds, cell.noise)
    best = w.oracle(game)
    return {
        name: earned([policies.make(name, cell.arms, seed) for seed in cell.seeds], game) / best
        for name in cell.policies
    }


def below(fractions: dict[str, Array], name: str) -> float:
    """Percent of runs in which a policy earns less than the paper's."""
    return 100 * float((fractions[name] < fractions[REFERENCE]).mean())


def pooled(results: Iterable[dict[str, Array]]) -> dict[str, Array]:
    every = list(results)
    return {name: np.concatenate([r[name] for r in every]) for name in every[0]}


def cells(args: argparse.Namespace) -> list[Cell]:
    """Everything to play."""
    worlds, many = TUNED + LOOKED_AT + HELD_OUT, MANY_TUNED + MANY_HELD_OUT
    noises, lengths = [0.15, 0.5, 1.0, 1.5], [250, 1000, 4000]
    sizes, rounds = {63: args.runs // 3, 255: args.runs // 6}, 1000
    if args.smoke:
        worlds, many = (TUNED[0], TUNED[-1], LOOKED_AT[0], HELD_OUT[-1]), MANY_TUNED[1:2]
        noises, lengths, sizes, rounds = [0.5], [250], {63: 2}, 250
    everyone = tuple(dict.fromkeys((REFERENCE, *args.policies)))
    base = Cell("suite", worlds[0], everyone, args.runs, rounds=rounds, first_seed=args.first_seed)
    pair = replace(base, part="range", policies=(REFERENCE, args.default))
    parts = {
        "suite": [replace(base, world=world) for world in worlds],
        "range": [
            replace(pair, world=world, rounds=length, noise=noise)
            for length in lengths
            for noise in noises
            for world in worlds
        ],
        "many": [
            replace(base, part=f"many {arms}", world=world, runs=max(2, runs), arms=arms)
            for arms, runs in sizes.items()
            for world in many
        ],
    }
    return [cell for part in args.part for cell in parts[part]]


Done = list[tuple[Cell, dict[str, Array]]]


def row(head: str, values: Iterable[str]) -> None:
    print(f"| {' | '.join([head, *values])} |")


def suite(done: Done) -> None:
    """Policies by groups of worlds, then worlds by policies."""
    cell, names = done[0][0], list(done[0][1])
    groups = {
        key: pooled(group)
        for key, worlds in GROUPS.items()
        if (group := [result for c, result in done if c.world in worlds])
    }
    every = pooled(groups.values())
    print(
        f"\nFraction of the oracle: {cell.arms} arms, {cell.rounds} rounds, noise {cell.noise:g}, "
        f"{len(done)} worlds of {cell.runs} runs\n"
    )
    row("policy", [*groups, "all", "worst world", f"% of runs below {REFERENCE}"])
    print("|---" * (len(groups) + 4) + "|")
    for name in sorted(names, key=lambda name: -every[name].mean()):
        worst = min(float(result[name].mean()) for _, result in done)
        means = [f"{group[name].mean():.3f}" for group in (*groups.values(), every)]
        row(name, [*means, f"{worst:.3f}", f"{below(every, name):.1f}"])
    print()
    row("world", [name.replace("scale-free", "sf") for name in names])
    print("|---" * (len(names) + 1) + "|")
    for cell, result in done:
        row(cell.world.name, [f"{result[name].mean():.3f}" for name in names])


def spread(done: Done, name: str) -> None:
    """One policy beside the paper's over noise and rounds, means over the worlds."""
    noises = list(dict.fromkeys(cell.noise for cell, _ in done))
    runs = done[0][0].runs
    print(f"\n{name} / {REFERENCE} (% of runs below), means over all worlds of {runs} runs\n")
    row("rounds", [f"noise {noise:g}" for noise in noises])
    print("|---" * (len(noises) + 1) + "|")
    for rounds in dict.fromkeys(cell.rounds for cell, _ in done):
        texts = []
        for noise in noises:
            here = pooled(r for cell, r in done if (cell.rounds, cell.noise) == (rounds, noise))
            mean, reference = here[name].mean(), here[REFERENCE].mean()
            texts.append(f"{mean:.3f} / {reference:.3f} ({below(here, name):.1f})")
        row(str(rounds), texts)


def save(file: TextIO, facts: dict[str, Any], done: Done) -> None:
    """A line of JSON for each world and policy."""
    for cell, result in done:
        size = {k: getattr(cell, k) for k in ("part", "arms", "rounds", "noise", "runs")}
        for name, fraction in result.items():
            line = {**facts, "world": cell.world.name, **size, "policy": name}
            line |= {"mean": float(fraction.mean()), "lowest": float(fraction.min())}
            file.write(json.dumps({**line, "below_thompson": below(result, name)}) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["suite", "range", "many"]
    known = policies.names()
    parser.add_argument("--smoke", action="store_true", help="few worlds, short runs")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--policies", nargs="+", choices=known, default=known)
    parser.add_argument("--default", choices=known, default=DEFAULT, help="policy of part range")
    parser.add_argument("--runs", type=int, help="of a world at 7 arms (default: 60; smoke: 8)")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", metavar="FILE", help="append a line a world and policy")
    args = parser.parse_args(argv)
    args.runs = args.runs or (8 if args.smoke else 60)

    facts = {
        "optima_fast": optima_fast.__version__,
        "backend": bandit.BACKEND,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print("  ".join(f"{key} {value}" for key, value in facts.items()))
    todo = cells(args)
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs) as pool:
            results = list(pool.map(play, todo))
    else:
        results = [play(cell) for cell in todo]
    done = list(zip(todo, results, strict=True))
    for part in dict.fromkeys(cell.part for cell in todo):
        here = [(cell, result) for cell, result in done if cell.part == part]
        if part == "range":
            spread(here, args.default)
        else:
            suite(here)
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            save(file, facts, done)
    over = [
        f"{cell.world.name}: {name}"
        for cell, result in done
        for name, fraction in result.items()
        if isinstance(cell.world, Scripted) and fraction.max() > 1 + 1e-9
    ]
    if over:
        print("more than the oracle earns:", "; ".join(over))
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
