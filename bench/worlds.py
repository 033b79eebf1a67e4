"""Worlds that pay a bandit as rounds of distillation do, many runs at once.

The best arm of a run pays .02 to .2 a round at first; the others down to a fifth of it, so that a
uniform choice earns about two thirds of what is there. A seed fixes a run and the noise of every
arm in every round, so policies are compared on the same runs. Noise is in units of the mean over
the arms of what they pay in that round: at 1 it is as large as the rewards, as measured.

What is earned is the expected reward of the arm pulled, without its noise and without what shifts
all arms alike. The oracle pulls the best arm of every round; where pulls change what comes (the
closed loops), it is the greedy one on its own run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rng = np.random.Generator


class Game(Protocol):
    """A batch of runs of one world, played in step."""

    runs: int
    arms: int
    rounds: int

    def restart(self) -> None: ...
    def values(self) -> Array:
        """Expected reward of every arm in this round, [runs, arms]."""
        ...

    def step(self, pulled: NDArray[np.intp]) -> tuple[Array, Array]:
        """Rewards as seen and as earned, both [runs]; goes on to the next round."""
        ...


class World(Protocol):
    @property
    def name(self) -> str: ...
    def play(self, seeds: Sequence[int], arms: int, rounds: int, noise: float) -> Game: ...


def oracle(game: Game) -> Array:
    """What the best arm of every round earns over a run, [runs]."""
    game.restart()
    total = np.zeros(game.runs)
    for _ in range(game.rounds):
        total += game.step(game.values().argmax(axis=1))[1]
    return total


def subsets(arms: int) -> Array:
    """0/1 [arms, units] of the non-empty subsets in the order of optima_fast.distill.arms."""
    units = arms.bit_length()
    if arms != 2**units - 1:
        raise ValueError(f"arms must be 2**units - 1, got {arms}")
    sets = [s for size in range(1, units + 1) for s in combinations(range(units), size)]
    return np.array([[float(u in s) for u in range(units)] for s in sets])


def bell(x: Array) -> Array:
    """The normal CDF to three digits: standard normal to uniform."""
    return 0.5 + 0.5 * np.tanh(0.79788456 * (x + 0.044715 * x**3))


# How standard normal numbers move: (generator, rounds, how many) -> [rounds, how many].


def constant(rng: Rng, rounds: int, n: int) -> Array:
    return np.tile(rng.standard_normal(n), (rounds, 1))


def drift(rng: Rng, rounds: int, n: int) -> Array:
    """Ornstein-Uhlenbeck, correlated over half the run."""
    keep = np.exp(-2.0 / rounds)
    steps = rng.standard_normal((rounds, n)) * np.sqrt(1 - keep**2)
    steps[0] = rng.standard_normal(n)
    fade = keep ** np.arange(rounds)[:, None]
    return np.asarray(fade * np.cumsum(steps / fade, axis=0))


def season(rng: Rng, rounds: int, n: int) -> Array:
    """Half to two periods over the run, around levels of their own."""
    a, b, level = rng.standard_normal((3, n))
    phase = 2 * np.pi * rng.uniform(0.5, 2.0, n) * np.linspace(0, 1, rounds)[:, None]
    return np.asarray(0.8 * (a * np.cos(phase) + b * np.sin(phase)) + 0.6 * level)


def abrupt(rng: Rng, rounds: int, n: int) -> Array:
    """All drawn anew one to four times."""
    cuts = rng.uniform(0.1, 0.95, rng.integers(1, 5))
    segment = (np.arange(rounds)[:, None] > cuts * rounds).sum(axis=1)
    return np.asarray(rng.standard_normal((len(cuts) + 1, n))[segment])


def swap(rng: Rng, rounds: int, n: int) -> Array:
    """The best becomes the worst, once; nothing else changes."""
    z = constant(rng, rounds, n)
    z[int(rounds * rng.uniform(0.3, 0.7)) :, z[0].argmax()] = z[0].min()
    return z


def lone(rng: Rng, rounds: int, n: int) -> Array:
    """One good arm among poor ones; another one later."""
    z = np.tile(0.2 * rng.standard_normal(n) - 0.7, (rounds, 1))
    cut = int(rounds * rng.uniform(0.3, 0.7))
    first, second = rng.integers(n, size=2)
    z[:cut, first] = z[cut:, second] = 1.3
    return z


def bloom(rng: Rng, rounds: int, n: int) -> Array:
    """The worst climbs to the top over the middle of the run."""
    z = constant(rng, rounds, n)
    late = z[0].argmin()
    climb = np.clip(np.linspace(-1, 2, rounds), 0, 1)
    z[:, late] += climb * (z[0].max() + 0.7 - z[0, late])
    return z


def crossing(rng: Rng, rounds: int, n: int) -> Array:
    """Straight lines from one draw to another."""
    ends, t = rng.standard_normal((2, n)), np.linspace(0, 1, rounds)[:, None]
    return np.asarray((1 - t) * ends[0] + t * ends[1])


def one_by_one(rng: Rng, rounds: int, n: int) -> Array:
    """Each drawn anew at times of its own, twice on average."""
    segment = (rng.random((rounds, n)) < 2 / rounds).cumsum(axis=0)
    return np.take_along_axis(rng.standard_normal((segment.max() + 1, n)), segment, axis=0)


def wandering(rng: Rng, rounds: int, n: int) -> Array:
    """Random walks, which end further apart than they start."""
    steps = rng.standard_normal((rounds, n)) * 1.5 / np.sqrt(rounds)
    return np.asarray(0.5 * rng.standard_normal(n) + np.cumsum(steps, axis=0))


Process = Callable[[Rng, int, int], Array]

# How the arms' shares of the best reward, .2 to 1, come from a process: [rounds, arms].


def independent(rng: Rng, process: Process, rounds: int, arms: int) -> Array:
    return np.asarray(0.2 + 0.8 * bell(process(rng, rounds, arms)))


def additive(rng: Rng, process: Process, rounds: int, arms: int) -> Array:
    """Units carry 75 % of the variance, their pairs 18 %, the arm itself 7 %."""
    x = subsets(arms)
    units = x.shape[1]
    pairs = np.array([x[:, i] * x[:, j] for i, j in combinations(range(units), 2)]).T
    main = (x - 0.5) * 2 / np.sqrt(units)
    both = (pairs - 0.25) / np.sqrt(3 / 16 * pairs.shape[1])
    parts = np.hstack([np.sqrt(0.75) * main, np.sqrt(0.18) * both, np.sqrt(0.07) * np.eye(arms)])
    return np.asarray(0.2 + 0.8 * bell(process(rng, rounds, parts.shape[1]) @ parts.T))


def _between(value: Array) -> Array:
    low, high = value.min(axis=1, keepdims=True), value.max(axis=1, keepdims=True)
    return np.asarray(0.2 + 0.75 * (value - low) / (high - low))


def union(rng: Rng, process: Process, rounds: int, arms: int) -> Array:
    """Units that overlap: what one gives, another cannot give again."""
    x = subsets(arms)
    unit = 0.1 + 0.8 * bell(process(rng, rounds, x.shape[1]))
    return _between(1 - np.exp(np.log(1 - unit) @ x.T))


def best_member(rng: Rng, process: Process, rounds: int, arms: int) -> Array:
    """The best unit counts, and every unit costs."""
    x = subsets(arms)
    unit = 0.1 + 0.8 * bell(process(rng, rounds, x.shape[1]))
    return _between((x * unit[:, None]).max(axis=2) - 0.12 * x.sum(axis=1))


def weakest_member(rng: Rng, process: Process, rounds: int, arms: int) -> Array:
    """The weakest unit counts, and every unit adds a little."""
    x = subsets(arms)
    unit = 0.1 + 0.8 * bell(process(rng, rounds, x.shape[1]))
    return _between(np.where(x > 0, unit[:, None], 1.0).min(axis=2) + 0.15 * x.sum(axis=1))


def shared(rng: Rng, process: Process, rounds: int, arms: int) -> Array:
    """Units share one capacity."""
    x = subsets(arms)
    unit = 0.1 + 0.8 * bell(process(rng, rounds, x.shape[1]))
    return _between(unit @ x.T / x.sum(axis=1) ** rng.uniform(0.4, 1.0))


def mixed(rng: Rng, process: Process, rounds: int, arms: int) -> Array:
    """Half units, half the arm's own."""
    x = subsets(arms)
    z = process(rng, rounds, x.shape[1] + arms)
    main = (bell(z[:, : x.shape[1]]) - 0.5) @ x.T * 2 / np.sqrt(x.shape[1])
    return _between(main + 0.3 * z[:, x.shape[1] :])


