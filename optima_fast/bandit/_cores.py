"""Twin of ``csrc/`` in Python: the same operations on doubles in the same order.

It runs where the extension was not built and, in the tests, beside it: arms, means, spreads and
states are equal bit for bit. Formulas are in the docstrings of ``bandit.policies``.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from optima_fast.bandit._generator import (
    CHOICE,
    NORMAL,
    SHUFFLE,
    exponential,
    logarithm,
    normal_quantile,
    uniform,
)

State = dict[str, Any]

_SCALE_BIAS = 1074  # of the smallest double, 2**-1074: scales are not negative
_FORGOTTEN = 2.0**-100  # an arm's weight below this is 0
_SURPRISE = 25.0  # squared deviations beyond 5 sigma count as 5: one outlier decides nothing


def _arm(arm: object, arms: int) -> int:
    try:
        k = operator.index(arm)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"arm must be an integer, got {arm!r}") from None
    if not 0 <= k < arms:
        raise IndexError(f"arm must be from 0 to {arms - 1}, got {arm!r}")
    return k


def finite(name: str, value: object) -> float:
    """``value`` as a finite float, or a TypeError or ValueError that names it."""
    try:
        number = math.ldexp(value, 0)  # type: ignore[arg-type]  # float() would take a string too
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def _argmax(values: Sequence[float]) -> int:
    best, highest = 0, -math.inf
    for k, value in enumerate(values):
        if value > highest:
            best, highest = k, value
    return best


def _sum(values: Sequence[float]) -> float:
    """From the left; the built-in compensates its rounding since Python 3.12."""
    total = 0.0
    for value in values:
        total += value
    return total


def _copied(value: Any) -> Any:
    return [_copied(v) for v in value] if isinstance(value, list) else value


def _assign(mine: list[Any], values: list[Any]) -> None:
    for i, value in enumerate(values):
        if isinstance(value, list):
            _assign(mine[i], value)
        else:
            mine[i] = value


class Core:
    """Rounds, counts, warm-up and state; a subclass chooses and learns."""

    def __init__(self, arms: int, seed: int, passes: int = 0, warm_up: int = 0) -> None:
        self.round = 0
        self.count = [0] * arms
        self._arms = arms
        self._seed = seed
        order = list(range(arms)) * passes
        for i in range(len(order) - 1, 0, -1):
            j = int(uniform(seed, i, 0, SHUFFLE) * (i + 1))
            order[i], order[j] = order[j], order[i]
        self._order = order[:warm_up]

    @property
    def mean(self) -> list[float]:
        raise NotImplementedError

    @property
    def spread(self) -> list[float]:
        return [0.0] * self._arms

    @property
    def warm_up(self) -> int:
        return len(self._order)

    def _choose(self) -> int:
        raise NotImplementedError

    def _learn(self, k: int, reward: float) -> None:
        raise NotImplementedError

    def _lists(self) -> dict[str, list[Any]]:
        """What ``_learn`` changes, by name, not copied."""
        return {}

    def select(self) -> int:
        if self.round < len(self._order):
            return self._order[self.round]
        return self._choose()

    def update(self, arm: object, reward: object) -> None:
        k = _arm(arm, self._arms)
        self._learn(k, finite("reward", reward))
        self.count[k] += 1
        self.round += 1

    def state(self) -> State:
        lists = {"count": self.count, **self._lists()}
        return {"round": self.round, **{key: _copied(values) for key, values in lists.items()}}

    def restore(self, state: State) -> None:
        self.round = state["round"]
        self.count[:] = state["count"]
        for key, values in self._lists().items():
            _assign(values, state[key])

    def _draw(self, k: int) -> float:
        return normal_quantile(uniform(self._seed, self.round, k, NORMAL))


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
        return _argmax([m + spreads[k] * self._draw(k) for k, m in enumerate(self._mean)])

    def _learn(self, k: int, reward: float) -> None:
        if self.round < len(self._order):
            super()._learn(k, reward)
        else:
            self._mean[k] = self._gamma * self._mean[k] + (1.0 - self._gamma) * reward


class Summary(NamedTuple):
    """Of all arms: weight, mean, and variance within the arms."""

    weight: float
    mean: float
    variance: float


class Discounted:
    """Weight, mean and sum of squared deviations of each arm's rewards, the old ones fading."""

    def __init__(self, arms: int, gamma: float) -> None:
        self.gamma = gamma
        self.weight = [0.0] * arms
        self.mean = [0.0] * arms
        self.square = [0.0] * arms

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


