r"""Policies whose choices stay when all rewards are multiplied by, or shifted by, a constant.

They keep, for each arm, the discounted number :math:`N_k`, sum :math:`S_k` and sum of squares
:math:`Q_k` of its rewards. With each round all three are multiplied by :math:`\gamma`; the pulled
arm then adds 1, :math:`r` and :math:`r^2`. From them

.. math::
    g = \frac{\sum_k S_k}{\sum_k N_k}, \qquad
    m_k = \frac{S_k + \kappa g}{N_k + \kappa}, \qquad
    \sigma^2 = \frac{\sum_k (Q_k - S_k^2 / N_k)}{\max(1, \sum_k N_k - \sum_k \min(N_k, 1))}

where g is the prior mean of each arm, worth :math:`\kappa` pulls. (The sums are kept as means and
squared deviations from them, which do not cancel, in units of a power of two above the largest
reward, which do not overflow. Invariance is exact for powers of two; other factors, and shifts,
round, but for shifts in which no difference of rewards does.) Ties go to the lowest index.

Rewards count less a common level b, so that what all arms gain or lose between rounds does not pass
for a difference between them: the first reward at first, then, with each reward of an arm a,
:math:`b \leftarrow b + \beta (r - b - S_a / N_a)`, where the statistics have that reward already;
``trend`` is :math:`\beta`, 0 turns it off. Estimates of arms contain b again. (It is the level of
Holt, "Forecasting seasonals and trends by exponentially weighted moving averages", 1957, with the
arm for the season.)

Before the first choice each arm is pulled ``init_rounds`` times in a shuffled order: by default
once; if there are more arms than ``warmup_limit``, as many different ones are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any

from optima_fast.bandit import backend
from optima_fast.bandit.base import (
    ScaledPolicy,
    fraction,
    geometric,
    integer,
    number_of,
    real,
    seeded,
    warm_up,
)

_MAX_WINDOW = 2**16


class _Discounting(ScaledPolicy):
    """State of a policy on discounted statistics."""

    def _check(self, state: dict[str, Any]) -> None:
        super()._check(state)
        _check_discounted(self._settings["gamma"], state)


class ScaleFreeThompson(_Discounting):
    r"""Thompson sampling with discounted means and the rewards' own variance.

    .. math::
        \hat r_k \sim N\big(m_k, \; c^2 \sigma^2 / (N_k + \kappa)\big), \qquad
        a = \arg\max_k \hat r_k

    with the statistics of this module; the second argument of N is the variance.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        gamma: :math:`\gamma` in (0, 1], the discount of a round; at 1 nothing is forgotten.
        width: :math:`c` from 0 to 1e6, on the standard deviation of the draws.
        prior: :math:`\kappa` from 1e-6 to 1e6, pulls that the prior mean is worth.
        trend: :math:`\beta` in [0, 1], how fast the common level moves.
        init_rounds: Pulls of each arm first. Default: 1, of ``warmup_limit`` arms at most.
        warmup_limit: The most rounds of these pulls.
        seed: From 0 to 2**64 - 1.

    Source: Raj and Kalyani, "Taming non-stationary bandits: a Bayesian approach", 2017, for the
    discounted posterior; Honda and Takemura, "Optimality of Thompson sampling for Gaussian bandits
    depends on priors", AISTATS 2014, for an unknown variance, which is pooled and plugged in here.

    Example:
        >>> policy = ScaleFreeThompson(2, seed=3)
        >>> for t in range(100):
        ...     arm = policy.select()
        ...     policy.update(arm, reward=1e-9 * ([0.2, 0.8][arm] + 0.1 * (-1) ** (t // 2)))
        >>> policy.count
        [1, 99]
    """

    name = "scale-free-thompson"

    def __init__(
        self,
        arms: int | Sized,
        *,
        gamma: float = 0.99,
        width: float = 0.2,
        prior: float = 0.5,
        trend: float = 0.01,
        init_rounds: int | None = None,
        warmup_limit: int = 32,
        seed: int = 0,
    ) -> None:
        arms, gamma, seed = number_of(arms), fraction("gamma", gamma), seeded(seed)
        width, prior, trend = _width(width), _prior(prior), _trend(trend)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            backend.cores.ScaleFreeThompson(arms, gamma, width, prior, trend, *order, seed),
            arms=arms,
            gamma=gamma,
            width=width,
            prior=prior,
            trend=trend,
            init_rounds=order[0],
            warmup_limit=warmup_limit,
            seed=seed,
        )


class ScaleFreeUcb(_Discounting):
    r"""Discounted upper confidence bounds with the rewards' own variance.

    .. math:: a = \arg\max_k \; m_k + c \, \sigma \sqrt{2 \ln \max(1, \textstyle\sum_j N_j)
              \, / \, (N_k + \kappa)}

    with the statistics of this module. ``spread`` is the second term. Only the warm-up is random.

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
    problems", ALT 2011 (D-UCB), with a pooled standard deviation in place of a known range.
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
        width, prior, trend = _width(width), _prior(prior), _trend(trend)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            backend.cores.ScaleFreeUcb(arms, gamma, width, prior, trend, *order, seed),
            arms=arms,
            gamma=gamma,
            width=width,
            prior=prior,
            trend=trend,
            init_rounds=order[0],
            warmup_limit=warmup_limit,
            seed=seed,
        )


class SlidingWindowUcb(ScaledPolicy):
    r"""``ScaleFreeUcb`` on the last W rewards, each with the weight 1, in place of discounted ones.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        window: W, from 1 to 65536 rounds, over which a round's time grows.
        width: :math:`c` from 0 to 1e6, on the width of the bounds.
        prior: :math:`\kappa` from 1e-6 to 1e6, pulls that the prior mean is worth.
        init_rounds: Pulls of each arm first. Default: 1, of ``warmup_limit`` arms at most.
        warmup_limit: The most rounds of these pulls.
        seed: From 0 to 2**64 - 1.

    Source: Garivier and Moulines, "On upper-confidence bound policies for switching bandit
    problems", ALT 2011 (SW-UCB), with a pooled standard deviation in place of a known range, and
    a prior mean for arms outside the window, which would be pulled at once there.
    """

    name = "sliding-window-ucb"

    def __init__(
        self,
        arms: int | Sized,
        *,
        window: int = 200,
        width: float = 0.15,
        prior: float = 0.5,
        init_rounds: int | None = None,
        warmup_limit: int = 32,
        seed: int = 0,
    ) -> None:
        arms, seed = number_of(arms), seeded(seed)
        window = integer("window", window, 1, _MAX_WINDOW)
        width, prior = _width(width), _prior(prior)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            backend.cores.SlidingWindowUcb(arms, window, width, prior, *order, seed),
            arms=arms,
            window=window,
            width=width,
            prior=prior,
            init_rounds=order[0],
            warmup_limit=warmup_limit,
            seed=seed,
        )

    def _check(self, state: dict[str, Any]) -> None:
        super()._check(state)
        pulled, reward = state["pulled"], state["reward"]
        filled = min(state["round"], len(pulled))
        for slot, (k, x) in enumerate(zip(pulled, reward, strict=True)):
            seen = slot < filled
            if k >= self.arms or abs(x) > 1.0 or not (seen or k == x == 0):
                raise ValueError(
                    f"state must have an arm below {self.arms} in pulled[{slot}] and from -1 to 1 "
                    f"in reward[{slot}], 0 beyond round {state['round']}, got {k} and {x!r}"
                )
        for k, n in enumerate(state["count"]):
            here = pulled[:filled].count(k)
            if here > n or (here < n and filled == state["round"]):
                raise ValueError(f"state must have count[{k}] pulls of arm {k}, got {n} and {here}")


class EpsilonGreedy(_Discounting):
    r"""The arm of the largest :math:`m_k`; with probability :math:`\epsilon` a uniform one.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        epsilon: :math:`\epsilon` in [0, 1].
        gamma: :math:`\gamma` in (0, 1], the discount of a round; at 1 nothing is forgotten.
        prior: :math:`\kappa` from 1e-6 to 1e6, pulls that the prior mean is worth.
        trend: :math:`\beta` in [0, 1], how fast the common level moves.
        init_rounds: Pulls of each arm first. Default: 1, of ``warmup_limit`` arms at most.
        warmup_limit: The most rounds of these pulls.
        seed: From 0 to 2**64 - 1.

    Source: Sutton and Barto, "Reinforcement learning: an introduction", 2018, chapter 2, with
    discounted means for rewards that drift.
    """

    name = "epsilon-greedy"

    def __init__(
        self,
        arms: int | Sized,
        *,
        epsilon: float = 0.1,
        gamma: float = 0.99,
        prior: float = 0.5,
        trend: float = 0.01,
        init_rounds: int | None = None,
        warmup_limit: int = 32,
        seed: int = 0,
    ) -> None:
        arms, gamma, seed = number_of(arms), fraction("gamma", gamma), seeded(seed)
        epsilon, prior = real("epsilon", epsilon, 0.0, 1.0), _prior(prior)
        trend = _trend(trend)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            backend.cores.EpsilonGreedy(arms, epsilon, gamma, prior, trend, *order, seed),
            arms=arms,
            epsilon=epsilon,
            gamma=gamma,
            prior=prior,
            trend=trend,
            init_rounds=order[0],
            warmup_limit=warmup_limit,
            seed=seed,
        )


