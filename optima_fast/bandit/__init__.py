"""Bandit policies: which arm (set of modules) the next round of distillation trains.

A policy proposes an arm (``select``) and is told a reward (``update``). Every draw is a function of
(seed, round, arm), so choices repeat on every rank, platform and compiler, in C++ and in Python.

A policy is a subclass of :class:`Policy` with a docstring giving its formula and source, and a line
in ``_CLASSES``. Its arithmetic is a core beside it; ``csrc/`` has the same where speed matters.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sized
from typing import Any

from optima_fast.bandit.baselines import Fixed, Greedy, Random, RoundRobin
from optima_fast.bandit.core import BACKEND
from optima_fast.bandit.policy import Policy
from optima_fast.bandit.scale_free import ScaleFreeUcb
from optima_fast.bandit.structured import StructuredUcb
from optima_fast.bandit.thompson import GaussianThompson
from optima_fast.errors import unknown

__all__ = [
    "BACKEND",
    "Fixed",
    "GaussianThompson",
    "Greedy",
    "Policy",
    "Random",
    "RoundRobin",
    "ScaleFreeUcb",
    "StructuredUcb",
    "current",
    "gone",
    "make",
    "names",
]

_CLASSES = (
    GaussianThompson,
    StructuredUcb,
    ScaleFreeUcb,
    Greedy,
    Random,
    RoundRobin,
    Fixed,
)
_POLICIES: dict[str, Callable[..., Policy]] = {policy.name: policy for policy in _CLASSES}
_RENAMED = {policy.old_name: policy.name for policy in _CLASSES if policy.old_name}
_GONE = (
    *("scale-free-thompson", "sliding-window-ucb", "discount-bank", "exp3s"),
    "epsilon-greedy",
)


def names() -> tuple[str, ...]:
    """The names that ``make`` knows."""
    return tuple(_POLICIES)


def current(name: str) -> str:
    """The name that a policy has now, from the one that it had before."""
    return _RENAMED.get(name, name)


def gone(name: str) -> str:
    """Where a policy is that the library had and has no longer; empty for any other name."""
    if name not in _GONE:
        return ""
    return (
        f"policy {name} is not in optima_fast any more, bench/policies.py keeps its arithmetic: "
        f"take one of {', '.join(_POLICIES)}"
    )


def make(name: str, arms: int | Sized, **options: Any) -> Policy:
    """Make a policy by name.

    Args:
        name: One of ``names()``.
        arms: Number of arms, or a sequence of them.
        options: Keyword arguments of the policy's class.

    Raises:
        ValueError: There is no such policy, or no longer; the message names the nearest one.
        TypeError: The policy has no such option; the message lists those it has.

    Example:
        >>> make("fixed", 7, arm=6).select()
        6
    """
    if current(name) != name:
        warnings.warn(
            f"policy {name!r} is called {current(name)!r} now; the next release will not know it",
            FutureWarning,
            stacklevel=2,
        )
        name = current(name)
    if gone(name):
        raise ValueError(gone(name))
    if name not in _POLICIES:
        raise unknown("policy", name, _POLICIES)
    policy = _POLICIES[name]
    known = [p.name for p in inspect.signature(policy).parameters.values() if p.name != "arms"]
    for option in options:
        if option not in known:
            raise TypeError(f"options of policy {name!r} are {', '.join(known)}, got {option!r}")
    return policy(arms, **options)
