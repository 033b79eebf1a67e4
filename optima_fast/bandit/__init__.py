"""Bandit policies: which arm (set of modules) the next round of distillation trains.

A policy proposes an arm (``select``) and is told a reward (``update``). Every draw is a function of
(seed, round, arm), so choices repeat on every rank, platform and compiler, in C++ and in Python.

A policy is a subclass of ``CorePolicy`` with a docstring giving its formula and source, and a line
in ``_POLICIES``. Its arithmetic is a core in ``_cores`` and the same in ``csrc/``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sized
from typing import Any

from optima_fast.bandit.backend import BACKEND
from optima_fast.bandit.base import Policy
from optima_fast.bandit.greedy import Greedy
from optima_fast.bandit.policies import Exp3S, Fixed, GaussianThompson, Random, RoundRobin
from optima_fast.bandit.scale_free import (
    DiscountBank,
    EpsilonGreedy,
    ScaleFreeThompson,
    ScaleFreeUcb,
    SlidingWindowUcb,
)
from optima_fast.bandit.structured import StructuredUcb

__all__ = [
    "BACKEND",
    "DiscountBank",
    "EpsilonGreedy",
    "Exp3S",
    "Fixed",
    "GaussianThompson",
    "Greedy",
    "Policy",
    "Random",
    "RoundRobin",
    "ScaleFreeThompson",
    "ScaleFreeUcb",
    "SlidingWindowUcb",
    "StructuredUcb",
    "make",
    "names",
]

_POLICIES: dict[str, Callable[..., Policy]] = {
    policy.name: policy
    for policy in (
        GaussianThompson,
        StructuredUcb,
        ScaleFreeThompson,
        ScaleFreeUcb,
        SlidingWindowUcb,
        DiscountBank,
        Exp3S,
        EpsilonGreedy,
        Greedy,
        Random,
        RoundRobin,
        Fixed,
    )
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
