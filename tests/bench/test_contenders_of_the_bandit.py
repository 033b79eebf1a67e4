"""The contenders of bench_worlds.py that the library does not have: briefly, what they compute."""

from __future__ import annotations

import math

import numpy as np
import policies
import pytest

from optima_fast import bandit


def shares(player, draws=4000):
    """How often each arm is chosen in one state."""
    return np.bincount([player.choose() for _ in range(draws)], minlength=player.arms) / draws


@pytest.mark.parametrize("name", policies.CONTENDERS)
def test_a_contender_finds_the_best_arm_and_follows_a_change(name):
    player, rng = policies.make(name, 5, 3), np.random.default_rng(0)
    value, pulls = np.array([0.1, 0.9, 0.2, 0.1, 0.3]), []
    for t in range(1600):
        arm = player.select()
        pulls.append(arm)
        player.update(arm, float(np.roll(value, t // 800)[arm] + 0.2 * rng.standard_normal()))
    if name != "exp3s":
        assert sorted(pulls[:5]) == list(range(5))
    first, second = np.mean(np.equal(pulls[400:800], 1)), np.mean(np.equal(pulls[1200:], 2))
    assert min(first, second) > (0.4 if name == "exp3s" else 0.8)


def test_statistics_are_those_of_the_library_s_bounds():
    ours, policy = policies.Statistics(4), bandit.make("scale-free-ucb", 4)
    rng = np.random.default_rng(1)
    for _ in range(200):
        arm, reward = int(rng.integers(4)), float(rng.standard_normal())
        ours.learn(arm, reward)
        policy.update(arm, reward)
    np.testing.assert_allclose(ours.mean, policy.mean, rtol=1e-12)
    bound = 0.15 * np.sqrt(ours.variance * 2 * math.log(ours.n.sum()) / ours.weight)
    np.testing.assert_allclose(policy.spread, bound, rtol=1e-9)


def test_a_window_holds_the_last_rewards_alone():
    player = policies.make("sliding-window-ucb", 2, 0)
    player.window = player.seen.maxlen
    for _ in range(300):
        player.update(0, 1.0)
    for _ in range(player.window):
        player.update(1, 0.5)
    assert {arm for arm, _ in player.seen} == {1}
    assert len(player.seen) == 200


def test_greed_leaves_its_share_to_chance():
    player = policies.make("epsilon-greedy", 4, 0)
    for arm, reward in enumerate((0.1, 0.4, 0.3, 0.2)):
        player.update(arm, reward)
    assert shares(player) == pytest.approx([0.025, 0.925, 0.025, 0.025], abs=0.015)


def test_a_bank_believes_the_discount_that_predicts():
    rng = np.random.default_rng(4)
    for period, believed in ((10**6, 3), (50, 0)):
        player = policies.make("discount-bank", 3, 0)
        for t in range(500):
            arm = int(rng.integers(3))
            player.update(arm, float((t // period % 2) * (arm - 1) + 0.05 * rng.standard_normal()))
        assert player.belief.argmax() == believed
        assert player.belief.sum() == pytest.approx(1)


def test_exponential_weights_are_their_formula():
    player, weight, seen = policies.make("exp3s", 3, 0), np.ones(3) / 3, []
    for arm, reward in ((0, 0.5), (1, 0.1), (2, 0.9), (1, 0.6)):
        p = 0.9 * weight + 0.1 / 3
        seen.append(reward)
        x = (reward - min(seen)) / (max(seen) - min(seen)) if len(seen) > 1 else 0.5
        weight[arm] *= math.exp(0.1 * x / (3 * p[arm]))
        weight = (weight + math.e * 1e-3 / 3) / (weight + math.e * 1e-3 / 3).sum()
        player.update(arm, reward)
    np.testing.assert_allclose(player.weight, weight, rtol=1e-12)
    assert shares(player) == pytest.approx(0.9 * weight + 0.1 / 3, abs=0.03)