class Scaled(Core):
    """Counts rewards in units of 2**(scale - 1074), above the largest so far: none over- or
    underflows, and a power of two on all of them changes the scale alone."""

    def __init__(self, arms: int, seed: int, passes: int = 0, warm_up: int = 0) -> None:
        super().__init__(arms, seed, passes, warm_up)
        self._scale = 0

    @property
    def mean(self) -> list[float]:
        return [self._unscaled(x) for x in self._means()]

    @property
    def spread(self) -> list[float]:
        return [self._unscaled(x) for x in self._spreads()]

    def _means(self) -> list[float]:
        raise NotImplementedError

    def _spreads(self) -> list[float]:
        return [0.0] * self._arms

    def _rescale(self, shift: int) -> None:
        raise NotImplementedError

    def _learn_scaled(self, k: int, x: float) -> None:
        raise NotImplementedError

    def _learn(self, k: int, reward: float) -> None:
        if reward != 0.0:
            scale = math.frexp(reward)[1] + _SCALE_BIAS
            if scale > self._scale:
                self._rescale(self._scale - scale)
                self._scale = scale
        self._learn_scaled(k, math.ldexp(reward, _SCALE_BIAS - self._scale))

    def _unscaled(self, x: float) -> float:
        try:
            return math.ldexp(x, self._scale - _SCALE_BIAS)
        except OverflowError:
            return math.copysign(math.inf, x)

    def state(self) -> State:
        return super().state() | {"scale": self._scale}

    def restore(self, state: State) -> None:
        super().restore(state)
        self._scale = state["scale"]


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
        total = _sum(self._weight)
        self._weight[:] = [w / total for w in self._weight]

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "weight": self._weight,
            "average": self._average,
            "range": self._range,
        }


class ScaleFree(Scaled):
    """Discounted statistics of rewards less a common level, means drawn towards that of all arms,
    and a radius around them."""

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
        self._stats = Discounted(arms, gamma)
        self._width = width
        self._prior = prior
        self._trend = trend
        self._level = [0.0]

    def _variance(self, summary: Summary) -> float:
        """Square of what the radius of an arm with a weight of one is wide."""
        return summary.variance

    def _offset(self, k: int, summary: Summary) -> float:
        """Estimate of an arm, from the mean of all."""
        n = self._stats.weight[k]
        return n * (self._stats.mean[k] - summary.mean) / (n + self._prior)

    def _means(self) -> list[float]:
        summary = self._stats.summary()
        level = self._level[0]
        return [level + (summary.mean + self._offset(k, summary)) for k in range(self._arms)]

    def _spreads(self) -> list[float]:
        variance = self._variance(self._stats.summary())
        return [self._width * math.sqrt(variance / (n + self._prior)) for n in self._stats.weight]

    def _rescale(self, shift: int) -> None:
        self._stats.rescale(shift)
        self._level[0] = math.ldexp(self._level[0], shift)

    def _learn_scaled(self, k: int, x: float) -> None:
        if self.round == 0:
            self._level[0] = x
        y = x - self._level[0]
        self._stats.fade()
        self._stats.add(k, y)
        self._level[0] += self._trend * (y - self._stats.mean[k])

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "level": self._level,
            "weight": self._stats.weight,
            "average": self._stats.mean,
            "square": self._stats.square,
        }


class ScaleFreeThompson(ScaleFree):
    """Core of ``bandit.ScaleFreeThompson``."""

    def _choose(self) -> int:
        summary, spreads = self._stats.summary(), self._spreads()
        return _argmax(
            [self._offset(k, summary) + spreads[k] * self._draw(k) for k in range(self._arms)]
        )


