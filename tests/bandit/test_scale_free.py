"""Policies that need no scale: the discounted bounds' formula, and what leaves choices alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optima_fast import bandit

SCALE_FREE = ("structured-ucb", "scale-free-ucb")


def play(policy, reward, rounds):
    """Arms pulled; ``reward`` is of (round, arm)."""
    arms = []
    for t in range(rounds):
        arms.append(policy.select())
        policy.update(arms[-1], reward(t, arms[-1]))
    return arms


def noisy(arms, rounds, seed=0):
    """Rewards that change half-way, multiples of 2**-10 so that sums and differences are exact."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((2, arms)).repeat(rounds // 2, axis=0)
    return np.round((value + rng.standard_normal((rounds, arms))) * 2**10) / 2**10


def under(name, arms, table, change, **options):
    policy = bandit.make(name, arms, seed=3, **options)
    return play(policy, lambda t, k: float(change(table[t, k])), len(table)), policy


@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_power_of_two_on_all_rewards_changes_nothing_but_the_size(name):
    table = noisy(7, 400)
    plain = under(name, 7, table, float)
    assert len(set(plain[0])) > 1
    for power in (-600, -3, 1, 40, 900):
        arms, scaled = under(name, 7, table, lambda r, by=power: math.ldexp(r, by))
        assert arms == plain[0]
        for key in ("mean", "spread"):
            expected = [math.ldexp(x, power) for x in getattr(plain[1], key)]
            assert getattr(scaled, key) == expected


@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_shift_of_all_rewards_changes_nothing_but_the_means(name):
    table = noisy(7, 400)
    plain = under(name, 7, table, float)
    for shift in (1000.0, -3.0, -(2.0**30), 0.125):
        arms, shifted = under(name, 7, table, lambda r, by=shift: r + by)
        assert arms == plain[0]
        np.testing.assert_allclose(shifted.mean, np.add(plain[1].mean, shift), atol=1e-6)
        assert shifted.spread == plain[1].spread


@pytest.mark.parametrize("name", SCALE_FREE)
def test_other_factors_and_shifts_round_and_choices_stay(name):
    table = noisy(15, 400)
    plain = under(name, 15, table, float)[0]
    for a, b in ((3.0, 0.0), (1e-7, 0.0), (0.7, 0.1), (1e5, -12.3)):
        assert under(name, 15, table, lambda r, a=a, b=b: a * r + b)[0] == plain


@pytest.mark.parametrize("name", SCALE_FREE)
def test_equal_rewards_are_no_evidence(name):
    for level in (0.0, -2.5, 1e300):
        policy = bandit.make(name, 4, seed=1)
        play(policy, lambda t, k, level=level: level, 60)
        assert policy.spread == [0.0] * 4
        assert policy.mean == pytest.approx([level] * 4)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_change_of_the_best_arm_is_followed(name):
    """Two good arms of seven swap; what was learned before does not hold a policy for long."""
    rng = np.random.default_rng(5)
    value = np.full((1600, 7), 0.2)
    value[:800, 2] = value[800:, 5] = 1.0
    policy = bandit.make(name, 7, seed=2)
    arms = play(policy, lambda t, k: value[t, k] + 0.2 * rng.standard_normal(), 1600)
    shares = [np.mean(np.equal(part, k)) for part, k in ((arms[300:800], 2), (arms[1100:], 5))]
    assert min(shares) > 0.85


def test_a_discount_of_one_forgets_nothing():
    policy = bandit.make("scale-free-ucb", 3, gamma=1.0, prior=1e-6, trend=0.0)
    table = noisy(3, 200)
    arms = play(policy, lambda t, k: table[t, k], 200)
    for k in range(3):
        mean = np.mean([table[t, k] for t, arm in enumerate(arms) if arm == k])
        assert policy.mean[k] == pytest.approx(mean, abs=1e-4)


