"""Policies whose choices stay when all rewards are multiplied by, or shifted by, a constant."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from optima_fast.bandit._cores.core import Scaled, State, argmax, plain_sum
from optima_fast.bandit._generator import CHOICE, exponential, logarithm, uniform

_FORGOTTEN = 2.0**-100  # an arm's weight below this is 0
_SURPRISE = 25.0  # beyond 5 sigma counts as 5: no outlier decides
_NARROW = 2.0**-1000


class Summary(NamedTuple):
    """Of all arms: weight, mean, and variance within the arms."""

    weight: float
    mean: float
    variance: float


class Discounted:
    """Weight, mean and sum of squared deviations of each arm's rewards, the old ones fading.

    Rewards count less the sum of ``level``: the first one, and what all arms have gained since.
    """

    def __init__(self, arms: int, gamma: float, trend: float) -> None:
        self.gamma = gamma
        self.trend = trend
        self.level = [0.0, 0.0]
        self.weight = [0.0] * arms
        self.mean = [0.0] * arms
        self.square = [0.0] * arms

    def away(self, x: float) -> float:
        """Apart, so that a shift of all rewards shifts the first number alone."""
        return (x - self.level[0]) - self.level[1]

    def learn(self, k: int, x: float, first: bool) -> None:
        if first:
            self.level[0] = x
        y = self.away(x)
        self.fade()
        self.add(k, y)
        self.level[1] += self.trend * (y - self.mean[k])

    def fade(self) -> None:
        for k, weight in enumerate(self.weight):
            self.weight[k] = self.gamma * weight
            self.square[k] *= self.gamma
            if self.weight[k] < _FORGOTTEN:
                self.weight[k] = self.mean[k] = self.square[k] = 0.0

    def add(self, k: int, x: float) -> None:
        n, deviation = self.weight[k], x - self.mean[k]
        self.weight[k] = n + 1.0
        self.mean[k] += deviation / (n + 1.0)
        self.square[k] += deviation * deviation * (n / (n + 1.0))

    def rescale(self, shift: int) -> None:
        self.level[:] = [math.ldexp(x, shift) for x in self.level]
        for k in range(len(self.mean)):
            self.mean[k] = math.ldexp(self.mean[k], shift)
            self.square[k] = math.ldexp(self.square[k], 2 * shift)

    def summary(self) -> Summary:
        weight = total = square = once = 0.0
        for n, mean, s in zip(self.weight, self.mean, self.square, strict=True):
            weight += n
            total += n * mean
            square += s
            once += min(n, 1.0)
        mean = total / weight if weight > 0.0 else 0.0
        return Summary(weight, mean, square / max(1.0, weight - once))

    def offset(self, k: int, centre: float, prior: float) -> float:
        """Estimate of an arm, from the mean of all, which is worth ``prior`` pulls."""
        return self.weight[k] * (self.mean[k] - centre) / (self.weight[k] + prior)

    def unshifted(self, y: float) -> float:
        return self.level[0] + (self.level[1] + y)


class Exp3S(Scaled):
    """Core of ``bandit.Exp3S``."""

    def __init__(self, arms: int, mix: float, share: float, seed: int) -> None:
        super().__init__(arms, seed)
        self._mix = mix
        self._share = share
        self._weight = [1.0 / arms] * arms
        self._average = [0.0] * arms
        self._range = [0.0, 0.0]

    def _means(self) -> list[float]:
        return self._average

    def _choose(self) -> int:
        left = uniform(self._seed, self.round, 0, CHOICE)
        for k in range(self._arms - 1):
            left -= self._probability(k)
            if left < 0.0:
                return k
        return self._arms - 1

    def _probability(self, k: int) -> float:
        return (1.0 - self._mix) * self._weight[k] + self._mix / self._arms

    def _rescale(self, shift: int) -> None:
        for values in (self._average, self._range):
            values[:] = [math.ldexp(x, shift) for x in values]

    def _learn_scaled(self, k: int, x: float) -> None:
        low, high = self._range if self.round else (x, x)
        low, high = self._range[:] = min(low, x), max(high, x)
        gain = (x - low) / (high - low) if high > low else 0.5
        self._average[k] += (x - self._average[k]) / (self.count[k] + 1)
        self._weight[k] *= exponential(self._mix * gain / (self._probability(k) * self._arms))
        everyone = exponential(1.0) * self._share / self._arms
        self._weight[:] = [w + everyone for w in self._weight]
        total = plain_sum(self._weight)
        self._weight[:] = [w / total for w in self._weight]

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "weight": self._weight,
            "average": self._average,
            "range": self._range,
        }


class ScaleFree(Scaled):
    """Discounted statistics, means drawn towards that of all arms, and a radius around them."""

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
        self._stats = Discounted(arms, gamma, trend)
        self._width = width
        self._prior = prior

    def _variance(self, summary: Summary) -> float:
        """Square of what the radius of an arm with a weight of one is wide."""
        return summary.variance

    def _offset(self, k: int, summary: Summary) -> float:
        return self._stats.offset(k, summary.mean, self._prior)

    def _means(self) -> list[float]:
        stats, summary = self._stats, self._stats.summary()
        return [stats.unshifted(summary.mean + self._offset(k, summary)) for k in range(self._arms)]

    def _spreads(self) -> list[float]:
        variance = self._variance(self._stats.summary())
        return [self._width * math.sqrt(variance / (n + self._prior)) for n in self._stats.weight]

    def _rescale(self, shift: int) -> None:
        self._stats.rescale(shift)

    def _learn_scaled(self, k: int, x: float) -> None:
        self._stats.learn(k, x, self.round == 0)

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "level": self._stats.level,
            "weight": self._stats.weight,
            "average": self._stats.mean,
            "square": self._stats.square,
        }


class ScaleFreeThompson(ScaleFree):
    """Core of ``bandit.ScaleFreeThompson``."""

    def _choose(self) -> int:
        summary, spreads = self._stats.summary(), self._spreads()
        return argmax(
            [self._offset(k, summary) + spreads[k] * self._draw(k) for k in range(self._arms)]
        )


class ScaleFreeUcb(ScaleFree):
    """Core of ``bandit.ScaleFreeUcb``."""

    def _variance(self, summary: Summary) -> float:
        return summary.variance * (2.0 * logarithm(max(1.0, summary.weight)))

    def _choose(self) -> int:
        summary, spreads = self._stats.summary(), self._spreads()
        return argmax([self._offset(k, summary) + spreads[k] for k in range(self._arms)])


class SlidingWindowUcb(ScaleFreeUcb):
    """Core of ``bandit.SlidingWindowUcb``. The statistics are summed anew in every round: taking
    out the oldest reward would leave its rounding behind."""

    def __init__(
        self,
        arms: int,
        window: int,
        width: float,
        prior: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None:
        super().__init__(arms, 1.0, width, prior, 0.0, passes, warm_up, seed)
        self._pulled = [0] * window
        self._reward = [0.0] * window

    def _rescale(self, shift: int) -> None:
        self._reward[:] = [math.ldexp(x, shift) for x in self._reward]

    def _learn_scaled(self, k: int, x: float) -> None:
        slot = self.round % len(self._reward)
        self._pulled[slot] = k
        self._reward[slot] = x
        self._gather(self.round + 1)

    def _gather(self, rounds: int) -> None:
        stats = self._stats = Discounted(self._arms, 1.0, 0.0)
        stats.level[0] = self._reward[0]  # any of them: sums of differences hardly cancel
        for k, reward in [*zip(self._pulled, self._reward, strict=True)][:rounds]:
            x = stats.away(reward)
            stats.weight[k] += 1.0
            stats.mean[k] += x
            stats.square[k] += x * x
        for k, n in enumerate(stats.weight):
            if n > 0.0:
                mean = stats.mean[k] / n
                stats.square[k] = max(0.0, stats.square[k] - stats.mean[k] * mean)
                stats.mean[k] = mean

    def _lists(self) -> dict[str, list[Any]]:
        return {"pulled": self._pulled, "reward": self._reward}

    def restore(self, state: State) -> None:
        super().restore(state)
        self._gather(self.round)


class EpsilonGreedy(ScaleFree):
    """Core of ``bandit.EpsilonGreedy``."""

    def __init__(
        self,
        arms: int,
        epsilon: float,
        gamma: float,
        prior: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None:
        super().__init__(arms, gamma, 0.0, prior, trend, passes, warm_up, seed)
        self._epsilon = epsilon

    def _choose(self) -> int:
        if uniform(self._seed, self.round, 0, CHOICE) < self._epsilon:
            return int(uniform(self._seed, self.round, 1, CHOICE) * self._arms)
        summary = self._stats.summary()
        return argmax([self._offset(k, summary) for k in range(self._arms)])


class DiscountBank(Scaled):
    """Core of ``bandit.DiscountBank``."""

    def __init__(
        self,
        arms: int,
        gammas: Sequence[float],
        width: float,
        prior: float,
        trend: float,
        forget: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None:
        super().__init__(arms, seed, passes, warm_up)
        self._members = [Discounted(arms, gamma, trend) for gamma in gammas]
        self._evidence = [0.0] * len(self._members)  # log, the largest is 0
        self._width = width
        self._prior = prior
        self._forget = forget

    def _belief(self) -> list[float]:
        likelihoods = [exponential(max(-700.0, e)) for e in self._evidence]
        total = plain_sum(likelihoods)
        return [p / total for p in likelihoods]

    def _estimate(self, member: Discounted, k: int, summary: Summary) -> float:
        return member.unshifted(summary.mean + member.offset(k, summary.mean, self._prior))

    def _mixture(self, of: Callable[[Discounted, int, Summary], float]) -> list[float]:
        belief = self._belief()
        summaries = [member.summary() for member in self._members]
        return [
            plain_sum(
                [b * of(m, k, s) for b, m, s in zip(belief, self._members, summaries, strict=True)]
            )
            for k in range(self._arms)
        ]

    def _means(self) -> list[float]:
        return self._mixture(self._estimate)

    def _spreads(self) -> list[float]:
        means = self._means()

        def second(member: Discounted, k: int, s: Summary) -> float:
            away = self._estimate(member, k, s) - means[k]
            within = self._width * self._width * s.variance / (member.weight[k] + self._prior)
            return within + away * away

        return [math.sqrt(v) for v in self._mixture(second)]

    def _choose(self) -> int:
        left, chosen = uniform(self._seed, self.round, 0, CHOICE), 0
        belief = self._belief()
        while chosen < len(belief) - 1 and left >= belief[chosen]:
            left -= belief[chosen]
            chosen += 1
        member = self._members[chosen]
        summary = member.summary()
        return argmax(
            [
                member.offset(k, summary.mean, self._prior)
                + self._width
                * math.sqrt(summary.variance / (member.weight[k] + self._prior))
                * self._draw(k)
                for k in range(self._arms)
            ]
        )

    def _rescale(self, shift: int) -> None:
        for member in self._members:
            member.rescale(shift)

    def _learn_scaled(self, k: int, x: float) -> None:
        variance, surprise = [], []
        for member in self._members:
            summary = member.summary()
            variance.append(summary.variance * (1.0 + 1.0 / (member.weight[k] + self._prior)))
            offset = member.offset(k, summary.mean, self._prior)
            surprise.append(member.away(x) - summary.mean - offset)
        if min(variance) > 0.0:
            widest = max(variance)
            for i, (v, away) in enumerate(zip(variance, surprise, strict=True)):
                square = min(_SURPRISE, away * away / v)
                size = logarithm(max(_NARROW, v / widest))
                self._evidence[i] = self._forget * self._evidence[i] - 0.5 * (size + square)
            highest = max(self._evidence)
            self._evidence[:] = [e - highest for e in self._evidence]
        for member in self._members:
            member.learn(k, x, self.round == 0)

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "evidence": self._evidence,
            "level": [m.level for m in self._members],
            "weight": [m.weight for m in self._members],
            "average": [m.mean for m in self._members],
            "square": [m.square for m in self._members],
        }