# What the best arm pays over the run, as a share of its start: (generator, rounds) -> [rounds].


def flat(rng: Rng, rounds: int) -> Array:
    return np.ones(rounds)


def hyperbola(rng: Rng, rounds: int) -> Array:
    return np.asarray(0.1 + 0.9 / (1 + np.linspace(0, 1, rounds) * rng.uniform(5, 30)))


def linear(rng: Rng, rounds: int) -> Array:
    return np.linspace(1.02, 0.02, rounds)


def rush(rng: Rng, rounds: int) -> Array:
    """The first rounds pay up to four times as much."""
    return np.asarray(1 + 3 * np.exp(-np.arange(rounds) / rng.uniform(15, 60)))


def restarts(rng: Rng, rounds: int) -> Array:
    """Falls to a third, two to five times, as with a learning rate that restarts."""
    return np.asarray(1 - 2 / 3 * (np.linspace(0, rng.integers(2, 6), rounds) % 1))


# Noise of mean 0 and variance 1: (generator, shape) -> shape.


def normal(rng: Rng, shape: tuple[int, int]) -> Array:
    return rng.standard_normal(shape)


def heavy(rng: Rng, shape: tuple[int, int]) -> Array:
    return np.asarray(rng.standard_t(3, shape) / np.sqrt(3))


