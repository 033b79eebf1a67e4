"""Policies that need no scale: their formulas, written again, and what leaves choices alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from optima_fast import bandit

pytestmark = pytest.mark.usefixtures("core")

SCALE_FREE = (
    *("structured-ucb", "scale-free-thompson", "scale-free-ucb", "sliding-window-ucb"),
    *("discount-bank", "epsilon-greedy", "exp3s"),
)


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
@pytest.mark.parametrize("power", [-600, -3, 1, 40, 900])
def test_a_power_of_two_on_all_rewards_changes_nothing_but_the_size(name, power):
    table = noisy(7, 400)
    plain, scaled = (under(name, 7, table, lambda r, by=by: math.ldexp(r, by)) for by in (0, power))
    assert scaled[0] == plain[0]
    assert len(set(plain[0])) > 1
    for key in ("mean", "spread"):
        expected = [math.ldexp(x, power) for x in getattr(plain[1], key)]
        assert getattr(scaled[1], key) == expected


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("shift", [1000.0, -3.0, -(2.0**30), 0.125])
def test_a_shift_of_all_rewards_changes_nothing_but_the_means(name, shift):
    table = noisy(7, 400)
    plain, shifted = (under(name, 7, table, lambda r, by=by: r + by) for by in (0.0, shift))
    assert shifted[0] == plain[0]
    assert len(set(plain[0])) > 1
    np.testing.assert_allclose(shifted[1].mean, np.add(plain[1].mean, shift), atol=1e-6)
    np.testing.assert_allclose(shifted[1].spread, plain[1].spread, rtol=1e-3)
    if name == "discount-bank":  # whose spreads go through means
        assert shifted[1].state_dict()["evidence"] == plain[1].state_dict()["evidence"]
    else:
        assert shifted[1].spread == plain[1].spread


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize(("factor", "shift"), [(3.0, 0.0), (1e-7, 0.0), (0.7, 0.1), (1e5, -12.3)])
def test_other_factors_and_shifts_round_and_choices_stay(name, factor, shift):
    table = noisy(15, 400)
    plain, changed = (
        under(name, 15, table, lambda r, a=a, b=b: a * r + b)[0]
        for a, b in ((1.0, 0.0), (factor, shift))
    )
    assert changed == plain


@pytest.mark.parametrize("name", SCALE_FREE)
def test_equal_rewards_are_no_evidence(name):
    for level in (0.0, -2.5, 1e300):
        policy = bandit.make(name, 4, seed=1)
        play(policy, lambda t, k, level=level: level, 60)
        assert policy.spread == [0.0] * 4
        assert [m for m, n in zip(policy.mean, policy.count, strict=True) if n] == pytest.approx(
            [level] * sum(n > 0 for n in policy.count)
        )


@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_change_of_the_best_arm_is_followed(name):
    """Two good arms of seven swap; what was learned before does not hold a policy for long."""
    rng = np.random.default_rng(5)
    value = np.full((1600, 7), 0.2)
    value[:800, 2] = value[800:, 5] = 1.0
    policy = bandit.make(name, 7, seed=2)
    arms = play(policy, lambda t, k: value[t, k] + 0.2 * rng.standard_normal(), 1600)
    shares = [np.mean(np.equal(part, k)) for part, k in ((arms[300:800], 2), (arms[1100:], 5))]
    assert min(shares) > {"exp3s": 0.4}.get(name, 0.85)


@pytest.mark.parametrize("name", ["scale-free-thompson", "scale-free-ucb", "epsilon-greedy"])
def test_a_discount_of_one_forgets_nothing(name):
    policy = bandit.make(name, 3, gamma=1.0, prior=1e-6, trend=0.0)
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


@pytest.mark.parametrize("trend", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("gamma", [0.9, 0.99, 1.0])
def test_ucb_is_its_formula(gamma, trend):
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


def test_defaults_are_those_of_the_study():
    for name in ("scale-free-thompson", "scale-free-ucb"):
        state = bandit.make(name, 7).state_dict()
        assert (state["gamma"], state["prior"], state["trend"]) == (0.99, 0.5, 0.01)
        assert state["width"] == {"scale-free-thompson": 0.2, "scale-free-ucb": 0.15}[name]


def test_a_window_is_the_formula_on_its_rewards_alone():
    policy = bandit.make("sliding-window-ucb", 5, window=40, width=0.4, prior=0.7, seed=1)
    table, seen = noisy(5, 200) - 7.0, []
    for t in range(200):
        ours = Statistics(5, 1.0, 0.7, 0.0)
        for k, reward in seen[-40:]:
            ours.learn(k, reward)
        arm = policy.select()
        if t >= 5:
            bound = 0.4 * np.sqrt(2 * math.log(ours.n.sum()) * ours.variance / (ours.n + 0.7))
            assert arm == (ours.mean + bound).argmax()
            np.testing.assert_allclose(policy.mean, ours.mean, rtol=1e-9)
            np.testing.assert_allclose(policy.spread, bound, rtol=1e-9)
        policy.update(arm, table[t, arm])
        seen.append((arm, table[t, arm]))


def shares(policy, draws):
    """How often each arm is chosen in one state: the round alone, and so the draw, moves on."""
    pulls, state = np.zeros(policy.arms), policy._core.state()
    for t in range(draws):
        policy._core.restore(state | {"round": 1000 + t})
        pulls[policy.select()] += 1
    policy._core.restore(state)
    return pulls / draws


def close(observed, expected, draws):
    return np.all(
        abs(observed - expected) < 4.5 * np.sqrt(expected * (1 - expected) / draws) + 2e-3
    )


def test_thompson_draws_from_its_posterior():
    policy = bandit.make("scale-free-thompson", 4, gamma=0.97, width=0.6, prior=0.5, seed=9)
    ours = Statistics(4, 0.97, 0.5, 0.01)
    rng = np.random.default_rng(2)
    for k in rng.integers(4, size=60):
        reward = 0.02 * k + 0.2 * rng.standard_normal()
        policy.update(k, reward)
        ours.learn(k, reward)
    spread = 0.6 * np.sqrt(ours.variance / (ours.n + 0.5))
    np.testing.assert_allclose(policy.spread, spread, rtol=1e-9)
    draws = ours.mean + spread * rng.standard_normal((400_000, 4))
    expected = np.bincount(draws.argmax(1), minlength=4) / len(draws)
    assert close(shares(policy, 6000), expected, 6000)
    assert expected.max() < 0.9  # a posterior that leaves a choice


def test_a_bank_is_its_formula():
    """Evidence, means and spreads of the mixture, and how often each arm is drawn."""
    gammas, forget, width, prior = (0.8, 0.97, 1.0), 0.9, 0.6, 0.5
    policy = bandit.make("discount-bank", 4, gammas=gammas, width=width, forget=forget, seed=9)
    members = [Statistics(4, gamma, prior, 0.01) for gamma in gammas]
    evidence, rng = np.zeros(3), np.random.default_rng(2)
    for t in range(120):
        k = t % 4 if t < 8 else int(rng.integers(4))
        reward = 0.3 * (k == (t > 50)) + 0.2 * rng.standard_normal() * (10 if t == 70 else 1)
        if min(m.variance if m.n.any() else 0.0 for m in members) > 1e-12:
            variance = np.array([m.variance * (1 + 1 / (m.n[k] + prior)) for m in members])
            away = np.array([reward - m.mean[k] for m in members])
            gained = -0.5 * np.log(variance) - 0.5 * np.minimum(25, away**2 / variance)
            evidence = forget * evidence + gained
        policy.update(k, reward)
        for m in members:
            m.learn(k, reward)
    belief = np.exp(evidence - evidence.max())
    belief /= belief.sum()
    assert sorted(belief)[1] > 0.05  # a mixture
    state = policy.state_dict()
    np.testing.assert_allclose(state["evidence"], evidence - evidence.max(), atol=1e-9)
    mean = sum(b * m.mean for b, m in zip(belief, members, strict=True))
    np.testing.assert_allclose(policy.mean, mean, rtol=1e-9)
    spreads = [width * np.sqrt(m.variance / (m.n + prior)) for m in members]
    second = [s**2 + (m.mean - mean) ** 2 for s, m in zip(spreads, members, strict=True)]
    np.testing.assert_allclose(policy.spread, np.sqrt(belief @ second), rtol=1e-9)
    chosen = rng.choice(3, p=belief, size=200_000)
    draws = np.array([m.mean for m in members])[chosen]
    draws = draws + np.array(spreads)[chosen] * rng.standard_normal(draws.shape)
    expected = np.bincount(draws.argmax(1), minlength=4) / len(draws)
    assert close(shares(policy, 6000), expected, 6000)


def test_exp3s_is_its_formula():
    mix, share, n = 0.2, 0.05, 5
    policy = bandit.make("exp3s", n, mix=mix, share=share, seed=9)
    table, weight, seen = noisy(n, 80), np.ones(n), []
    for t in range(80):
        arm = policy.select()
        p = (1 - mix) * weight / weight.sum() + mix / n
        seen.append(table[t, arm])
        low, high = min(seen), max(seen)
        x = (seen[-1] - low) / (high - low) if high > low else 0.5
        everyone = math.e * share / n  # of weights that add up to 1, as they did before the reward
        weight = weight / weight.sum()
        weight[arm] *= math.exp(mix * x / (n * p[arm]))
        weight = weight + everyone
        policy.update(arm, seen[-1])
        np.testing.assert_allclose(policy.state_dict()["weight"], weight / weight.sum(), rtol=1e-9)
    p = (1 - mix) * weight / weight.sum() + mix / n
    assert close(shares(policy, 6000), p, 6000)


def test_epsilon_greedy_takes_the_best_but_for_its_share():
    policy = bandit.make("epsilon-greedy", 4, epsilon=0.3, seed=9)
    for k, reward in enumerate((0.1, 0.4, 0.3, 0.2)):
        policy.update(k, reward)
    assert policy.spread == [0.0] * 4
    assert close(shares(policy, 6000), np.array([0.075, 0.775, 0.075, 0.075]), 6000)


def test_round_robin_takes_turns():
    assert play(bandit.make("round-robin", 3), lambda t, k: 0.0, 7) == [0, 1, 2, 0, 1, 2, 0]


WARMED = [name for name in SCALE_FREE if name != "exp3s"]


@pytest.mark.parametrize("name", WARMED)
@pytest.mark.parametrize(
    ("arms", "options", "pulls"),
    [
        (7, {}, [1] * 7),
        (7, {"init_rounds": 2}, [2] * 7),
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


@pytest.mark.parametrize("name", WARMED)
@pytest.mark.parametrize("arms", [63, 255])
def test_a_warm_up_is_never_over_32_rounds_unasked(name, arms):
    assert bandit.make(name, arms).warm_up == (16 if name == "structured-ucb" else 32)


@pytest.mark.parametrize("name", WARMED)
def test_an_explicit_warm_up_that_does_not_fit_is_refused(name):
    message = (
        r"^init_rounds 3 of each of 7 arms must fit into warmup_limit 20, got 21 rounds: raise "
        "warmup_limit, or leave init_rounds to the default$"
    )
    with pytest.raises(ValueError, match=message):
        bandit.make(name, 7, init_rounds=3, warmup_limit=20)


BAD = {
    "gamma": [(0.0, r"in \(0, 1\], got 0\.0"), (1.5, "1.5"), (-0.1, "-0.1"), (math.nan, "nan")],
    "width": [(-0.5, "from 0 to 1e.06, got -0.5"), (math.inf, "finite, got inf"), (2e6, "2000000")],
    "prior": [(0.0, "from 1e-06 to 1e.06, got 0.0"), (math.nan, "finite, got nan")],
    "trend": [(-1e-3, "from 0 to .*, got -0.001"), (2e6, "got 2000000"), (math.inf, "got inf")],
    "forget": [(0.0, r"in \(0, 1\], got 0\.0"), (1.1, "got 1.1")],
    "gammas": [([], r"1 to 16 discounts, got \[\]"), ([0.5, 2.0], r"in \(0, 1\], got 2\.0")],
    "window": [(0, "from 1 to 65536, got 0"), (10**6, "got 1000000")],
    "epsilon": [(-0.1, "from 0 to 1, got -0.1"), (1.1, "got 1.1")],
    "mix": [(0.0, r"in \(0, 1\], got 0\.0"), (math.nan, "nan")],
    "share": [(-1.0, "from 0 to 1, got -1.0")],
    "init_rounds": [(-1, "from 0 to 16777216, got -1")],
    "warmup_limit": [(-1, "from 0 to 16777216, got -1")],
    "seed": [(-1, "from 0 to 18446744073709551615, got -1"), (2**64, "got 18446744073709551616")],
}


@pytest.mark.parametrize("name", SCALE_FREE)
def test_bad_options_are_refused_with_their_value(name):
    known = set(bandit.make(name, 7).state_dict()) & set(BAD)
    assert {"seed"} < known
    for option in known:
        for value, message in BAD[option]:
            with pytest.raises(ValueError, match=f"^{option}.* must be .*{message}"):
                bandit.make(name, 7, **{option: value})
        with pytest.raises(TypeError, match=f"^{option} must be|has no len"):
            bandit.make(name, 7, **{option: object()})


@pytest.mark.parametrize("name", SCALE_FREE)
def test_bad_updates_change_nothing(name):
    policy = bandit.make(name, 7)
    play(policy, lambda t, k: 0.1 * k, 9)
    before = policy.state_dict()
    for arm, reward, error, message in (
        (7, 0.5, IndexError, "arm must be from 0 to 6, got 7"),
        (-1, 0.5, IndexError, "arm must be from 0 to 6, got -1"),
        (0, math.nan, ValueError, "reward must be finite, got nan"),
        (0, -math.inf, ValueError, "reward must be finite, got -inf"),
        (0, "1", TypeError, "reward must be a number, got '1'"),
    ):
        with pytest.raises(error, match=message):
            policy.update(arm, reward)
    assert policy.state_dict() == before
