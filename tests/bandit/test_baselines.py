"""Chance, turns, one arm, and the arm of the highest last reward."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optima_fast import bandit


def play(policy, rounds, reward=lambda arm, t: 0.0):
    arms = []
    for t in range(rounds):
        arms.append(policy.select())
        policy.update(arms[-1], reward(arms[-1], t))
    return arms


def test_random_is_uniform():
    counts = np.bincount(play(bandit.make("random", 7, seed=1), 7000), minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # p = 0.001 at 6 degrees


def test_choices_by_chance_are_pinned():
    expected = "4 2 2 2 3 6 3 0 5 6 5 0 3 4 0 5 2 3 3 0"
    assert play(bandit.make("random", 7), 20) == [int(arm) for arm in expected.split()]


def test_round_robin_takes_turns():
    assert play(bandit.make("round-robin", 3), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_they_average_their_rewards():
    policy = bandit.make("fixed", 3, arm=2)
    assert play(policy, 4, lambda arm, t: t) == [2, 2, 2, 2]
    policy.update(0, 7.0)
    assert policy.mean == [7.0, 0.0, 1.5]
    assert policy.spread == [0.0] * 3
    assert policy.count == [1, 0, 4]
    assert (policy.round, policy.warm_up) == (5, 0)


@pytest.mark.parametrize("arm", [3, -1])
def test_a_fixed_arm_must_exist(arm):
    with pytest.raises(ValueError, match=f"arm must be from 0 to 2, got {arm}"):
        bandit.make("fixed", 3, arm=arm)


def test_what_was_never_told_comes_first_then_the_highest():
    policy = bandit.Greedy(["a", "b", "c"])
    for arm, reward in enumerate((0.3, 0.5, 0.4)):
        assert policy.select() == arm
        policy.update(arm, reward)
    assert policy.select() == 1
    policy.update(1, 0.1)
    assert policy.select() == 2
    assert policy.mean == [0.3, 0.1, 0.4]
    assert policy.count == [1, 2, 1]
    assert policy.spread == [0.0] * 3


def test_what_it_observes_it_need_not_pull():
    policy = bandit.Greedy(4)
    assert policy.warm_up == 0
    policy.observe([-2.0, -1.0, -1.0, -3.0])
    assert (policy.select(), policy.round, policy.count) == (1, 0, [0] * 4)
    policy.update(1, -4.0)
    assert policy.select() == 2
    policy.observe((0.0, 0.0, 0.0, 1e-300))
    assert policy.select() == 3


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([1.0], ValueError, r"one for each of 2 arms, got \[1.0\]"),
        ([1.0, 2.0, 3.0], ValueError, "one for each of 2 arms"),
        ([1.0, math.nan], ValueError, r"rewards\[1\] must be finite, got nan"),
        (["1", 2.0], TypeError, r"rewards\[0\] must be a number, got '1'"),
    ],
)
def test_rewards_that_are_not_one_finite_number_an_arm_are_refused(rewards, error, message):
    policy = bandit.Greedy(2)
    policy.observe([0.5, 0.25])
    before = policy.state_dict()
    with pytest.raises(error, match=message):
        policy.observe(rewards)
    assert policy.state_dict() == before