def outliers(rng: Rng, shape: tuple[int, int]) -> Array:
    return np.asarray(rng.standard_normal(shape) * np.where(rng.random(shape) < 0.02, 6.0, 0.53))


def skewed(rng: Rng, shape: tuple[int, int]) -> Array:
    return np.asarray(rng.exponential(size=shape) - 1)


def uneven(rng: Rng, shape: tuple[int, int]) -> Array:
    """Some arms are five times as noisy as others."""
    size = rng.uniform(0.3, 1.5, shape[1])
    return np.asarray(rng.standard_normal(shape) * size / np.sqrt((size**2).mean()))


# What all arms' rewards gain or lose alike, in units of their mean: (generator, rounds) ->
# [rounds].


def nothing(rng: Rng, rounds: int) -> Array:
    return np.zeros(rounds)


def trend(rng: Rng, rounds: int) -> Array:
    t, (base, periods, phase) = np.linspace(0, 1, rounds), rng.uniform((-3, 0.3, 0), (1, 1.5, 1))
    return np.asarray(base + 2 * np.sin(2 * np.pi * (periods * t + phase)))


def walk(rng: Rng, rounds: int) -> Array:
    return np.asarray(np.cumsum(rng.standard_normal(rounds)) * 2 / np.sqrt(rounds) - 1)


@dataclass(frozen=True)
class Scripted:
    """What arms pay does not depend on the pulls."""

    name: str
    process: Process = constant
    structure: Callable[[Rng, Process, int, int], Array] = independent
    level: Callable[[Rng, int], Array] = flat
    noise: Callable[[Rng, tuple[int, int]], Array] = normal
    shift: Callable[[Rng, int], Array] = nothing
    fading: float = 0.0  # each arm decays at a rate of its own, from 0 to this over the run
    clipped: bool = False  # rewards below 0 are seen as 0, as in Eq. 6
    steady: bool = False  # noise of the whole run's size, not of the round's

    def play(self, seeds: Sequence[int], arms: int, rounds: int, noise: float) -> Game:
        return _Script([self._run(seed, arms, rounds, noise) for seed in seeds])

    def _run(self, seed: int, arms: int, rounds: int, noise: float) -> tuple[Array, Array]:
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed])
        top = np.exp(rng.uniform(np.log(0.02), np.log(0.2)))
        value = self.structure(rng, self.process, rounds, arms)
        faded = np.linspace(0, 1, rounds)[:, None] * rng.uniform(0, self.fading, arms)
        value = value * np.exp(-faded)
        value *= top * self.level(rng, rounds)[:, None]
        mean = value.mean(axis=1, keepdims=True)
        size = mean.mean() if self.steady else mean
        seen = value + noise * size * self.noise(rng, value.shape)
        if self.clipped:
            seen = np.maximum(seen, 0.0)
        return value, seen + value.mean() * self.shift(rng, rounds)[:, None]


class _Script:
    def __init__(self, tables: list[tuple[Array, Array]]) -> None:
        self.value, self.seen = (np.stack(table) for table in zip(*tables, strict=True))
        self.runs, self.rounds, self.arms = self.value.shape
        self.each = np.arange(self.runs)
        self.round = 0

    def restart(self) -> None:
        self.round = 0

    def values(self) -> Array:
        return np.asarray(self.value[:, self.round])

    def step(self, pulled: NDArray[np.intp]) -> tuple[Array, Array]:
        at = self.each, self.round, pulled
        self.round += 1
        return self.seen[at], self.value[at]


