"""The policies of the paper, its baselines, and exponential weights."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from optima_fast.bandit import backend
from optima_fast.bandit._cores import finite
from optima_fast.bandit.base import (
    MAX_ROUNDS,
    CorePolicy,
    ScaledPolicy,
    fraction,
    integer,
    number_of,
    real,
    seeded,
)


class _Averaging(CorePolicy):
    """A policy whose ``mean`` is the plain average of an arm's rewards."""

    def _check(self, state: dict[str, Any]) -> None:
        count, total, mean = state["count"], state["total"], state["mean"]
        if self._averages(state["round"]):
            for k, (n, t, m) in enumerate(zip(count, total, mean, strict=True)):
                if m != t / max(1, n) or (n == 0 and t != 0.0):
                    raise ValueError(
                        f"state must have mean[{k}] = total[{k}] / count[{k}], got {m!r}, {t!r} "
                        f"and {n}"
                    )

    def _averages(self, round: int) -> bool:
        """Whether the means at this round are plain averages of all rewards."""
        return True


class GaussianThompson(_Averaging):
    r"""Thompson sampling with a Gaussian posterior and a forgetting mean: the paper's policy.

    The first :math:`K T_0` rounds pull each of the K arms :math:`T_0` times in a shuffled order;
    then :math:`\mu_k` is the average of the arm's rewards, :math:`n_k` their number. From there on

    .. math::
        \hat r_k \sim N(\mu_k, \; v / (n_k + 1)), \qquad a = \arg\max_k \hat r_k \\
        \mu_a \leftarrow \gamma \mu_a + (1 - \gamma) r, \qquad n_a \leftarrow n_a + 1

    where the second argument of N is the variance. Ties go to the lowest index.

    The initialisation lasts :math:`K T_0` updates, whichever arms they are of: an update of an arm
    other than the proposed one counts for the arm it names, and an arm without any starts from
    :math:`\mu_k = 0, n_k = 0`, as all do with ``init_rounds=0``.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        gamma: :math:`\gamma` in (0, 1], the weight of the old mean.
        init_rounds: :math:`T_0`, pulls of each arm before the first draw.
        variance_scale: :math:`v \ge 0`; at 0 the largest mean is pulled.
        seed: From 0 to 2**64 - 1.

    Source: Liang et al., "Module-wise Adaptive Distillation for Multimodality Foundation Models",
    NeurIPS 2023, Eq. 2 and 7; the variance is that of Agrawal and Goyal, "Near-optimal regret
    bounds for Thompson sampling", JACM 2017.

    Example:
        >>> policy = GaussianThompson(2, init_rounds=1, seed=3)
        >>> for _ in range(100):
        ...     arm = policy.select()
        ...     policy.update(arm, reward=[0.2, 0.8][arm])
        >>> policy.count
        [8, 92]
    """

    name = "paper"

    def __init__(
        self,
        arms: int | Sized,
        *,
        gamma: float = 0.98,
        init_rounds: int = 10,
        variance_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        arms = number_of(arms)
        gamma = fraction("gamma", gamma)
        init_rounds = integer("init_rounds", init_rounds, 0, MAX_ROUNDS // arms)
        variance_scale = finite("variance_scale", variance_scale)
        if variance_scale < 0.0:
            raise ValueError(f"variance_scale must not be negative, got {variance_scale!r}")
        seed = seeded(seed)
        self._init_updates = arms * init_rounds
        super().__init__(
            backend.cores.GaussianThompson(arms, gamma, init_rounds, variance_scale, seed),
            arms=arms,
            gamma=gamma,
            init_rounds=init_rounds,
            variance_scale=variance_scale,
            seed=seed,
        )

    def _averages(self, round: int) -> bool:
        return round <= self._init_updates


class Random(_Averaging):
    """Each arm with probability 1/K in each round: the paper's random-arm baseline.

    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        seed: From 0 to 2**64 - 1.
    """

    name = "random"

    def __init__(self, arms: int | Sized, *, seed: int = 0) -> None:
        arms, seed = number_of(arms), seeded(seed)
        super().__init__(backend.cores.Random(arms, seed), arms=arms, seed=seed)


class Fixed(_Averaging):
    """One arm in every round: the paper's fixed-arm baselines, and layerwise distillation.

    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        arm: Index of the arm.
        seed: From 0 to 2**64 - 1. Not used: every policy takes one.
    """

    name = "fixed"

    def __init__(self, arms: int | Sized, *, arm: int, seed: int = 0) -> None:
        arms, seed = number_of(arms), seeded(seed)
        arm = integer("arm", arm, 0, arms - 1)
        super().__init__(backend.cores.Fixed(arms, arm), arms=arms, arm=arm, seed=seed)


class RoundRobin(_Averaging):
    """Arm ``round % K``: each arm in turn, by index.

    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        seed: From 0 to 2**64 - 1. Not used: every policy takes one.
    """

    name = "round-robin"

    def __init__(self, arms: int | Sized, *, seed: int = 0) -> None:
        arms, seed = number_of(arms), seeded(seed)
        super().__init__(backend.cores.RoundRobin(arms), arms=arms, seed=seed)


class Exp3S(ScaledPolicy):
    r"""Exponential weights with sharing, against rewards that an adversary may choose.

    .. math::
        p_k = (1 - \eta) w_k / \textstyle\sum_j w_j + \eta / K, \qquad a \sim p \\
        w_k \leftarrow w_k \exp(\eta \, [k = a] \, x / (K p_k)) + e \alpha / K \textstyle\sum_j w_j

    where :math:`x = (r - r_{\min}) / (r_{\max} - r_{\min})` over the rewards so far, 1/2 while they
    are equal: the choices stay when all rewards are multiplied by or shifted by a constant.
    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        mix: :math:`\eta` in (0, 1], the share of uniform choice.
        share: :math:`\alpha` in [0, 1], about one in the number of rounds.
        seed: From 0 to 2**64 - 1.

    Source: Auer, Cesa-Bianchi, Freund and Schapire, "The nonstochastic multiarmed bandit problem",
    SIAM Journal on Computing 32, 2002, section 8. There rewards are in [0, 1] already.
    """

    name = "exp3s"

    def __init__(
        self, arms: int | Sized, *, mix: float = 0.1, share: float = 1e-3, seed: int = 0
    ) -> None:
        arms, mix, seed = number_of(arms), fraction("mix", mix), seeded(seed)
        share = real("share", share, 0.0, 1.0)
        core = backend.cores.Exp3S(arms, mix, share, seed)
        super().__init__(core, arms=arms, mix=mix, share=share, seed=seed)

    def _check(self, state: dict[str, Any]) -> None:
        super()._check(state)
        weight, (low, high) = state["weight"], state["range"]
        if min(weight) < 0.0 or not math.isclose(math.fsum(weight), 1.0, rel_tol=1e-9):
            raise ValueError(f"state must have weights that add up to 1, got {weight}")
        if low > high:
            raise ValueError(f"state must have a range of the lower end first, got {low} {high}")