class ScaleFreeUcb(ScaleFree):
    """Core of ``bandit.ScaleFreeUcb``."""

    def _variance(self, summary: Summary) -> float:
        return summary.variance * (2.0 * logarithm(max(1.0, summary.weight)))

    def _choose(self) -> int:
        summary, spreads = self._stats.summary(), self._spreads()
        return _argmax([self._offset(k, summary) + spreads[k] for k in range(self._arms)])


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
        origin = self._reward[0]  # any of them: sums of differences hardly cancel
        stats = self._stats = Discounted(self._arms, 1.0)
        for k, reward in [*zip(self._pulled, self._reward, strict=True)][:rounds]:
            x = reward - origin
            stats.weight[k] += 1.0
            stats.mean[k] += x
            stats.square[k] += x * x
        for k, n in enumerate(stats.weight):
            if n > 0.0:
                mean = stats.mean[k] / n
                stats.square[k] = max(0.0, stats.square[k] - stats.mean[k] * mean)
                stats.mean[k] = origin + mean

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
        return _argmax([self._offset(k, summary) for k in range(self._arms)])


class DiscountBank(Scaled):
    """Core of ``bandit.DiscountBank``."""

    def __init__(
        self,
        arms: int,
        gammas: Sequence[float],
        width: float,
        prior: float,
        forget: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None:
        super().__init__(arms, seed, passes, warm_up)
        self._members = [Discounted(arms, gamma) for gamma in gammas]
        self._evidence = [0.0] * len(self._members)  # log, the largest is 0
        self._width = width
        self._prior = prior
        self._forget = forget

    def _belief(self) -> list[float]:
        likelihoods = [exponential(max(-700.0, e)) for e in self._evidence]
        total = _sum(likelihoods)
        return [p / total for p in likelihoods]

    def _offset(self, member: Discounted, k: int, summary: Summary) -> float:
        n = member.weight[k]
        return n * (member.mean[k] - summary.mean) / (n + self._prior)

    def _mixture(self, of: Callable[[Discounted, int, Summary], float]) -> list[float]:
        belief = self._belief()
        summaries = [member.summary() for member in self._members]
        return [
            _sum(
                [b * of(m, k, s) for b, m, s in zip(belief, self._members, summaries, strict=True)]
            )
            for k in range(self._arms)
        ]

    def _means(self) -> list[float]:
        return self._mixture(lambda member, k, s: s.mean + self._offset(member, k, s))

    def _spreads(self) -> list[float]:
        means = self._means()

        def second(member: Discounted, k: int, s: Summary) -> float:
            away = s.mean + self._offset(member, k, s) - means[k]
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
        return _argmax(
            [
                self._offset(member, k, summary)
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
        summaries = [member.summary() for member in self._members]
        if all(s.variance > 0.0 for s in summaries):
            for i, (member, s) in enumerate(zip(self._members, summaries, strict=True)):
                variance = s.variance * (1.0 + 1.0 / (member.weight[k] + self._prior))
                away = x - s.mean - self._offset(member, k, s)
                surprise = min(_SURPRISE, away * away / variance)
                self._evidence[i] = self._forget * self._evidence[i] - 0.5 * (
                    logarithm(variance) + surprise
                )
            highest = max(self._evidence)
            self._evidence[:] = [e - highest for e in self._evidence]
        for member in self._members:
            member.fade()
            member.add(k, x)

    def _lists(self) -> dict[str, list[Any]]:
        return {
            "evidence": self._evidence,
            "weight": [m.weight for m in self._members],
            "average": [m.mean for m in self._members],
            "square": [m.square for m in self._members],
        }


class LinearThompson(ScaleFree):
    """Core of ``bandit.LinearThompson``. An arm is the bits of its units; what a coefficient sees
    of the arms is a sum over supersets of bits, what an arm sees of them one over subsets."""

    def __init__(
        self,
        masks: Sequence[int],
        units: int,
        gamma: float,
        width: float,
        prior: float,
        ridge: float,
        trend: float,
        passes: int,
        warm_up: int,
        seed: int,
    ) -> None:
        super().__init__(len(masks), gamma, width, prior, trend, passes, warm_up, seed)
        self._masks = masks
        self._units = units
        self._ridge = ridge
        bits = [1 << i for i in range(units)]
        self._features = [0, *bits, *(a | b for i, a in enumerate(bits) for b in bits[i + 1 :])]

    def _fit(self, mean: float) -> tuple[list[list[float]], float]:
        """Upper Cholesky factor of the coefficients' precision, with the solution of its transpose
        as another column; and the noise's variance."""
        n = len(self._features)
        weight, total = [0.0] * 2**self._units, [0.0] * 2**self._units
        pulls = square = 0.0
        for k, mask in enumerate(self._masks):
            pulled, away = self._stats.weight[k], self._stats.mean[k] - mean
            w = self._prior * pulled / (pulled + self._prior)
            weight[mask] += w
            total[mask] += w * away
            pulls += pulled
            square += self._stats.square[k] + w * away * away
        for table in (weight, total):
            for bit in (1 << i for i in range(self._units)):
                for mask in range(len(table)):
                    if not mask & bit:
                        table[mask] += table[mask | bit]
        rows = [[*(weight[f | g] for g in self._features), total[f]] for f in self._features]
        for j, row in enumerate(rows):
            pivot = math.sqrt(row[j] + self._ridge)
            row[j] = pivot
            inverse = 1.0 / pivot
            for k in range(j + 1, n + 1):
                row[k] *= inverse
            for i in range(j + 1, n):
                factor, below = row[i], rows[i]
                for k in range(i, n + 1):
                    below[k] -= factor * row[k]
            square -= row[n] * row[n]
        return rows, max(0.0, square) / max(1.0, pulls - 1.0)

    def _offsets(self, rows: list[list[float]], mean: float, noise: list[float]) -> list[float]:
        n = len(rows)
        table = [0.0] * 2**self._units
        solved = [0.0] * n
        for i in range(n - 1, -1, -1):
            rest = rows[i][n] + noise[i]
            for k in range(i + 1, n):
                rest -= rows[i][k] * solved[k]
            solved[i] = rest / rows[i][i]
            table[self._features[i]] = solved[i]
        for bit in (1 << i for i in range(self._units)):
            for mask in range(len(table)):
                if mask & bit:
                    table[mask] += table[mask ^ bit]
        return [
            (pulled * (own - mean) + self._prior * table[mask]) / (pulled + self._prior)
            for mask, pulled, own in zip(
                self._masks, self._stats.weight, self._stats.mean, strict=True
            )
        ]

    def _means(self) -> list[float]:
        mean = self._stats.summary().mean
        rows, _ = self._fit(mean)
        offsets = self._offsets(rows, mean, [0.0] * len(rows))
        return [self._level[0] + (mean + x) for x in offsets]

    def _spreads(self) -> list[float]:
        rows, variance = self._fit(self._stats.summary().mean)
        spreads = []
        for mask, pulled in zip(self._masks, self._stats.weight, strict=True):
            left = [1.0 if f & mask == f else 0.0 for f in self._features]
            leverage = 0.0
            for i, row in enumerate(rows):
                solved = left[i] / row[i]
                leverage += solved * solved
                for k in range(i + 1, len(rows)):
                    left[k] -= row[k] * solved
            share = self._prior / (pulled + self._prior)
            own = 1.0 / (pulled + self._prior)
            spreads.append(self._width * math.sqrt(variance * (own + share * share * leverage)))
        return spreads

    def _choose(self) -> int:
        mean = self._stats.summary().mean
        rows, variance = self._fit(mean)
        scale = self._width * math.sqrt(variance)
        noise = [scale * self._draw(self._arms + i) for i in range(len(rows))]
        offsets = self._offsets(rows, mean, noise)
        return _argmax(
            [
                offsets[k] + scale / math.sqrt(pulled + self._prior) * self._draw(k)
                for k, pulled in enumerate(self._stats.weight)
            ]
        )