class Loop:
    """A closed loop: what arms pay depends on the pulls before."""

    def __init__(
        self, name: str, seeds: Sequence[int], arms: int, rounds: int, noise: float
    ) -> None:
        rngs = [np.random.default_rng([zlib.crc32(name.encode()), seed]) for seed in seeds]
        self.runs, self.arms, self.rounds = len(rngs), arms, rounds
        self.noise = noise * np.stack([rng.standard_normal((rounds, arms)) for rng in rngs])
        self.each = np.arange(self.runs)
        self.setup(lambda draw: np.stack([draw(rng) for rng in rngs]))
        self.restart()

    def setup(self, drawn: Callable[[Callable[[Rng], Array]], Array]) -> None:
        raise NotImplementedError

    def values(self) -> Array:
        raise NotImplementedError

    def change(self, pulled: NDArray[np.intp]) -> None:
        raise NotImplementedError

    def restart(self) -> None:
        self.round = 0
        self.effort = np.zeros((self.runs, self.width))

    @property
    def width(self) -> int:
        return self.arms

    def step(self, pulled: NDArray[np.intp]) -> tuple[Array, Array]:
        value = self.values()
        earned = value[self.each, pulled]
        seen = earned + value.mean(axis=1) * self.noise[self.each, self.round, pulled]
        self.change(pulled)
        self.round += 1
        return seen, earned


class Rotting(Loop):
    """Every pull of an arm makes it pay less, by a power law of its own."""

    def setup(self, drawn: Callable[[Callable[[Rng], Array]], Array]) -> None:
        top = drawn(lambda rng: np.exp(rng.uniform(np.log(0.02), np.log(0.2), 1)))
        self.start = top * drawn(lambda rng: rng.uniform(0.2, 1.0, self.arms))
        pace = drawn(lambda rng: np.exp(rng.uniform(np.log(0.03), np.log(0.5), self.arms)))
        self.pace = pace * self.rounds
        self.power = drawn(lambda rng: rng.uniform(0.3, 1.0, self.arms))

    def values(self) -> Array:
        return np.asarray(self.start * (1 + self.effort / self.pace) ** -self.power)

    def change(self, pulled: NDArray[np.intp]) -> None:
        self.effort[self.each, pulled] += 1


class Tired(Rotting):
    """A pulled arm tires and recovers while others are pulled."""

    def change(self, pulled: NDArray[np.intp]) -> None:
        self.effort *= 1 - 4 / self.rounds
        super().change(pulled)


class Flattening(Loop):
    """Losses of units that flatten as they are trained: an arm pays the relative drop of their sum.

    The units of an arm share its effort, which shrinks with the learning rate; losses fall by power
    laws towards floors. Drops are those of rounds as long as 50 of the whole run hold.
    """

    def setup(self, drawn: Callable[[Callable[[Rng], Array]], Array]) -> None:
        self.sets = subsets(self.arms)
        units = self.width
        self.weight = drawn(lambda rng: rng.dirichlet(np.full(units, 3.0)))
        self.power = drawn(lambda rng: rng.uniform(0.3, 1.2, units))
        pace = drawn(lambda rng: np.exp(rng.uniform(np.log(0.02), np.log(0.3), units)))
        self.pace = pace * self.rounds
        share = drawn(lambda rng: rng.uniform(0.3, 1.0, 1))
        self.each_gets = self.sets.sum(axis=1) ** -share
        self.floor = drawn(lambda rng: rng.uniform(0.0, 0.3, units))

    @property
    def width(self) -> int:
        return self.arms.bit_length()

    def gains(self) -> Array:
        """Effort of each unit if an arm is pulled now, [runs, arms, units]."""
        rate = 1 - 0.9 * self.round / self.rounds
        return np.asarray(rate * self.each_gets[:, :, None] * self.sets)

    def losses(self, effort: Array) -> Array:
        fallen = (1 + effort / self.pace[:, None]) ** -self.power[:, None]
        left = self.floor[:, None] + (1 - self.floor[:, None]) * fallen
        return np.asarray((self.weight[:, None] * left).sum(axis=2))

    def values(self) -> Array:
        now, then = (self.losses(self.effort[:, None] + gain) for gain in (0.0, self.gains()))
        return np.asarray(self.rounds / 50 * (1 - then / now))

    def change(self, pulled: NDArray[np.intp]) -> None:
        self.effort += self.gains()[self.each, pulled]


@dataclass(frozen=True)
class Closed:
    """What arms pay depends on the pulls before."""

    name: str
    loop: type[Loop]

    def play(self, seeds: Sequence[int], arms: int, rounds: int, noise: float) -> Game:
        return self.loop(self.name, seeds, arms, rounds, noise)
