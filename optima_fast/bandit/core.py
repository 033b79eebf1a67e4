"""What the arithmetic of every policy has in common, and which one computes.

A policy with much arithmetic has it twice: as a core here and in ``csrc/``, file by file, the same
operations on doubles in the same order. Without the extension Python's run; beside it, in the
tests, arms, means, spreads and states are equal bit for bit.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

from optima_fast.bandit.generator import NORMAL, SHUFFLE, normal_quantile, uniform

_ABI = 4

extension: Any = None
try:
    from optima_fast import _bandit
except ImportError:
    pass
else:
    if _bandit.ABI != _ABI:
        raise ImportError(
            f"optima_fast._bandit must have ABI {_ABI}, got {_bandit.ABI}: reinstall optima-fast, "
            f"or delete {_bandit.__file__}"
        )
    extension = _bandit

BACKEND = "python" if extension is None else "c++"
"""What computes the policies: ``"c++"``, or ``"python"`` where the extension was not built."""

State = dict[str, Any]

_SCALE_BIAS = 1074  # of the smallest double, 2**-1074: scales are not negative


def compiled(core: type["Core"]) -> Any:
    """The extension's core of the same name; without an extension this one."""
    return core if extension is None else getattr(extension, core.__name__)


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


def argmax(values: Sequence[float]) -> int:
    """The first index of the largest value."""
    best, highest = 0, -math.inf
    for k, value in enumerate(values):
        if value > highest:
            best, highest = k, value
    return best


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

    def __init__(self, arms: int, seed: int = 0, passes: int = 0, warm_up: int = 0) -> None:
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
        raise NotImplementedError

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

    def __init__(self, arms: int, seed: int = 0, passes: int = 0, warm_up: int = 0) -> None:
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


class Scaled(Core):
    """Counts rewards in units of 2**(scale - 1074), above the largest so far: none over- or
    underflows, and a power of two on all of them changes the scale alone."""

    def __init__(self, arms: int, seed: int, passes: int, warm_up: int) -> None:
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
        raise NotImplementedError

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
