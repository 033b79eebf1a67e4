"""The paper's policy: its initialisation, its draws, its means."""

from fractions import Fraction

import numpy as np
import pytest

from optima_fast import bandit


def play(policy, rounds, reward=lambda arm, t: arm / 10):
    arms = []
    for t in range(rounds):
        arms.append(policy.select())
        policy.update(arms[-1], reward(arms[-1], t))
    return arms


@pytest.mark.parametrize(("arms", "init_rounds"), [(7, 10), (3, 1), (1, 4)])
def test_initialisation_pulls_each_arm_t0_times_in_a_shuffled_order(arms, init_rounds):
    policy = bandit.GaussianThompson(arms, init_rounds=init_rounds)
    assert policy.warm_up == arms * init_rounds
    order = play(policy, arms * init_rounds)
    assert sorted(order) == sorted(list(range(arms)) * init_rounds)
    assert policy.count == [init_rounds] * arms
    if arms > 1 < init_rounds:
        assert order != list(range(arms)) * init_rounds


def test_shuffle_is_uniform():
    """Each of the 6 orders of 3 arms is equally likely: chi-square over seeds."""
    seen = {}
    for seed in range(1200):
        policy = bandit.GaussianThompson(3, init_rounds=1, seed=seed)
        order = tuple(play(policy, 3))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6
    assert sum((n - 200) ** 2 / 200 for n in seen.values()) < 20.5  # p = 0.001 at 5 degrees


def test_means_are_the_average_of_t0_rewards_then_an_ema():
    """Against Eq. 7 in exact rationals; and the same doubles as the formula, read literally."""
    gamma, t0 = 0.98, 4
    policy = bandit.GaussianThompson(3, gamma=gamma, init_rounds=t0, seed=5)
    rewards = np.random.default_rng(0).integers(0, 2**10, 200) / 2**10  # sums are exact
    history = {k: [] for k in range(3)}
    mean, literal = {}, {}
    for t, r in enumerate(rewards):
        k = policy.select()
        policy.update(k, r)
        history[k].append(Fraction(r))
        if t < 3 * t0:
            mean[k] = sum(history[k]) / len(history[k])
            literal[k] = float(sum(history[k])) / len(history[k])
        else:
            mean[k] = Fraction(gamma) * mean[k] + Fraction(1 - gamma) * Fraction(r)
            literal[k] = gamma * literal[k] + (1 - gamma) * float(r)
        assert policy.mean[k] == literal[k] == pytest.approx(float(mean[k]), rel=1e-14)
        assert policy.round == t + 1
    assert policy.count == [len(history[k]) for k in range(3)]


def test_default_gamma_has_the_half_life_of_the_paper():
    policy = bandit.GaussianThompson(1, init_rounds=1)
    policy.update(0, 1.0)
    for _ in range(34):
        policy.update(0, 0.0)
    assert policy.mean[0] > 0.5
    policy.update(0, 0.0)
    assert policy.mean[0] < 0.5


def test_gamma_of_one_never_moves_a_mean():
    long, short = (bandit.GaussianThompson(2, gamma=1.0, init_rounds=1) for _ in range(2))
    play(long, 50, lambda arm, t: arm + t)
    play(short, 2, lambda arm, t: arm + t)
    assert long.mean == short.mean


def test_variance_scale_zero_takes_the_largest_mean_and_the_lowest_of_equals():
    policy = bandit.GaussianThompson(4, variance_scale=0.0, init_rounds=1)
    play(policy, 4, lambda arm, t: [0.1, 0.7, 0.7, 0.3][arm])
    assert policy.select() == 1


@pytest.mark.parametrize("variance_scale", [1.0, 0.04])
def test_pull_shares_are_those_of_the_posterior(variance_scale):
    """One posterior in many rounds, so the core is put there; updates would move it."""
    policy = bandit.GaussianThompson(4, init_rounds=1, variance_scale=variance_scale, seed=8)
    means, counts = [0.5, 0.3, 0.1, -0.2], [40, 5, 2, 0]
    pulls, draws = np.zeros(4), 5000
    for t in range(4, 4 + draws):
        policy._core.restore({"round": t, "count": counts, "total": [0.0] * 4, "mean": means})
        pulls[policy.select()] += 1
    z = np.random.default_rng(11).standard_normal((400_000, 4))
    spread = np.sqrt(variance_scale / (np.array(counts) + 1))
    expected = np.bincount((means + spread * z).argmax(1), minlength=4) / len(z)
    error = 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-3
    assert np.all(abs(pulls / draws - expected) < error)
    np.testing.assert_allclose(policy.spread, spread, rtol=1e-15)


def test_pull_shares_over_whole_runs_are_those_of_an_independent_simulation():
    """Eq. 2 and 7 again, written with numpy and its own generator: 7 arms, noisy rewards."""
    best, rounds, runs = np.linspace(0.4, 2.0, 7), 250, 30
    reward = np.random.default_rng(3)
    ours, theirs = np.zeros((2, runs, 7))
    for run in range(runs):
        policy = bandit.GaussianThompson(7, init_rounds=2, seed=run)
        play(policy, rounds, lambda arm, t: best[arm] + 0.1 * reward.standard_normal())
        ours[run] = np.array(policy.count) / rounds

        rng = np.random.default_rng(1000 + run)
        mean = best + 0.1 * rng.standard_normal((2, 7)).mean(0)
        count = np.full(7, 2)
        for _ in range(rounds - 14):
            k = rng.normal(mean, 1 / np.sqrt(count + 1)).argmax()
            mean[k] = 0.98 * mean[k] + 0.02 * (best[k] + 0.1 * rng.standard_normal())
            count[k] += 1
        theirs[run] = count / rounds
    error = np.sqrt((ours.var(0) + theirs.var(0)) / runs)
    assert np.all(abs(ours.mean(0) - theirs.mean(0)) < 4 * error + 1e-3)
    assert ours.mean(0)[6] > 2 / 7


@pytest.mark.usefixtures("either")
def test_choices_are_pinned():
    """A change here changes every seeded run: it needs a line in the changelog."""
    policy = bandit.GaussianThompson(7, init_rounds=1, seed=0)
    expected = "4 2 6 1 3 0 5 3 2 5 2 1 6 3 1 6 0 3 6 4 5 3 4 5 6 6 4 5 6 3 1 6 5 6 6 5 6 6 6 1"
    assert play(policy, 40) == [int(arm) for arm in expected.split()]


def test_updates_of_arms_not_proposed_count_for_the_arm_they_name():
    policy = bandit.GaussianThompson(3, init_rounds=2, gamma=0.5, variance_scale=0.0)
    for reward in (1.0, 2.0, 3.0, 4.0):
        policy.update(1, reward)
    policy.update(0, 1.0)
    policy.update(0, 2.0)
    assert policy.mean == [1.5, 2.5, 0.0]
    assert policy.count == [2, 4, 0]
    assert policy.select() == 1
    policy.update(2, 8.0)
    assert policy.mean[2] == 4.0


def test_without_initialisation_every_arm_starts_from_zero():
    policy = bandit.GaussianThompson(3, init_rounds=0, gamma=0.75)
    assert policy.mean == [0.0] * 3
    policy.update(1, 1.0)
    assert policy.mean == [0.0, 0.25, 0.0]


@pytest.mark.usefixtures("either")
def test_rewards_whose_sum_overflows_are_refused():
    policy = bandit.GaussianThompson(2)
    policy.update(0, 1e308)
    with pytest.raises(ValueError, match=r"arm 0 must have a finite sum, got 1e\+308 more"):
        policy.update(0, 1e308)
    assert policy.mean == [1e308, 0.0]
