"""Bandit policies: which arm (set of modules) the next round of distillation trains.

A policy proposes an arm (``select``) and is told a reward (``update``). Every draw is a function of
(seed, round, arm), so choices repeat on every rank, platform and compiler, in C++ and in Python.

A policy is a subclass of ``_Policy`` with a docstring giving its formula and source, and a line in
``_POLICIES``. Its arithmetic is a core in ``_bandit_py``, and in ``csrc/bandit.cpp`` if costly.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping, Sized
from typing import Any, ClassVar, Protocol, SupportsFloat, SupportsIndex

from optima_fast import _bandit_py

__all__ = ["BACKEND", "Fixed", "GaussianThompson", "Policy", "Random", "make", "names"]

_ABI = 1
_MAX_ROUNDS = 2**24  # of an initialisation, whose order is kept: 64 MiB


class _Core(Protocol):
    """The arithmetic of a policy on arguments that were checked."""

    @property
    def round(self) -> int: ...
    @property
    def count(self) -> list[int]: ...
    @property
    def mean(self) -> list[float]: ...
    def select(self) -> int: ...
    def update(self, arm: object, reward: object, /) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any], /) -> None: ...


_thompson: Callable[[int, float, int, float, int], _Core]
try:
    from optima_fast import _bandit
except ImportError:
    BACKEND, _thompson = "python", _bandit_py.GaussianThompson
else:
    if _bandit.ABI != _ABI:
        raise ImportError(
            f"optima_fast._bandit must have ABI {_ABI}, got {_bandit.ABI}: reinstall optima-fast, "
            f"or delete {_bandit.__file__}"
        )
    BACKEND, _thompson = "c++", _bandit.GaussianThompson


class Policy(Protocol):
    """What every policy can do, those of ``make`` and users' own."""

    @property
    def arms(self) -> int: ...
    @property
    def round(self) -> int: ...
    @property
    def count(self) -> list[int]: ...
    @property
    def mean(self) -> list[float]: ...
    def select(self) -> int: ...
    def update(self, arm: SupportsIndex, reward: SupportsFloat) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Policy:
    """Interface and state of every policy, around the core that computes."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # of the state; a change of its meaning adds one

    def __init__(self, core: _Core, *, arms: int, **settings: int | float) -> None:
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
        """Estimated mean reward of each arm, 0 for one never updated, a copy."""
        return list(self._core.mean)

    def select(self) -> int:
        """Index of the arm to pull next. Changes nothing: the same until the next ``update``."""
        return self._core.select()

    def update(self, arm: SupportsIndex, reward: SupportsFloat) -> None:
        """Record the reward of one pull; ends the round.

        Args:
            arm: Index of any arm, whether ``select`` proposed it or not.
            reward: A finite number.

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
        self._check(**checked)
        self._core.restore(checked)

    def _check(
        self, *, round: int, count: list[int], total: list[float], mean: list[float]
    ) -> None:
        """Refuse a state that no sequence of updates leads to."""
        if sum(count) != round:
            raise ValueError(f"state must have counts that add up to round {round}, got {count}")
        if self._averages(round):
            for k, (n, t, m) in enumerate(zip(count, total, mean, strict=True)):
                if m != t / max(1, n) or (n == 0 and t != 0.0):
                    raise ValueError(
                        f"state must have mean[{k}] = total[{k}] / count[{k}], got {m!r}, {t!r} "
                        f"and {n}"
                    )

    def _averages(self, round: int) -> bool:
        """Whether the means at this round are plain averages of all rewards."""
        return True


class GaussianThompson(_Policy):
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
        arms = _arms(arms)
        gamma = _bandit_py.finite("gamma", gamma)
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"gamma must be in (0, 1], got {gamma!r}")
        init_rounds = _integer("init_rounds", init_rounds, 0, _MAX_ROUNDS // arms)
        variance_scale = _bandit_py.finite("variance_scale", variance_scale)
        if variance_scale < 0.0:
            raise ValueError(f"variance_scale must not be negative, got {variance_scale!r}")
        seed = _seed(seed)
        self._init_updates = arms * init_rounds
        super().__init__(
            _thompson(arms, gamma, init_rounds, variance_scale, seed),
            arms=arms,
            gamma=gamma,
            init_rounds=init_rounds,
            variance_scale=variance_scale,
            seed=seed,
        )

    def _averages(self, round: int) -> bool:
        return round <= self._init_updates


class Random(_Policy):
    """Each arm with probability 1/K in each round: the paper's random-arm baseline.

    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        seed: From 0 to 2**64 - 1.
    """

    name = "random"

    def __init__(self, arms: int | Sized, *, seed: int = 0) -> None:
        arms, seed = _arms(arms), _seed(seed)
        super().__init__(_bandit_py.Random(arms, seed), arms=arms, seed=seed)


class Fixed(_Policy):
    """One arm in every round: the paper's fixed-arm baselines, and layerwise distillation.

    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        arm: Index of the arm.
        seed: From 0 to 2**64 - 1. Not used: every policy takes one.
    """

    name = "fixed"

    def __init__(self, arms: int | Sized, *, arm: int, seed: int = 0) -> None:
        arms, seed = _arms(arms), _seed(seed)
        arm = _integer("arm", arm, 0, arms - 1)
        super().__init__(_bandit_py.Fixed(arms, arm), arms=arms, arm=arm, seed=seed)


_POLICIES: dict[str, Callable[..., Policy]] = {
    GaussianThompson.name: GaussianThompson,
    Random.name: Random,
    Fixed.name: Fixed,
}


def names() -> tuple[str, ...]:
    """The names that ``make`` knows."""
    return tuple(_POLICIES)


def make(name: str, arms: int | Sized, **options: Any) -> Policy:
    """Make a policy by name.

    Args:
        name: One of ``names()``.
        arms: Number of arms, or a sequence of them.
        options: Keyword arguments of the policy's class.

    Raises:
        ValueError: There is no such policy; the message names the nearest one.
        TypeError: The policy has no such option; the message lists those it has.

    Example:
        >>> make("fixed", 7, arm=6).select()
        6
    """
    if name not in _POLICIES:
        nearest = difflib.get_close_matches(str(name), _POLICIES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"policy must be one of {', '.join(_POLICIES)}, got {name!r}: did you mean {nearest!r}?"
        )
    policy = _POLICIES[name]
    known = [p.name for p in inspect.signature(policy).parameters.values() if p.name != "arms"]
    for option in options:
        if option not in known:
            raise TypeError(f"options of policy {name!r} are {', '.join(known)}, got {option!r}")
    return policy(arms, **options)


def _integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value!r}")
    return number


def _arms(arms: int | Sized) -> int:
    if isinstance(arms, str | bytes):
        raise TypeError(f"arms must be a number or a sequence of arms, got {arms!r}")
    return _integer("arms", len(arms) if isinstance(arms, Sized) else arms, 1, _MAX_ROUNDS)


def _seed(seed: int) -> int:
    return _integer("seed", seed, 0, 2**64 - 1)


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
