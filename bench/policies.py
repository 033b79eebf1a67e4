"""Contenders of bench_worlds.py that optima_fast.bandit does not have: their arithmetic alone.

Discounted statistics, the common level and the prior mean are those of
optima_fast.bandit.ScaleFreeUcb, whose docstring has their formulas.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optima_fast import bandit

Array = NDArray[np.float64]
WARM_UP = 32  # the most arms that are pulled before any choice


class Player(Protocol):
    def select(self) -> int: ...
    def update(self, arm: int, reward: float, /) -> None: ...


class Contender:
    """Different arms in a random order first; then what a subclass chooses."""

    def __init__(self, arms: int, seed: int, warm_up: int = WARM_UP) -> None:
        self.arms, self.round = arms, 0
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(arms)[:warm_up]

    def select(self) -> int:
        return int(self.order[self.round] if self.round < len(self.order) else self.choose())

    def update(self, arm: int, reward: float) -> None:
        self.learn(arm, reward)
        self.round += 1

    def choose(self) -> int | np.intp:
        raise NotImplementedError

    def learn(self, arm: int, reward: float) -> None:
        raise NotImplementedError


class Statistics:
    """N, S and Q of each arm's rewards less the common level, and what follows from them."""

    def __init__(
        self, arms: int, gamma: float = 0.99, prior: float = 0.5, trend: float = 0.01
    ) -> None:
        self.gamma, self.prior, self.trend = gamma, prior, trend
        self.n, self.s, self.q = self.sums = np.zeros((3, arms))
        self.level: float | None = None

    def learn(self, arm: int, reward: float) -> None:
        self.level = reward if self.level is None else self.level
        y = reward - self.level
        self.sums *= self.gamma
        self.sums[:, arm] += 1.0, y, y * y
        self.level += self.trend * (y - self.s[arm] / self.n[arm])

    @property
    def weight(self) -> Array:
        return np.asarray(self.n + self.prior)

    @property
    def mean(self) -> Array:
        centre = self.s.sum() / max(self.n.sum(), 1e-300)
        return np.asarray((self.level or 0.0) + (self.s + self.prior * centre) / self.weight)

    @property
    def variance(self) -> float:
        """Within the arms."""
        within = (self.q - self.s**2 / np.maximum(self.n, 1e-300)).sum()
        return float(max(0.0, within) / max(1.0, self.n.sum() - np.minimum(self.n, 1).sum()))

    def draw(self, width: float, rng: np.random.Generator) -> np.intp:
        """The best arm of a draw from N(mean, width^2 variance / weight)."""
        spread = width * np.sqrt(self.variance / self.weight)
        return (self.mean + spread * rng.standard_normal(len(self.n))).argmax()


class ScaleFreeThompson(Contender):
    """Thompson sampling with discounted means and the rewards' own variance.

    Source: Raj and Kalyani, "Taming non-stationary bandits: a Bayesian approach", 2017; Honda and
    Takemura, "Optimality of Thompson sampling for Gaussian bandits depends on priors", 2014.
    """

    width = 0.2

    def __init__(self, arms: int, seed: int) -> None:
        super().__init__(arms, seed)
        self.statistics = Statistics(arms)

    def choose(self) -> np.intp:
        return self.statistics.draw(self.width, self.rng)

    def learn(self, arm: int, reward: float) -> None:
        self.statistics.learn(arm, reward)


class EpsilonGreedy(Contender):
    """The largest discounted mean; with probability epsilon any arm.

    Source: Sutton and Barto, "Reinforcement learning: an introduction", 2018, chapter 2.
    """

    epsilon = 0.1

    def __init__(self, arms: int, seed: int) -> None:
        super().__init__(arms, seed)
        self.statistics = Statistics(arms)

    def choose(self) -> int | np.intp:
        if self.rng.random() < self.epsilon:
            return int(self.rng.integers(self.arms))
        return self.statistics.mean.argmax()

    def learn(self, arm: int, reward: float) -> None:
        self.statistics.learn(arm, reward)


