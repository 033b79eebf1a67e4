"""Greedy: the arm of the highest last reward, where every arm's is known."""

from __future__ import annotations

import math

import pytest

from optima_fast import bandit


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


@pytest.mark.parametrize(
    "change", [{"told": [0, 1]}, {"told": [2, 1]}, {"told": [0, 1], "count": [0, 1], "round": 1}]
)
def test_a_state_that_no_updates_lead_to_is_refused(change):
    policy = bandit.Greedy(2)
    policy.observe([0.5, 0.25])
    policy.update(0, 0.5)
    state = policy.state_dict()
    fresh = bandit.Greedy(2)
    with pytest.raises(ValueError, match=r"told\[0\]"):
        fresh.load_state_dict({**state, **change})
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
