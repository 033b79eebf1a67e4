"""A policy for arms that share units: what one arm earns tells of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from itertools import combinations
from typing import Any

from optima_fast.bandit import backend
from optima_fast.bandit.base import (
    ScaledPolicy,
    fraction,
    geometric,
    number_of,
    real,
    rows_of,
    seeded,
    warm_up,
)

_MAX_UNITS = 12  # the square of their number of pairs is summed in every round
_FADING = 0.99  # the core's, of what it learns the noise from


class StructuredUcb(ScaledPolicy):
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
        features: 0/1 matrix [K][c] of at most 12 units, or a string of 0 and 1 for each arm.
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
        rows = _subsets(arms) if features is None else rows_of(features, arms, _MAX_UNITS)
        width, prior = real("width", width, 0.0, 1e6), real("prior", prior, 1e-6, 1e6)
        trend = real("trend", trend, 0.0, 1e6)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            backend.cores.StructuredUcb(_design(rows), gamma, width, prior, trend, *order, seed),
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
        super()._check(state)
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
