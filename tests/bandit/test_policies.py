"""Policies: what they choose, what they learn, what they refuse."""

import doctest
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optima_fast import bandit
from optima_fast.bandit import _cores, backend, policies, scale_free, structured

if bandit.BACKEND == "c++":
    from optima_fast import _bandit

needs_cpp = pytest.mark.skipif(bandit.BACKEND != "c++", reason="the extension is not built")


def play(policy, rounds, reward=lambda arm, t: arm / 10):
    arms = []
    for t in range(rounds):
        arms.append(policy.select())
        policy.update(arms[-1], reward(arms[-1], t))
    return arms


@needs_cpp
@pytest.mark.parametrize(
    ("arms", "gamma", "init_rounds", "variance_scale", "seed"),
    [
        (7, 0.98, 10, 1.0, 0),
        (7, 0.5, 1, 0.01, 1),
        (1, 1.0, 2, 1.0, 2),
        (63, 0.9, 0, 1e-4, 2**64 - 1),
        (5, 1.0, 3, 0.0, 2**32),
    ],
)
def test_twins_take_the_same_steps(arms, gamma, init_rounds, variance_scale, seed):
    cpp = _bandit.GaussianThompson(arms, gamma, init_rounds, variance_scale, seed)
    python = _cores.GaussianThompson(arms, gamma, init_rounds, variance_scale, seed)
    noise = np.random.default_rng(seed)
    for _ in range(3000 // math.isqrt(arms)):
        arm = cpp.select()
        assert python.select() == arm
        reward = noise.exponential() / (arm + 1)
        cpp.update(arm, reward)
        python.update(arm, reward)
        assert cpp.mean == python.mean
    assert cpp.state() == python.state()


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(
    arms=st.integers(1, 9),
    gamma=st.floats(0, 1, exclude_min=True),
    init_rounds=st.integers(0, 4),
    variance_scale=st.floats(0, 1e300),
    seed=st.integers(0, 2**64 - 1),
    updates=st.lists(
        st.tuples(st.none() | st.integers(-2, 10), st.floats() | st.integers()), max_size=60
    ),
)
def test_twins_agree_on_any_updates(arms, gamma, init_rounds, variance_scale, seed, updates):
    """Also on arms nobody proposed, on rewards of any size, and on what they refuse."""
    cpp = _bandit.GaussianThompson(arms, gamma, init_rounds, variance_scale, seed)
    python = _cores.GaussianThompson(arms, gamma, init_rounds, variance_scale, seed)
    for arm, reward in updates:
        outcomes = []
        for policy in (cpp, python):
            try:
                outcomes.append(policy.update(policy.select() if arm is None else arm, reward))
            except (ValueError, IndexError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
        assert cpp.state() == python.state()
        assert cpp.select() == python.select()


@pytest.mark.parametrize(("arms", "init_rounds"), [(7, 10), (3, 1), (1, 4)])
@pytest.mark.usefixtures("core")
def test_initialisation_pulls_each_arm_t0_times_in_a_shuffled_order(arms, init_rounds):
    policy = bandit.GaussianThompson(arms, init_rounds=init_rounds)
    order = play(policy, arms * init_rounds)
    assert sorted(order) == sorted(list(range(arms)) * init_rounds)
    assert policy.count == [init_rounds] * arms
    if arms > 1 < init_rounds:
        assert order != list(range(arms)) * init_rounds


@pytest.mark.usefixtures("core")
def test_shuffle_is_uniform():
    """Each of the 6 orders of 3 arms is equally likely: chi-square over seeds."""
    seen = {}
    for seed in range(1200):
        policy = bandit.GaussianThompson(3, init_rounds=1, seed=seed)
        order = tuple(play(policy, 3))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6
    assert sum((n - 200) ** 2 / 200 for n in seen.values()) < 20.5  # p = 0.001 at 5 degrees


@pytest.mark.usefixtures("core")
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


@pytest.mark.usefixtures("core")
def test_default_gamma_has_the_half_life_of_the_paper():
    policy = bandit.GaussianThompson(1, init_rounds=1)
    policy.update(0, 1.0)
    for _ in range(34):
        policy.update(0, 0.0)
    assert policy.mean[0] > 0.5
    policy.update(0, 0.0)
    assert policy.mean[0] < 0.5


@pytest.mark.usefixtures("core")
def test_gamma_of_one_never_moves_a_mean():
    policy = bandit.GaussianThompson(2, gamma=1.0, init_rounds=1)
    play(policy, 50, lambda arm, t: arm + t)
    first = bandit.GaussianThompson(2, gamma=1.0, init_rounds=1)
    play(first, 2, lambda arm, t: arm + t)
    assert policy.mean == first.mean


@pytest.mark.usefixtures("core")
def test_variance_scale_zero_takes_the_largest_mean_and_the_lowest_of_equals():
    policy = bandit.GaussianThompson(4, variance_scale=0.0, init_rounds=1)
    play(policy, 4, lambda arm, t: [0.1, 0.7, 0.7, 0.3][arm])
    assert policy.select() == 1


def simulate(means, counts, variance_scale, draws):
    """Shares of argmax_k N(mu_k, v / (n_k + 1)), by numpy."""
    z = np.random.default_rng(11).standard_normal((draws, len(means)))
    spread = np.sqrt(variance_scale / (np.array(counts) + 1))
    return np.bincount((means + spread * z).argmax(1), minlength=len(means)) / draws


@pytest.mark.parametrize("variance_scale", [1.0, 0.04])
@pytest.mark.usefixtures("core")
def test_pull_shares_are_those_of_the_posterior(variance_scale):
    """One posterior in many rounds, so the core is put there; updates would move it."""
    policy = backend.cores.GaussianThompson(4, 0.98, 1, variance_scale, 8)
    means, counts = [0.5, 0.3, 0.1, -0.2], [40, 5, 2, 0]
    pulls, draws = np.zeros(4), 15_000
    for t in range(4, 4 + draws):
        policy.restore({"round": t, "count": counts, "total": [0.0] * 4, "mean": means})
        pulls[policy.select()] += 1
    expected = simulate(means, counts, variance_scale, 400_000)
    error = 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-3
    assert np.all(abs(pulls / draws - expected) < error)


@pytest.mark.usefixtures("core")
def test_pull_shares_over_whole_runs_are_those_of_an_independent_simulation():
    """Eq. 2 and 7 again, written with numpy and its own generator: 7 arms, noisy rewards."""
    best, rounds, runs = np.linspace(0.4, 2.0, 7), 250, 40
    reward = np.random.default_rng(3)
    ours = np.zeros((runs, 7))
    theirs = np.zeros((runs, 7))
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


@pytest.mark.usefixtures("core")
def test_choices_are_pinned():
    """A change here changes every seeded run: it needs a line in the changelog."""
    policy = bandit.GaussianThompson(7, init_rounds=1, seed=0)
    expected = "4 2 6 1 3 0 5 3 2 5 2 1 6 3 1 6 0 3 6 4 5 3 4 5 6 6 4 5 6 3 1 6 5 6 6 5 6 6 6 1"
    assert play(policy, 40) == [int(arm) for arm in expected.split()]


@pytest.mark.parametrize("name", ["paper", "random"])
@pytest.mark.usefixtures("core")
def test_a_seed_repeats_and_another_differs(name):
    first, again, other, high = (
        play(bandit.make(name, 7, seed=seed), 200) for seed in (4, 4, 5, 4 + 2**32)
    )
    assert first == again
    assert first != other
    assert first != high


@pytest.mark.parametrize("name", ["paper", "random", "fixed"])
@pytest.mark.usefixtures("core")
def test_select_has_no_effect(name):
    options = {"arm": 1} if name == "fixed" else {}
    asked, quiet = (bandit.make(name, 5, seed=2, **options) for _ in range(2))
    for t in range(120):
        arm = asked.select()
        assert [asked.select() for _ in range(3)] == [arm] * 3
        assert asked.state_dict() == quiet.state_dict()
        asked.update(arm, t % 3)
        quiet.update(arm, t % 3)


def test_random_is_uniform():
    counts = np.bincount(play(bandit.make("random", 7, seed=1), 7000), minlength=7)
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # p = 0.001 at 6 degrees


def test_random_and_fixed_average_their_rewards():
    policy = bandit.make("fixed", 3, arm=2)
    assert play(policy, 4, lambda arm, t: t) == [2, 2, 2, 2]
    policy.update(0, 7.0)
    assert policy.mean == [7.0, 0.0, 1.5]
    assert policy.count == [1, 0, 4]
    assert policy.round == 5


@pytest.mark.usefixtures("core")
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


@pytest.mark.usefixtures("core")
def test_without_initialisation_every_arm_starts_from_zero():
    policy = bandit.GaussianThompson(3, init_rounds=0, gamma=0.75)
    assert policy.mean == [0.0] * 3
    policy.update(1, 1.0)
    assert policy.mean == [0.0, 0.25, 0.0]


@pytest.mark.usefixtures("core")
def test_mean_and_count_are_copies():
    policy = bandit.GaussianThompson(2)
    policy.mean[0] = policy.count[0] = 9
    assert policy.mean == [0.0, 0.0]
    assert policy.count == [0, 0]
    state = policy.state_dict()
    policy.update(0, 1.0)
    assert state["mean"] == [0.0, 0.0]


@pytest.mark.parametrize("arms", [3, ["abc", "d"], ("image", "text", "multimodal")])
def test_arms_by_number_or_by_length(arms):
    policy = bandit.GaussianThompson(arms)
    assert policy.arms == len(policy.mean) == (arms if isinstance(arms, int) else len(arms))
    assert repr(policy).startswith(f"GaussianThompson(arms={policy.arms}, gamma=0.98, ")


@pytest.mark.parametrize("reward", [1, True, np.float32(0.5), np.int64(3), Fraction(1, 4)])
@pytest.mark.usefixtures("core")
def test_anything_with_a_float_is_a_reward(reward):
    policy = bandit.GaussianThompson(2)
    policy.update(np.int64(1), reward)
    assert policy.mean == [0.0, float(reward)]


@pytest.mark.parametrize(
    ("arm", "reward", "error", "message"),
    [
        (7, 0.5, IndexError, r"^arm must be from 0 to 6, got 7$"),
        (-1, 0.5, IndexError, r"^arm must be from 0 to 6, got -1$"),
        (2**70, 0.5, IndexError, rf"^arm must be from 0 to 6, got {2**70}$"),
        (1.0, 0.5, TypeError, r"^arm must be an integer, got 1\.0$"),
        ("image", 0.5, TypeError, r"^arm must be an integer, got 'image'$"),
        (None, 0.5, TypeError, r"^arm must be an integer, got None$"),
        (1, math.nan, ValueError, r"^reward must be finite, got nan$"),
        (1, -math.inf, ValueError, r"^reward must be finite, got -inf$"),
        (1, 10**400, ValueError, r"^reward must be finite, got 1000"),
        (1, "0.5", TypeError, r"^reward must be a number, got '0\.5'$"),
        (1, None, TypeError, r"^reward must be a number, got None$"),
        (1, [0.5], TypeError, r"^reward must be a number, got \[0\.5\]$"),
        (1, 1j, TypeError, r"^reward must be a number, got 1j$"),
    ],
)
@pytest.mark.parametrize("init_rounds", [0, 10])
@pytest.mark.usefixtures("core")
def test_bad_updates(arm, reward, error, message, init_rounds):
    policy = bandit.GaussianThompson(7, init_rounds=init_rounds)
    before = policy.state_dict()
    with pytest.raises(error, match=message):
        policy.update(arm, reward)
    assert policy.state_dict() == before


class Unreadable:
    def __float__(self):
        raise RuntimeError("no value yet")

    def __index__(self):
        raise RuntimeError("no value yet")


@pytest.mark.usefixtures("core")
def test_errors_of_an_argument_itself_come_through():
    policy = bandit.GaussianThompson(7)
    for arm, reward in ((0, Unreadable()), (Unreadable(), 0.5)):
        with pytest.raises(RuntimeError, match="no value yet"):
            policy.update(arm, reward)


@pytest.mark.usefixtures("core")
def test_rewards_whose_sum_overflows_are_refused():
    policy = bandit.GaussianThompson(2)
    policy.update(0, 1e308)
    with pytest.raises(ValueError, match=r"arm 0 must have a finite sum, got 1e\+308 more"):
        policy.update(0, 1e308)
    assert policy.mean == [1e308, 0.0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arms": 0}, ValueError, r"^arms must be from 1 to 16777216, got 0$"),
        ({"arms": -3}, ValueError, r"^arms must be from 1 to 16777216, got -3$"),
        ({"arms": []}, ValueError, r"^arms must be from 1 to 16777216, got 0$"),
        ({"arms": 2.0}, TypeError, r"^arms must be an integer, got 2\.0$"),
        ({"arms": "image"}, TypeError, r"sequence of arms, got 'image'$"),
        ({"gamma": 0.0}, ValueError, r"^gamma must be in \(0, 1\], got 0\.0$"),
        ({"gamma": 1.01}, ValueError, r"^gamma must be in \(0, 1\], got 1\.01$"),
        ({"gamma": -0.5}, ValueError, r"^gamma must be in \(0, 1\], got -0\.5$"),
        ({"gamma": math.nan}, ValueError, r"^gamma must be finite, got nan$"),
        ({"gamma": "0.9"}, TypeError, r"^gamma must be a number, got '0\.9'$"),
        ({"init_rounds": -1}, ValueError, r"^init_rounds must be from 0 to 2396745, got -1$"),
        ({"init_rounds": 10**9}, ValueError, r"^init_rounds must be from 0 to 2396745, got 1000"),
        ({"init_rounds": 1.5}, TypeError, r"^init_rounds must be an integer, got 1\.5$"),
        ({"variance_scale": -1e-9}, ValueError, r"^variance_scale must not be negative, got -1e"),
        ({"variance_scale": math.inf}, ValueError, r"^variance_scale must be finite, got inf$"),
        ({"variance_scale": None}, TypeError, r"^variance_scale must be a number, got None$"),
        ({"seed": -1}, ValueError, r"^seed must be from 0 to 18446744073709551615, got -1$"),
        ({"seed": 2**64}, ValueError, r"^seed must be from 0 to .*, got 18446744073709551616$"),
        ({"seed": 0.5}, TypeError, r"^seed must be an integer, got 0\.5$"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        bandit.GaussianThompson(**{"arms": 7, **options})


def test_every_name_makes_a_policy():
    assert set(bandit.names()) == {
        *("paper", "scale-free-thompson", "scale-free-ucb", "sliding-window-ucb", "exp3s"),
        *("epsilon-greedy", "discount-bank", "structured-ucb", "random", "round-robin", "fixed"),
        "greedy",
    }
    for name in bandit.names():
        policy = bandit.make(name, 7, seed=1, **({"arm": 4} if name == "fixed" else {}))
        assert policy.state_dict()["policy"] == name
        assert 0 <= policy.select() < 7
    assert type(bandit.make("paper", 7)) is bandit.GaussianThompson


def test_options_reach_the_policy():
    policy = bandit.make("paper", 3, gamma=0.5, init_rounds=4, variance_scale=2, seed=9)
    reference = bandit.GaussianThompson(3, gamma=0.5, init_rounds=4, variance_scale=2, seed=9)
    assert policy.state_dict() == reference.state_dict()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("papper", "paper"), ("rand", "random"), ("thompson", "scale-free-thompson"), (7, "")],
)
def test_an_unknown_name_gives_the_nearest(name, nearest):
    message = f"policy must be one of paper, .*, fixed, got {name!r}: did you mean '{nearest}"
    with pytest.raises(ValueError, match=message):
        bandit.make(name, 3)


def test_an_unknown_option_gives_the_known_ones():
    with pytest.raises(TypeError, match=r"'paper' are gamma, init_rounds, .*, seed, got 'gama'"):
        bandit.make("paper", 3, gama=0.5)
    with pytest.raises(TypeError, match="arm"):
        bandit.make("fixed", 3)


@pytest.mark.parametrize("arm", [3, -1])
def test_a_fixed_arm_must_exist(arm):
    with pytest.raises(ValueError, match=f"arm must be from 0 to 2, got {arm}"):
        bandit.make("fixed", 3, arm=arm)


def test_docstring_examples():
    for module in (bandit, policies, scale_free, structured):
        failed, attempted = doctest.testmod(module)
        assert failed == 0 < attempted