class DiscountBank(ScaledPolicy):
    r"""``ScaleFreeThompson`` under several discounts, each believed as far as it predicts.

    Before a reward is learned, member i, with its own statistics, predicts it and gains evidence

    .. math::
        E_i \leftarrow f E_i - \tfrac12 \ln v_i - \tfrac12 \min\big(25, (r - m_{ia})^2 / v_i\big),
        \qquad v_i = \sigma_i^2 \big(1 + 1 / (N_{ia} + \kappa)\big)

    unless some :math:`\sigma_i` is still 0. A round draws a member with probability
    :math:`\propto e^{E_i}`, then the arm as that member does. ``mean`` and ``spread`` are those of
    the mixture.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        gammas: The discounts, 1 to 16 numbers in (0, 1].
        width: :math:`c` from 0 to 1e6, on the standard deviation of the draws.
        prior: :math:`\kappa` from 1e-6 to 1e6, pulls that the prior mean is worth.
        trend: :math:`\beta` in [0, 1], how fast each member's common level moves.
        forget: :math:`f` in (0, 1], the discount of the evidence.
        init_rounds: Pulls of each arm first. Default: 1, of ``warmup_limit`` arms at most.
        warmup_limit: The most rounds of these pulls.
        seed: From 0 to 2**64 - 1.

    Source: Raftery, Karny and Ettler, "Online prediction under model uncertainty via dynamic model
    averaging", Technometrics 52, 2010, for the weights.
    """

    name = "discount-bank"

    def __init__(
        self,
        arms: int | Sized,
        *,
        gammas: Sequence[float] = (0.9, 0.97, 0.99, 0.997),
        width: float = 0.2,
        prior: float = 0.5,
        trend: float = 0.01,
        forget: float = 0.99,
        init_rounds: int | None = None,
        warmup_limit: int = 32,
        seed: int = 0,
    ) -> None:
        arms, seed = number_of(arms), seeded(seed)
        if not 1 <= len(gammas) <= 16:
            raise ValueError(f"gammas must be 1 to 16 discounts, got {gammas!r}")
        discounts = [fraction(f"gammas[{i}]", gamma) for i, gamma in enumerate(gammas)]
        width, prior, trend = _width(width), _prior(prior), _trend(trend)
        forget = fraction("forget", forget)
        order = warm_up(arms, init_rounds, warmup_limit)
        super().__init__(
            backend.cores.DiscountBank(arms, discounts, width, prior, trend, forget, *order, seed),
            arms=arms,
            gammas=discounts,
            width=width,
            prior=prior,
            trend=trend,
            forget=forget,
            init_rounds=order[0],
            warmup_limit=warmup_limit,
            seed=seed,
        )

    def _check(self, state: dict[str, Any]) -> None:
        super()._check(state)
        for i, gamma in enumerate(self._settings["gammas"]):
            member = {key: state[key][i] for key in ("weight", "average", "square")}
            _check_discounted(gamma, state | member)
        if max(state["evidence"]) != 0.0:
            raise ValueError(
                f"state must have evidence of which the largest is 0, got {state['evidence']}"
            )


def _trend(trend: float) -> float:
    return real("trend", trend, 0.0, 1.0)


def _width(width: float) -> float:
    return real("width", width, 0.0, 1e6)


def _prior(prior: float) -> float:
    return real("prior", prior, 1e-6, 1e6)


def _check_discounted(gamma: float, state: dict[str, Any]) -> None:
    arms = zip(state["count"], state["weight"], state["average"], state["square"], strict=True)
    for k, (n, weight, average, square) in enumerate(arms):
        if not 0.0 <= weight <= n or square < 0.0 or (weight == 0.0 and (average or square)):
            raise ValueError(
                f"state must have weight[{k}] from 0 to {n} and square[{k}] not negative, and "
                f"average[{k}] and square[{k}] of 0 at a weight of 0, got {weight!r}, {square!r} "
                f"and {average!r}"
            )
    rounds = state["round"]
    expected = geometric(gamma, rounds)
    if not math.isclose(math.fsum(state["weight"]), expected, rel_tol=1e-6):
        raise ValueError(
            f"state must have weights that add up to {expected!r} at round {rounds}, got "
            f"{state['weight']}"
        )
