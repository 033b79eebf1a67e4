"""Thompson sampling: the paper's policy."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from optima_fast.bandit.core import Averages, argmax, compiled, finite
from optima_fast.bandit.policy import (
    MAX_ROUNDS,
    Policy,
    check_averages,
    fraction,
    integer,
    number_of,
    seeded,
)


class GaussianThompson(Policy):
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

    name = "thompson"
    old_name = "paper"

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
        super().__init__(
            compiled(ThompsonCore)(arms, gamma, init_rounds, variance_scale, seed),
            arms=arms,
            gamma=gamma,
            init_rounds=init_rounds,
            variance_scale=variance_scale,
            seed=seed,
        )

    def _check(self, state: dict[str, Any]) -> None:
        if state["round"] <= self.warm_up:
            check_averages(state)


class ThompsonCore(Averages):
    """Twin of ``csrc/thompson.h``: ``total`` sums the rewards of the initialisation."""

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
        if self.round < self.warm_up:
            super()._learn(k, reward)
        else:
            self._mean[k] = self._gamma * self._mean[k] + (1.0 - self._gamma) * reward