class Statistics:
    """N, S and Q of the docstring, of rewards less the common level."""

    def __init__(self, arms, gamma, prior, trend):
        self.gamma, self.prior, self.trend = gamma, prior, trend
        self.n, self.s, self.q = np.zeros((3, arms))
        self.level = None

    def learn(self, k, reward):
        if self.level is None:
            self.level = reward
        y = reward - self.level
        for x, add in ((self.n, 1.0), (self.s, y), (self.q, y * y)):
            x *= self.gamma
            x[k] += add
        self.level += self.trend * (reward - self.level - self.s[k] / self.n[k])

    @property
    def mean(self):
        g = self.s.sum() / self.n.sum()
        return self.level + (self.s + self.prior * g) / (self.n + self.prior)

    @property
    def variance(self):
        within = self.q - self.s**2 / np.where(self.n > 0, self.n, 1)
        freedom = self.n.sum() - np.minimum(self.n, 1).sum()
        return max(0.0, within.sum()) / max(1.0, freedom)


@pytest.mark.parametrize(("gamma", "trend"), [(0.9, 0.3), (0.99, 0.01), (1.0, 0.0)])
def test_the_bounds_are_their_formula(gamma, trend):
    options = {"gamma": gamma, "width": 0.4, "prior": 0.7, "trend": trend}
    policy = bandit.make("scale-free-ucb", 7, seed=1, **options)
    ours, table = Statistics(7, gamma, 0.7, trend), noisy(7, 300) + 3.0
    for t in range(300):
        arm = policy.select()
        if t >= 7:
            weight = 2 * math.log(max(1, ours.n.sum()))
            bound = 0.4 * np.sqrt(weight * ours.variance / (ours.n + 0.7))
            assert arm == (ours.mean + bound).argmax()
            np.testing.assert_allclose(policy.spread, bound, rtol=1e-9)
        policy.update(arm, table[t, arm])
        ours.learn(arm, table[t, arm])
        np.testing.assert_allclose(policy.mean, ours.mean, rtol=1e-9)


def test_what_is_long_ago_is_forgotten_altogether():
    """An arm's weight of nothing must not stay a number below all others, and slow."""
    policy = bandit.make("scale-free-ucb", 2, gamma=0.5)
    for arm, rounds in ((0, 1), (1, 101)):
        for _ in range(rounds):
            policy.update(arm, 1.0 - arm)
    state = policy.state_dict()
    assert (state["weight"][0], state["average"][0], state["square"][0]) == (0.0, 0.0, 0.0)


def test_defaults_are_those_of_the_study():
    state = bandit.make("scale-free-ucb", 7).state_dict()
    assert [state[k] for k in ("gamma", "width", "prior", "trend")] == [0.99, 0.15, 0.5, 0.01]
    state = bandit.make("structured-ucb", 7).state_dict()
    assert [state[k] for k in ("gamma", "width", "prior", "trend")] == [0.995, 1.4, 0.1, 0.0015]


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize(
    ("arms", "options", "pulls"),
    [
        (7, {}, [1] * 7),
        (7, {"init_rounds": 2, "warmup_limit": 14}, [2] * 7),
        (7, {"init_rounds": 0}, []),
        (7, {"warmup_limit": 5}, [1] * 5),
        (63, {"warmup_limit": 32}, [1] * 32),
        (63, {"init_rounds": 2, "warmup_limit": 126}, [2] * 63),
    ],
)
def test_a_warm_up_pulls_different_arms_in_a_shuffled_order(name, arms, options, pulls):
    orders = []
    for seed in range(3):
        policy = bandit.make(name, arms, seed=seed, **options)
        assert policy.warm_up == sum(pulls)
        orders.append(play(policy, lambda t, k: 0.1 * k, sum(pulls)))
        assert sorted(n for n in policy.count if n) == sorted(pulls)
    assert len({*map(tuple, orders)}) == (3 if pulls else 1)


@pytest.mark.parametrize(("name", "most"), [("structured-ucb", 16), ("scale-free-ucb", 32)])
def test_a_warm_up_is_never_long_unasked(name, most):
    assert [bandit.make(name, arms).warm_up for arms in (63, 255)] == [most, most]


@pytest.mark.parametrize("name", SCALE_FREE)
def test_an_explicit_warm_up_that_does_not_fit_is_refused(name):
    message = (
        r"^init_rounds 3 of each of 7 arms must fit into warmup_limit 20, got 21 rounds: raise "
        "warmup_limit, or leave init_rounds to the default$"
    )
    with pytest.raises(ValueError, match=message):
        bandit.make(name, 7, init_rounds=3, warmup_limit=20)
