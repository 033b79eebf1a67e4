"""Upper confidence bounds that need no scale: choices stay when rewards are scaled or shifted."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any, NamedTuple

from optima_fast.bandit.core import Scaled, argmax, compiled
from optima_fast.bandit.generator import logarithm
from optima_fast.bandit.policy import (
    Policy,
    fraction,
    geometric,
    number_of,
    real,
    seeded,
    warm_up,
)

_FORGOTTEN = 2.0**-100  # an arm's weight below this is 0


class ScaleFreeUcb(Policy):
    r"""Discounted upper confidence bounds with the rewards' own variance.

    For each arm it keeps the discounted number :math:`N_k`, sum :math:`S_k` and sum of squares
    :math:`Q_k` of its rewards. With each round all three are multiplied by :math:`\gamma`; the
    pulled arm then adds 1, :math:`r` and :math:`r^2`. From them

    .. math::
        g = \frac{\sum_k S_k}{\sum_k N_k}, \qquad
        m_k = \frac{S_k + \kappa g}{N_k + \kappa}, \qquad
        \sigma^2 = \frac{\sum_k (Q_k - S_k^2 / N_k)}{\max(1, \sum_k N_k - \sum_k \min(N_k, 1))}

    where g is the prior mean of each arm, worth :math:`\kappa` pulls, and

    .. math:: a = \arg\max_k \; m_k + c \, \sigma \sqrt{2 \ln \max(1, \textstyle\sum_j N_j)
              \, / \, (N_k + \kappa)}

    ``spread`` is the second term. Ties go to the lowest index. (The sums are kept as means and
    squared deviations from them, which do not cancel, in units of a power of two above the largest
    reward, which do not overflow. So choices stay when all rewards are multiplied by, or shifted
    by, a constant: exactly for powers of two, and for shifts in which no difference of rewards
    rounds.)

    Rewards count less a common level b, so that what all arms gain or lose between rounds does not
    pass for a difference between them: the first reward at first, then, with each reward of an arm
    a, :math:`b \leftarrow b + \beta (r - b - S_a / N_a)`, where the statistics have that reward
    already. Estimates of arms contain b again.

    Before the first choice each arm is pulled ``init_rounds`` times in a shuffled order: by default
    once; if there are more arms than ``warmup_limit``, as many different ones are. Nothing else is
    random.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        gamma: :math:`\gamma` in (0, 1], the discount of a round; at 1 nothing is forgotten.
        width: :math:`c` from 0 to 1e6, on the width of the bounds.
        prior: :math:`\kappa` from 1e-6 to 1e6, pulls that the prior mean is worth.
        trend: :math:`\beta` in [0, 1], how fast the common level moves.
        init_rounds: Pulls of each arm first. Default: 1, of ``warmup_limit`` arms at most.
        warmup_limit: The most rounds of these pulls.
        seed: From 0 to 2**64 - 1.

    Source: Garivier and Moulines, "On upper-confidence bound policies for switching bandit
    problems", ALT 2011 (D-UCB), with a pooled standard deviation in place of a known range; the
    level is that of Holt, "Forecasting seasonals and trends by exponentially weighted moving
    averages", 1957, with the arm for the season.

    Example:
        >>> policy = ScaleFreeUcb(2, seed=3)
        >>> for t in range(100):
        ...     arm = policy.select()
        ...     policy.update(arm, reward=1e-9 * ([0.2, 0.8][arm] + 0.1 * (-1) ** (t // 2)))
        >>> policy.count
        [1, 99]
    """

    name = "scale-free-ucb"

    def __init__(
        self,
        arms: int | Sized,
        *,
        gamma: float = 0.99,
        width: float = 0.15,
        prior: float = 0.5,
        trend: float = 0.01,
        init_rounds: int | None = None,
        warmup_limit: int = 32,
        seed: int = 0,
    ) -> None:
        arms, gamma, seed = number_of(arms), fraction("gamma", gamma), seeded(seed)
        width, prior = real("width", width, 0.0, 1e6), real("prior", prior, 1e-6, 1e6)
        trend = real("trend", trend, 0.0, 1.0)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            compiled(ScaleFreeUcbCore)(arms, gamma, width, prior, trend, *order, seed),
            arms=arms,
            gamma=gamma,
            width=width,
            prior=prior,
            trend=trend,
            init_rounds=order[0],
            warmup_limit=warmup_limit,
            seed=seed,
        )

    def _check(self, state: dict[str, Any]) -> None:
        arms = zip(state["count"], state["weight"], state["average"], state["square"], strict=True)
        for k, (n, weight, average, square) in enumerate(arms):
            if not 0.0 <= weight <= n or square < 0.0 or (weight == 0.0 and (average or square)):
                raise ValueError(
                    f"state must have weight[{k}] from 0 to {n} and square[{k}] not negative, and "
                    f"average[{k}] and square[{k}] of 0 at a weight of 0, got {weight!r}, "
                    f"{square!r} and {average!r}"
                )
        rounds = state["round"]
        expected = geometric(self._settings["gamma"], rounds)
        if not math.isclose(math.fsum(state["weight"]), expected, rel_tol=1e-6):
            raise ValueError(
                f"state must have weights that add up to {expected!r} at round {rounds}, got "
                f"{state['weight']}"
            )


class _Summary(NamedTuple):
    """Mean of all arms, and the square of the radius of one whose weight and prior add up to 1."""

    mean: float
    variance: float


class ScaleFreeUcbCore(Scaled):
    """Twin of ``csrc/scale_free.h``: weight, mean and sum of squared deviations of each arm's
    rewards, the old ones fading. Rewards count less the sum of ``level``: the first one, and what
    all arms have gained since."""

    def __init__(
        self,
        arms: int,
        gamma: float,
        width: float,
        prior: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None:
        super().__init__(arms, seed, passes, warm_up)
        self._gamma = gamma
        self._width = width
        self._prior = prior
        self._trend = trend
        self._level = [0.0, 0.0]
        self._weight = [0.0] * arms
        self._average = [0.0] * arms
        self._square = [0.0] * arms

    def _choose(self) -> int:
        every = self._summary()
        return argmax([self._offset(k, every) + self._radius(k, every) for k in range(self._arms)])

    def _means(self) -> list[float]:
        every, (first, gained) = self._summary(), self._level
        offsets = [self._offset(k, every) for k in range(self._arms)]
        return [first + (gained + (every.mean + offset)) for offset in offsets]

    def _spreads(self) -> list[float]:
        every = self._summary()
        return [self._radius(k, every) for k in range(self._arms)]

    def _summary(self) -> _Summary:
        weight = total = square = once = 0.0
        for n, mean, s in zip(self._weight, self._average, self._square, strict=True):
            weight += n
            total += n * mean
            square += s
            once += min(n, 1.0)
        variance = square / max(1.0, weight - once)
        return _Summary(
            total / weight if weight > 0.0 else 0.0,
            variance * (2.0 * logarithm(max(1.0, weight))),
        )

    def _offset(self, k: int, every: _Summary) -> float:
        """Estimate of an arm, from the mean of all, which is worth ``prior`` pulls."""
        n = self._weight[k]
        return n * (self._average[k] - every.mean) / (n + self._prior)

    def _radius(self, k: int, every: _Summary) -> float:
        return self._width * math.sqrt(every.variance / (self._weight[k] + self._prior))

    def _rescale(self, shift: int) -> None:
        for values in (self._level, self._average):
            values[:] = [math.ldexp(x, shift) for x in values]
        self._square[:] = [math.ldexp(x, 2 * shift) for x in self._square]

    def _learn_scaled(self, a: int, x: float) -> None:
        if self.round == 0:
            self._level[0] = x
        for k in range(self._arms):
            self._weight[k] *= self._gamma
            self._square[k] *= self._gamma
            if self._weight[k] < _FORGOTTEN:
                self._weight[k] = self._average[k] = self._square[k] = 0.0
        # apart, so that a shift of all rewards shifts the first number alone
        y = (x - self._level[0]) - self._level[1]
        n, away = self._weight[a], y - self._average[a]
        self._weight[a] = n + 1.0
        self._average[a] += away / (n + 1.0)
        self._square[a] += away * away * (n / (n + 1.0))
        self._level[1] += self._trend * (y - self._average[a])

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "level": self._level,
            "weight": self._weight,
            "average": self._average,
            "square": self._square,
        }
