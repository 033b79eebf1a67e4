"""What holds for every policy: names, options, arguments, choices that a seed repeats."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction

import numpy as np
import pytest

from optima_fast import bandit
from optima_fast.bandit import baselines, scale_free, structured, thompson

NAMES = ("thompson", "structured-ucb", "scale-free-ucb", "greedy", "random", "round-robin", "fixed")


def make(name, arms=7, **options):
    return bandit.make(name, arms, **({"arm": 3} if name == "fixed" else {}), **options)


def play(policy, rounds):
    arms = []
    for t in range(rounds):
        arms.append(policy.select())
        policy.update(arms[-1], (arms[-1] + t % 3) / 10)
    return arms


def test_every_name_makes_a_policy():
    assert bandit.names() == NAMES
    for name in NAMES:
        policy = make(name, seed=1)
        assert policy.state_dict()["policy"] == name
        assert 0 <= policy.select() < 7
    assert type(make("thompson")) is bandit.GaussianThompson


def test_options_reach_the_policy():
    options = {"gamma": 0.5, "init_rounds": 4, "variance_scale": 2, "seed": 9}
    policy, reference = bandit.make("thompson", 3, **options), bandit.GaussianThompson(3, **options)
    assert policy.state_dict() == reference.state_dict()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tompson", "did you mean 'thompson'"),
        ("rand", "did you mean 'random'"),
        (7, "choose from thompson, .*, fixed"),
    ],
)
def test_an_unknown_name_gives_the_nearest_or_all(name, hint):
    with pytest.raises(ValueError, match=f"unknown policy {name!r}; {hint}"):
        bandit.make(name, 3)


def test_an_old_name_is_taken_with_a_warning_that_users_see():
    with pytest.warns(FutureWarning, match="^policy 'paper' is called 'thompson' now; the next"):
        policy = bandit.make("paper", 3, seed=4)
    assert policy.state_dict() == bandit.make("thompson", 3, seed=4).state_dict()
    assert bandit.current("random") == "random"


def test_a_policy_that_is_gone_is_named_with_what_there_is():
    message = "exp3s is not in optima_fast any more, bench/policies.py .*: take one of thompson, "
    with pytest.raises(ValueError, match=message):
        bandit.make("exp3s", 3)
    assert bandit.gone("thompson") == bandit.gone("other") == ""


def test_an_unknown_option_gives_the_known_ones():
    with pytest.raises(TypeError, match=r"'thompson' are gamma, init_rounds, .*, seed, got 'gama'"):
        bandit.make("thompson", 3, gama=0.5)
    with pytest.raises(TypeError, match="arm"):
        bandit.make("fixed", 3)


ARMS = "from 1 to 16777216, got"
WHOLE = (ValueError, TypeError)
BAD = {
    "arms": [(0, f"{ARMS} 0"), (-3, f"{ARMS} -3"), ([], f"{ARMS} 0"), (2.0, "integer, got 2.0"),
             ("image", "sequence of arms, got 'image'"), (2**24 + 1, f"{ARMS} 16777217")],
    "gamma": [(0.0, r"in \(0, 1\], got 0\.0"), (1.5, "got 1.5"), (math.nan, "finite, got nan"),
              ("1", "a number, got '1'")],
    "variance_scale": [(-0.5, "negative, got -0.5"), (math.inf, "finite, got inf")],
    "width": [(-0.5, "from 0 to 1e.06, got -0.5"), (math.inf, "finite, got inf"), (2e6, "2000000")],
    "prior": [(0.0, "from 1e-06 to 1e.06, got 0.0"), (None, "a number, got None")],
    "trend": [(-1e-3, "from 0 to .*, got -0.001"), (2e6, "got 2000000"), (math.inf, "got inf")],
    "init_rounds": [(-1, "from 0 to .*, got -1"), (1.0, "an integer, got 1.0")],
    "warmup_limit": [(-1, "from 0 to 16777216, got -1")],
    "seed": [(-1, "from 0 to 18446744073709551615, got -1"), (2**64, "got 18446744073709551616"),
             (0.5, "integer, got 0.5")],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bad_options_are_refused_with_their_value(name):
    known = set(make(name).state_dict()) & set(BAD)
    assert {"arms", "seed"} <= known
    for option in known:
        for value, message in BAD[option]:
            with pytest.raises(WHOLE, match=f"^{option} must.* {message}"):
                make(name, **{option: value})


@pytest.mark.parametrize("arms", [3, ["abc", "d"], ("image", "text", "multimodal")])
def test_arms_by_number_or_by_length(arms):
    policy = bandit.GaussianThompson(arms)
    assert policy.arms == len(policy.mean) == (arms if isinstance(arms, int) else len(arms))
    assert repr(policy).startswith(f"GaussianThompson(arms={policy.arms}, gamma=0.98, ")


@pytest.mark.parametrize("name", ["thompson", "random"])
def test_a_seed_repeats_and_another_differs(name):
    first, again, other, high = (play(make(name, seed=s), 200) for s in (4, 4, 5, 4 + 2**32))
    assert first == again
    assert first != other
    assert first != high


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("either")
def test_select_has_no_effect_and_what_is_read_is_a_copy(name):
    asked, quiet = (make(name, 5, seed=2) for _ in range(2))
    for t in range(60):
        arm = asked.select()
        assert [asked.select() for _ in range(3)] == [arm] * 3
        asked.mean[0] = asked.count[0] = asked.spread[0] = 9
        asked.state_dict()["count"][0] = 9
        assert asked.state_dict() == quiet.state_dict()
        asked.update(arm, t % 3)
        quiet.update(arm, t % 3)


@pytest.mark.parametrize("name", ["thompson", "scale-free-ucb", "greedy"])
@pytest.mark.usefixtures("either")
def test_anything_with_a_float_is_a_reward(name):
    for reward in (1, True, np.float32(0.5), np.int64(3), Fraction(1, 4)):
        policy = make(name, 2)
        policy.update(np.int64(1), reward)
        assert policy.mean[1] == float(reward)


BAD_UPDATES = [
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
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("either")
def test_bad_updates_change_nothing(name):
    policy = make(name)
    play(policy, 9)
    before = policy.state_dict()
    for arm, reward, error, message in BAD_UPDATES:
        with pytest.raises(error, match=message):
            policy.update(arm, reward)
    assert policy.state_dict() == before


class Unreadable:
    def __float__(self):
        raise RuntimeError("no value yet")

    def __index__(self):
        raise RuntimeError("no value yet")


@pytest.mark.usefixtures("either")
def test_errors_of_an_argument_itself_come_through():
    policy = bandit.GaussianThompson(7)
    for arm, reward in ((0, Unreadable()), (Unreadable(), 0.5)):
        with pytest.raises(RuntimeError, match="no value yet"):
            policy.update(arm, reward)


def test_docstring_examples():
    for module in (bandit, baselines, scale_free, structured, thompson):
        failed, attempted = doctest.testmod(module)
        assert failed == 0 < attempted
