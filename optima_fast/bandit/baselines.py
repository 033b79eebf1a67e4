"""Policies that learn nothing (chance, turns, one arm), and the best of rewards that are known.

They have no arithmetic that an extension would speed up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

from optima_fast.bandit.core import Averages, Core, argmax, finite
from optima_fast.bandit.generator import CHOICE, uniform
from optima_fast.bandit.policy import Policy, check_averages, integer, number_of, seeded


class _Ruled(Averages):
    """Arms by a rule of the round alone."""

    def __init__(self, arms: int, rule: Callable[[int], int]) -> None:
        super().__init__(arms)
        self._rule = rule

    def _choose(self) -> int:
        return self._rule(self.round)


class _Unlearning(Policy):
    """A policy whose ``mean`` is the plain average of an arm's rewards, and has no say."""

    def _check(self, state: dict[str, Any]) -> None:
        check_averages(state)


class Random(_Unlearning):
    """Each arm with probability 1/K in each round: the paper's random-arm baseline.

    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        seed: From 0 to 2**64 - 1.
    """

    name = "random"

    def __init__(self, arms: int | Sized, *, seed: int = 0) -> None:
        arms, seed = number_of(arms), seeded(seed)
        core = _Ruled(arms, lambda t: int(uniform(seed, t, 0, CHOICE) * arms))
        super().__init__(core, arms=arms, seed=seed)


class RoundRobin(_Unlearning):
    """Arm ``round % K``: each arm in turn, by index.

    ``mean`` is the plain average of an arm's rewards; it has no say.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        seed: From 0 to 2**64 - 1. Not used: every policy takes one.
    """

    name = "round-robin"

    def __init__(self, arms: int | Sized, *, seed: int = 0) -> None:
        arms, seed = number_of(arms), seeded(seed)
        super().__init__(_Ruled(arms, lambda t: t % arms), arms=arms, seed=seed)


class Fixed(_Unlearning):
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
        super().__init__(_Ruled(arms, lambda t: arm), arms=arms, arm=arm, seed=seed)


class Greedy(Policy):
    """The arm of the highest last reward; an arm whose reward was never told comes first.

    With rewards of the pulled arm alone it never looks back, as no bandit should: it is meant for
    *full information*, where ``observe`` tells what every arm is worth, pulled or not, so that
    there is nothing to explore. Ties go to the lowest index. ``mean`` is the last reward of each
    arm.

    Args:
        arms: K, or a sequence of K arms, of which only the length is used.
        seed: From 0 to 2**64 - 1. Not used: every policy takes one.

    Source: Cesa-Bianchi and Lugosi, "Prediction, Learning, and Games", 2006, section 3.2 (follow
    the leader), with a memory of one round, as rewards drift.

    Example:
        >>> policy = Greedy(3)
        >>> policy.observe([0.2, 0.7, 0.1])
        >>> policy.select()
        1
    """

    name = "greedy"
    _core: _LastRewards

    def __init__(self, arms: int | Sized, *, seed: int = 0) -> None:
        arms, seed = number_of(arms), seeded(seed)
        super().__init__(_LastRewards(arms), arms=arms, seed=seed)

    def observe(self, rewards: Sequence[float]) -> None:
        """What each arm is worth now. Not a pull: ``update`` ends the round.

        Raises:
            TypeError: A reward is no number.
            ValueError: Not one finite reward an arm.
        """
        self._core.observe(rewards)

    def _check(self, state: dict[str, Any]) -> None:
        for k, (told, count, mean) in enumerate(
            zip(state["told"], state["count"], state["mean"], strict=True)
        ):
            if told not in (0, 1) or (not told and (count or mean != 0.0)):
                raise ValueError(
                    f"state must have told[{k}] 1, or 0 where nothing is known, got {told} with "
                    f"count {count} and mean {mean!r}"
                )


class _LastRewards(Core):
    """Core of :class:`Greedy`."""

    def __init__(self, arms: int) -> None:
        super().__init__(arms)
        self._mean = [0.0] * arms
        self._told = [0] * arms

    @property
    def mean(self) -> list[float]:
        return [*self._mean]

    def observe(self, rewards: Sequence[float]) -> None:
        values = [finite(f"rewards[{k}]", reward) for k, reward in enumerate(rewards)]
        if len(values) != self._arms:
            raise ValueError(f"rewards must be one for each of {self._arms} arms, got {values}")
        self._mean[:], self._told[:] = values, [1] * self._arms

    def _choose(self) -> int:
        return self._told.index(0) if 0 in self._told else argmax(self._mean)

    def _learn(self, k: int, reward: float) -> None:
        self._mean[k], self._told[k] = reward, 1

    def _lists(self) -> dict[str, list[Any]]:
        return {"mean": self._mean, "told": self._told}
