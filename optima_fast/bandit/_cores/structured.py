"""Upper confidence bounds for arms that share units, such as modules or layer groups."""

import math
from collections.abc import Sequence
from typing import Any

from optima_fast.bandit._cores.core import Scaled, argmax

_FADING = 0.99  # of what the noise's variance is learned from


class StructuredUcb(Scaled):
    """Core of ``bandit.StructuredUcb``: a Kalman filter of what arms are worth, a level that walks,
    weights of features that fade, and something of each arm's own that fades. Variances are in
    units of the noise's."""

    def __init__(
        self,
        features: Sequence[Sequence[float]],
        gamma: float,
        width: float,
        prior: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None:
        arms, n = len(features), len(features[0])
        super().__init__(arms, seed, passes, warm_up)
        self._columns = [[row[j] for row in features] for j in range(n)]
        self._gamma = gamma
        self._width = width
        self._prior = prior
        self._trend = trend
        self._own_prior = prior if n else 3.0 * prior
        self._shared_prior = [0.0] * arms
        for column in self._columns:
            for k, x in enumerate(column):
                self._shared_prior[k] += x * x
        self._shared_prior = [prior * square for square in self._shared_prior]
        self._level = [0.0, 0.0]  # the first reward, and what all arms have gained since
        self._noise = [0.0, 0.0]  # sum of squared surprises, and their weight
        self._offset = [0.0] * arms
        self._shared = [*self._shared_prior]  # variance of what an arm shares, and of its own
        self._own = [self._own_prior] * arms
        self._covariance = [
            [(prior if i else 1.0) if i == j else 0.0 for j in range(n + 1)] for i in range(n + 1)
        ]

    def _choose(self) -> int:
        spreads = self._spreads()
        return argmax([x + self._width * spreads[k] for k, x in enumerate(self._offset)])

    def _means(self) -> list[float]:
        return [self._level[0] + (self._level[1] + x) for x in self._offset]

    def _spreads(self) -> list[float]:
        variance = self._noise[0] / self._noise[1] if self._noise[1] > 0.0 else 0.0
        pairs = zip(self._shared, self._own, strict=True)
        return [math.sqrt(variance * (shared + own)) for shared, own in pairs]

    def _rescale(self, shift: int) -> None:
        for values in (self._level, self._offset):
            values[:] = [math.ldexp(x, shift) for x in values]
        self._noise[0] = math.ldexp(self._noise[0], 2 * shift)

    def _learn_scaled(self, a: int, x: float) -> None:
        if self.round == 0:
            self._level[0] = x
        self._fade()

        gain = [*self._covariance[0]]  # of the level and the features: covariance with the arm
        for column, row in zip(self._columns, self._covariance[1:], strict=True):
            gain = [g + column[a] * c for g, c in zip(gain, row, strict=True)]
        reach = [0.0] * self._arms  # covariance of what each arm shares with the arm
        for column, g in zip(self._columns, gain[1:], strict=True):
            reach = [r + value * g for r, value in zip(reach, column, strict=True)]

        inverse = 1.0 / (1.0 + max(0.0, gain[0] + reach[a]) + self._own[a])
        surprise = (x - self._level[0]) - self._level[1] - self._offset[a]
        step = surprise * inverse
        for g, row in zip(gain, self._covariance, strict=True):
            row[:] = [c - g * h * inverse for c, h in zip(row, gain, strict=True)]
        self._level[1] += gain[0] * step
        for k, r in enumerate(reach):
            self._offset[k] += r * step
            self._shared[k] = max(0.0, self._shared[k] - r * r * inverse)
        self._offset[a] += self._own[a] * step
        self._own[a] -= self._own[a] * self._own[a] * inverse
        if self.round > 0:  # the first reward is no surprise: it sets the level
            self._noise[0] = _FADING * self._noise[0] + surprise * step
            self._noise[1] = _FADING * self._noise[1] + 1.0

    def _fade(self) -> None:
        square = self._gamma * self._gamma
        renewed = 1.0 - square
        for k in range(self._arms):
            self._offset[k] *= self._gamma
            self._shared[k] = square * self._shared[k] + renewed * self._shared_prior[k]
            self._own[k] = square * self._own[k] + renewed * self._own_prior
        top = self._covariance[0]
        top[0] += self._trend
        for i, row in enumerate(self._covariance[1:], 1):
            row[:] = [x * square for x in row]
            row[i] += renewed * self._prior
            top[i] *= self._gamma
            row[0] = top[i]

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "level": self._level,
            "noise": self._noise,
            "offset": self._offset,
            "shared": self._shared,
            "own": self._own,
            "covariance": self._covariance,
        }
