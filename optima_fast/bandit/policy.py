"""What every bandit policy is: its interface, its state, and the checks of its arguments."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Mapping, Sized
from typing import Any, ClassVar, SupportsFloat, SupportsIndex

from optima_fast.bandit.core import Core, finite

MAX_ROUNDS = 2**24  # of an initialisation, whose order is kept: 64 MiB
_MAX_SCALE = 2098  # of the largest double, in the cores' units


class Policy:
    """Proposes an arm (``select``) and is told a reward (``update``), around a core that computes.

    A subclass checks its settings, makes its core, and says which states are none.
    """

    name: ClassVar[str]
    old_name: ClassVar[str] = ""  # whose states are read too
    version: ClassVar[int] = 1  # of the state; a change of its meaning adds one

    def __init__(self, core: Core, *, arms: int, **settings: Any) -> None:
        self._core = core
        self._arms = arms
        self._settings = {"arms": arms, **settings}

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self._settings.items())
        return f"{type(self).__name__}({settings})"

    @property
    def arms(self) -> int:
        """Number of arms."""
        return self._arms

    @property
    def round(self) -> int:
        """Number of updates so far."""
        return self._core.round

    @property
    def count(self) -> list[int]:
        """Updates of each arm so far, a copy."""
        return list(self._core.count)

    @property
    def mean(self) -> list[float]:
        """The policy's estimate of the mean reward of each arm, 0 before any reward, a copy."""
        return list(self._core.mean)

    @property
    def spread(self) -> list[float]:
        """How uncertain the policy is of each mean: the standard deviation of its draws or the
        width of its confidence bound, 0 where it has neither, a copy."""
        return list(self._core.spread)

    @property
    def warm_up(self) -> int:
        """Rounds at the start whose arms were settled before any reward."""
        return self._core.warm_up

    def select(self) -> int:
        """Index of the arm to pull next. Changes nothing: the same until the next ``update``."""
        return self._core.select()

    def update(self, arm: SupportsIndex, reward: SupportsFloat) -> None:
        """Record the reward of one pull; ends the round.

        Args:
            arm: Index of any arm, whether ``select`` proposed it or not.
            reward: A finite number, of either sign.

        Raises:
            TypeError: ``arm`` is no integer or ``reward`` no number.
            IndexError: There is no such arm.
            ValueError: ``reward`` is NaN or infinite.
        """
        self._core.update(arm, reward)

    def state_dict(self) -> dict[str, Any]:
        """Policy, version, settings and all that ``update`` changes; JSON keeps every bit of it."""
        return {
            "policy": self.name,
            "version": self.version,
            **self._settings,
            **self._core.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of a policy made with the same arguments.

        Raises:
            ValueError: The state is malformed or of another policy, version, size or setting.
                Nothing has changed then.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be a mapping, got {state!r}")
        if self.old_name and state.get("policy") == self.old_name:
            state = {**state, "policy": self.name}
        fixed = {"policy": self.name, "version": self.version, **self._settings}
        template = self._core.state()
        for key, mine in fixed.items():
            if key not in state:
                raise ValueError(f"state must have {key} {mine!r}, got none")
            if state[key] != mine:
                raise ValueError(
                    f"state must have {key} {mine!r}, got {state[key]!r}: make the policy with the "
                    "arguments that the state was saved with"
                )
        if state.keys() != fixed.keys() | template.keys():
            raise ValueError(
                f"state must have the keys {', '.join([*fixed, *template])}, got "
                f"{', '.join(map(str, state))}"
            )
        checked = {key: _like(key, state[key], model) for key, model in template.items()}
        if sum(checked["count"]) != checked["round"]:
            raise ValueError(
                f"state must have counts that add up to round {checked['round']}, got "
                f"{checked['count']}"
            )
        if checked.get("scale", 0) > _MAX_SCALE:
            raise ValueError(
                f"state must have scale from 0 to {_MAX_SCALE}, got {checked['scale']}"
            )
        self._check(checked)
        self._core.restore(checked)

    def _check(self, state: dict[str, Any]) -> None:
        """Refuse a state, right in kind and size, that no sequence of updates leads to."""
        raise NotImplementedError


def check_averages(state: Mapping[str, Any]) -> None:
    """Refuse a state whose means are not the plain averages of its rewards."""
    arms = zip(state["count"], state["total"], state["mean"], strict=True)
    for k, (n, total, mean) in enumerate(arms):
        if mean != total / max(1, n) or (n == 0 and total != 0.0):
            raise ValueError(
                f"state must have mean[{k}] = total[{k}] / count[{k}], got {mean!r}, {total!r} "
                f"and {n}"
            )


def integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """``value`` as an int from ``low`` to ``high``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value!r}")
    return number


def real(name: str, value: SupportsFloat, low: float, high: float) -> float:
    """``value`` as a float from ``low`` to ``high``."""
    number = finite(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
    return number


def fraction(name: str, value: SupportsFloat) -> float:
    """``value`` as a float in (0, 1]."""
    number = finite(name, value)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return number


def geometric(gamma: float, rounds: int) -> float:
    """1 + gamma + ... of so many terms."""
    return rounds if gamma == 1.0 else -math.expm1(rounds * math.log(gamma)) / (1.0 - gamma)


def number_of(arms: int | Sized) -> int:
    """Number of arms, from it or from a sequence of them."""
    if isinstance(arms, str | bytes):
        raise TypeError(f"arms must be a number or a sequence of arms, got {arms!r}")
    return integer("arms", len(arms) if isinstance(arms, Sized) else arms, 1, MAX_ROUNDS)


def seeded(seed: int) -> int:
    """``seed``, of 64 bits."""
    return integer("seed", seed, 0, 2**64 - 1)


def warm_up(arms: int, init_rounds: int | None, warmup_limit: int) -> tuple[int, int]:
    """Times that all arms are shuffled in, and rounds of the result that are played.

    By default each arm once, or ``warmup_limit`` different ones if there are more.
    """
    limit = integer("warmup_limit", warmup_limit, 0, MAX_ROUNDS)
    if init_rounds is None:
        return 1, min(arms, limit)
    passes = integer("init_rounds", init_rounds, 0, MAX_ROUNDS)
    if passes * arms > limit:
        raise ValueError(
            f"init_rounds {passes} of each of {arms} arms must fit into warmup_limit {limit}, got "
            f"{passes * arms} rounds: raise warmup_limit, or leave init_rounds to the default"
        )
    return passes, passes * arms


def _like(key: str, value: object, model: object) -> Any:
    """``value`` if it is of the kind of ``model``: a count, a finite number or a list of one."""
    if isinstance(model, list):
        if not isinstance(value, list) or len(value) != len(model):
            raise ValueError(f"state must have a list of {len(model)} in {key}, got {value!r}")
        return [
            _like(f"{key}[{i}]", v, m) for i, (v, m) in enumerate(zip(value, model, strict=True))
        ]
    if isinstance(model, int):
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"state must have a count in {key}, got {value!r}")
        return value
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        raise ValueError(f"state must have a finite number in {key}, got {value!r}")
    return float(value)  # type: ignore[arg-type]
