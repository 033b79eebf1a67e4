"""A policy for arms that share units: what one arm earns tells of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from itertools import combinations
from typing import Any

from optima_fast.bandit.core import Scaled, argmax, compiled
from optima_fast.bandit.policy import (
    Policy,
    fraction,
    geometric,
    number_of,
    real,
    seeded,
    warm_up,
)

_MAX_UNITS = 12  # the square of their number of pairs is summed in every round
_FADING = 0.99  # of what the noise's variance is learned from


class StructuredUcb(Policy):
    r"""Upper confidence bounds from a Kalman filter of what arms that share units are worth.

    Arms are sets of units, such as modules or layer groups. An arm is worth a level that all share,
    what its units and their pairs are, and something of its own:

    .. math::
        r = b + x_k^\top \theta + o_k + \varepsilon, \qquad \varepsilon \sim N(0, \sigma^2)

    with :math:`x_k` of :math:`(2 u_i - 1) / \sqrt c` for each of c units, :math:`u_i` saying
    whether arm k has it, and :math:`(2 u_i - 1)(2 u_j - 1) / \sqrt{c (c - 1) / 2}` for each pair.
    With each round b walks by a variance of :math:`\beta \sigma^2`, and :math:`\theta` and o fade
    towards :math:`N(0, v \sigma^2)`, from which they start: :math:`\theta \leftarrow \gamma \theta
    + \sqrt{1 - \gamma^2} \, N(0, v \sigma^2)`. All variances below are in units of
    :math:`\sigma^2`: P that of :math:`(b, \theta)`, 1 for b at first, :math:`p_k` that of
    :math:`o_k`. A reward r of arm a changes them, after the fading, by

    .. math::
        g = P \, (1, x_a), \qquad s = 1 + (1, x_a)^\top g + p_a, \qquad
        e = r - b - x_a^\top \theta - o_a \\
        (b, \theta) \leftarrow (b, \theta) + g e / s, \quad P \leftarrow P - g g^\top / s, \quad
        o_a \leftarrow o_a + p_a e / s, \quad p_a \leftarrow p_a - p_a^2 / s

    and :math:`\sigma^2` is the mean of :math:`e^2 / s`, discounted by .99, without the first
    reward, from which b starts. (What o is believed to have to do with b and :math:`\theta` is
    dropped, so that a round takes :math:`O(K c^2 + c^4)` steps and not :math:`O(K^2)`.) The policy
    pulls

    .. math::
        \arg\max_k \; x_k^\top \theta + o_k + w \sigma \sqrt{x_k^\top P_\theta x_k + p_k}

    ``spread`` is the square root times :math:`\sigma`, ``mean`` the rest with b. Choices stay when
    all rewards are multiplied by, or shifted by, a constant: exactly so for powers of two and where
    the rewards' differences do not round. Only the warm-up is random.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        features: 0/1 matrix ``[K, c]`` of at most 12 units, or a string of 0 and 1 for each arm.
            Default: for :math:`K = 2^c - 1` arms the sets of c units in the order of
            ``optima_fast.distill.arms``: by size, then by the position of the members. For other
            numbers of arms, or more units, none: :math:`\theta` is left out, and :math:`o_k` has
            the variance :math:`3 v`.
        gamma: :math:`\gamma` in (0, 1], what a round leaves of the arms' differences.
        width: :math:`w` from 0 to 1e6, standard deviations that an arm is given for its chances.
        prior: :math:`v` from 1e-6 to 1e6, the variance of each part.
        trend: :math:`\beta` from 0 to 1e6, the variance of a step of the level.
        init_rounds: Pulls of each arm first. Default: 1, of ``warmup_limit`` arms at most.
        warmup_limit: The most rounds of these pulls.
        seed: From 0 to 2**64 - 1.

    Source: Bogunovic, Scarlett and Cevher, "Time-varying Gaussian process bandit optimization",
    AISTATS 2016, for the bound and the fading; West and Harrison, "Bayesian forecasting and dynamic
    models", 1997, for variances in units of the noise's; the level, the features and the constants
    are this project's, chosen on the worlds of ``bench/bench_worlds.py``.

    Example:
        >>> policy = StructuredUcb(["a", "b", "a+b"], seed=1)
        >>> for _ in range(100):
        ...     arm = policy.select()
        ...     policy.update(arm, reward=[1e-9, 2e-9, 3e-9][arm])
        >>> policy.count
        [1, 1, 98]
    """

    name = "structured-ucb"

    def __init__(
        self,
        arms: int | Sized,
        *,
        features: Sequence[Sequence[int] | str] | None = None,
        gamma: float = 0.995,
        width: float = 1.4,
        prior: float = 0.1,
        trend: float = 0.0015,
        init_rounds: int | None = None,
        warmup_limit: int = 16,
        seed: int = 0,
    ) -> None:
        arms, gamma, seed = number_of(arms), fraction("gamma", gamma), seeded(seed)
        rows = _subsets(arms) if features is None else _rows(features, arms)
        width, prior = real("width", width, 0.0, 1e6), real("prior", prior, 1e-6, 1e6)
        trend = real("trend", trend, 0.0, 1e6)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            compiled(StructuredUcbCore)(_design(rows), gamma, width, prior, trend, *order, seed),
            arms=arms,
            features=rows,
            gamma=gamma,
            width=width,
            prior=prior,
            trend=trend,
            init_rounds=order[0],
            warmup_limit=warmup_limit,
            seed=seed,
        )

    def _check(self, state: dict[str, Any]) -> None:
        for key in ("shared", "own"):
            # each part of what an arm is worth has a variance of at most 3 v: the sum of squared
            # features, or all of it the arm's own
            for k, variance in enumerate(state[key]):
                if not 0.0 <= variance <= self._settings["prior"] * 3.000001:
                    raise ValueError(
                        f"state must have {key}[{k}] from 0 to three times prior "
                        f"{self._settings['prior']!r}, got {variance!r}"
                    )
        matrix = state["covariance"]
        diagonal = [row[i] for i, row in enumerate(matrix)]
        variances = min(diagonal) >= 0.0
        for i, row in enumerate(matrix):
            for j, x in enumerate(row):
                related = x == matrix[j][i] and x * x <= diagonal[i] * diagonal[j] * 1.000001
                if not (variances and related):
                    raise ValueError(
                        "state must have a symmetric covariance of correlations from -1 to 1, got "
                        f"{x!r} in covariance[{i}][{j}] and {diagonal} on the diagonal"
                    )
        total, weight = state["noise"]
        expected = geometric(_FADING, max(0, state["round"] - 1))
        if total < 0.0 or not math.isclose(weight, expected, rel_tol=1e-6):
            raise ValueError(
                f"state must have noise not negative, and of weight {expected!r} at round "
                f"{state['round']}, got {state['noise']}"
            )


def _rows(features: Sequence[Sequence[int] | str], arms: int) -> list[str]:
    """A 0/1 matrix [arms][units] as a string of 0 and 1 for each arm."""
    digits = {0: "0", 1: "1", "0": "0", "1": "1"}
    rows = ["".join(digits.get(unit, "?") for unit in row) for row in features]
    if len(rows) != arms:
        raise ValueError(f"features must have a row for each of {arms} arms, got {len(rows)}")
    for row in rows:
        if "?" in row or not 1 <= len(row) <= _MAX_UNITS or len(row) != len(rows[0]):
            raise ValueError(
                f"features must have rows of 1 to {_MAX_UNITS} units, each 0 or 1, got {row!r} "
                f"after {rows[0]!r}"
            )
    return rows


def _subsets(arms: int) -> list[str]:
    """Members of the non-empty subsets of c units, by size, then by position; or no units."""
    units = arms.bit_length()
    if arms != 2**units - 1 or units > _MAX_UNITS:
        return [""] * arms
    return [
        "".join("01"[unit in members] for unit in range(units))
        for size in range(1, units + 1)
        for members in combinations(range(units), size)
    ]


def _design(rows: Sequence[str]) -> list[list[float]]:
    """What the filter sees of each arm: units, then pairs, the squares of each adding up to 1."""
    design = []
    for row in rows:
        units = [1.0 if digit == "1" else -1.0 for digit in row]
        pairs = [a * b for a, b in combinations(units, 2)]
        design.append([x / math.sqrt(len(part)) for part in (units, pairs) for x in part])
    return design


class StructuredUcbCore(Scaled):
    """Twin of ``csrc/structured.h``: a Kalman filter of what arms are worth, a level that walks,
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
