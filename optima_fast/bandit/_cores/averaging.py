"""Policies that keep plain averages: the paper's, and its baselines."""

import math
from typing import Any

from optima_fast.bandit._cores.core import Core, argmax
from optima_fast.bandit._generator import CHOICE, uniform


class Averages(Core):
    """Averages the rewards of each arm."""

    def __init__(self, arms: int, seed: int, passes: int = 0, warm_up: int = 0) -> None:
        super().__init__(arms, seed, passes, warm_up)
        self._total = [0.0] * arms
        self._mean = [0.0] * arms

    @property
    def mean(self) -> list[float]:
        return [*self._mean]

    def _learn(self, k: int, reward: float) -> None:
        total = self._total[k] + reward
        if not math.isfinite(total):
            raise ValueError(f"rewards of arm {k} must have a finite sum, got {reward!r} more")
        self._total[k] = total
        self._mean[k] = total / (self.count[k] + 1)

    def _lists(self) -> dict[str, list[Any]]:
        return {"total": self._total, "mean": self._mean}


class Random(Averages):
    """Core of ``bandit.Random``."""

    def _choose(self) -> int:
        return int(uniform(self._seed, self.round, 0, CHOICE) * self._arms)


class Fixed(Averages):
    """Core of ``bandit.Fixed``."""

    def __init__(self, arms: int, arm: int) -> None:
        super().__init__(arms, 0)
        self._arm = arm

    def _choose(self) -> int:
        return self._arm


class RoundRobin(Averages):
    """Core of ``bandit.RoundRobin``."""

    def __init__(self, arms: int) -> None:
        super().__init__(arms, 0)

    def _choose(self) -> int:
        return self.round % self._arms


class GaussianThompson(Averages):
    """Core of ``bandit.GaussianThompson``: ``total`` sums the rewards of the initialisation."""

    def __init__(
        self, arms: int, gamma: float, init_rounds: int, variance_scale: float, seed: int
    ) -> None:
        super().__init__(arms, seed, init_rounds, arms * init_rounds)
        self._gamma = gamma
        self._variance_scale = variance_scale

    @property
    def spread(self) -> list[float]:
        return [math.sqrt(self._variance_scale / (n + 1)) for n in self.count]

    def _choose(self) -> int:
        spreads = self.spread
        return argmax([m + spreads[k] * self._draw(k) for k, m in enumerate(self._mean)])

    def _learn(self, k: int, reward: float) -> None:
        if self.round < len(self._order):
            super()._learn(k, reward)
        else:
            self._mean[k] = self._gamma * self._mean[k] + (1.0 - self._gamma) * reward