class SlidingWindowUcb(Contender):
    """ScaleFreeUcb on the last rewards, each of weight 1. Source: Garivier and Moulines, 2011."""

    window, width = 200, 0.15

    def __init__(self, arms: int, seed: int) -> None:
        super().__init__(arms, seed)
        self.seen: deque[tuple[int, float]] = deque(maxlen=self.window)

    def choose(self) -> np.intp:
        s = Statistics(self.arms, gamma=1.0, trend=0.0)
        pulled, rewards = zip(*self.seen, strict=True)
        s.level = rewards[0]
        y = np.array(rewards) - s.level
        s.sums[:] = [np.bincount(pulled, w, self.arms) for w in (np.ones_like(y), y, y * y)]
        bound = s.variance * 2.0 * math.log(len(y)) / s.weight
        return (s.mean + self.width * np.sqrt(bound)).argmax()

    def learn(self, arm: int, reward: float) -> None:
        self.seen.append((arm, reward))


class DiscountBank(Contender):
    """ScaleFreeThompson under several discounts, each believed as far as it predicts.

    Source: Raftery, Karny and Ettler, "Online prediction under model uncertainty via dynamic model
    averaging", 2010.
    """

    gammas, forget, width = (0.9, 0.97, 0.99, 0.997), 0.99, 0.2

    def __init__(self, arms: int, seed: int) -> None:
        super().__init__(arms, seed)
        self.members = [Statistics(arms, gamma) for gamma in self.gammas]
        self.evidence = np.zeros(len(self.members))

    @property
    def belief(self) -> Array:
        likelihood = np.exp(self.evidence - self.evidence.max())
        return np.asarray(likelihood / likelihood.sum())

    def choose(self) -> np.intp:
        member = self.members[self.rng.choice(len(self.members), p=self.belief)]
        return member.draw(self.width, self.rng)

    def learn(self, arm: int, reward: float) -> None:
        v = np.array([m.variance * (1.0 + 1.0 / m.weight[arm]) for m in self.members])
        if v.min() > 0.0:
            away = np.array([reward - m.mean[arm] for m in self.members])
            gained = -0.5 * np.log(v) - 0.5 * np.minimum(25.0, away**2 / v)
            self.evidence = self.forget * self.evidence + gained
            self.evidence -= self.evidence.max()
        for member in self.members:
            member.learn(arm, reward)


class Exp3S(Contender):
    """Exponential weights with sharing, on rewards stretched to [0, 1].

    Source: Auer, Cesa-Bianchi, Freund and Schapire, "The nonstochastic multiarmed bandit problem",
    2002, section 8.
    """

    mix, share = 0.1, 1e-3

    def __init__(self, arms: int, seed: int) -> None:
        super().__init__(arms, seed, warm_up=0)
        self.weight = np.full(arms, 1.0 / arms)
        self.low, self.high = math.inf, -math.inf

    @property
    def probability(self) -> Array:
        return np.asarray((1.0 - self.mix) * self.weight + self.mix / self.arms)

    def choose(self) -> int:
        return int(self.rng.choice(self.arms, p=self.probability))

    def learn(self, arm: int, reward: float) -> None:
        self.low, self.high = min(self.low, reward), max(self.high, reward)
        width = self.high - self.low
        x = (reward - self.low) / width if width else 0.5
        self.weight[arm] *= math.exp(self.mix * x / (self.arms * self.probability[arm]))
        self.weight += math.e * self.share / self.arms
        self.weight /= self.weight.sum()


CONTENDERS: dict[str, type[Contender]] = {
    "scale-free-thompson": ScaleFreeThompson,
    "discount-bank": DiscountBank,
    "sliding-window-ucb": SlidingWindowUcb,
    "epsilon-greedy": EpsilonGreedy,
    "exp3s": Exp3S,
}


def names() -> tuple[str, ...]:
    """Who can play without being told of an arm or of all: the library's policies, the others."""
    library = [name for name in bandit.names() if name not in ("fixed", "greedy")]
    return *library, *CONTENDERS


def make(name: str, arms: int, seed: int) -> Player:
    """A policy of the library, or a contender."""
    if name in CONTENDERS:
        return CONTENDERS[name](arms, seed)
    return bandit.make(name, arms, seed=seed)
