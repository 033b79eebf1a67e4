"""Saving and continuing a policy, and choosing its backend."""

import json
import math
import subprocess
import sys
import textwrap

import pytest

from optima_fast import bandit


def play(policy, rounds):
    arms = []
    for _ in range(rounds):
        arms.append(policy.select())
        policy.update(arms[-1], 1 / (3 + arms[-1]))
    return arms


def make(name="thompson", arms=7, **options):
    return bandit.make(name, arms, **({"arm": 3} if name == "fixed" else {}), **options)


@pytest.mark.parametrize("name", bandit.names())
@pytest.mark.usefixtures("either")
def test_a_state_continues_bit_for_bit_through_json(name):
    """Before, in, at the end of and after the initialisation of at most 70 rounds."""
    whole = make(name, seed=2**64 - 1)
    for rounds in (0, 1, 33, 70, 71, 200):
        play(whole, rounds - whole.round)
        saved = json.dumps(whole.state_dict())
        loaded, ahead = make(name, seed=2**64 - 1), make(name, seed=2**64 - 1)
        play(loaded, 5)
        for policy in (loaded, ahead):
            policy.load_state_dict(json.loads(saved))
            assert json.dumps(policy.state_dict()) == saved
            assert policy.round == rounds
        assert play(loaded, 60) == play(ahead, 60)
        assert loaded.state_dict() == ahead.state_dict()


def test_a_state_is_plain_and_complete():
    policy = make(arms=2, seed=1, init_rounds=1)
    play(policy, 1)
    arm = policy.count.index(1)
    reward = 1 / (3 + arm)
    means = [reward, 0.0] if arm == 0 else [0.0, reward]
    assert policy.state_dict() == {
        "policy": "thompson",
        "version": 1,
        "arms": 2,
        "gamma": 0.98,
        "init_rounds": 1,
        "variance_scale": 1.0,
        "seed": 1,
        "round": 1,
        "count": policy.count,
        "total": means,
        "mean": means,
    }


def test_a_state_under_the_old_name_is_read():
    policy, loaded = make("thompson"), make("thompson")
    play(policy, 80)
    old = {**policy.state_dict(), "policy": "paper"}
    loaded.load_state_dict(old)
    assert loaded.state_dict() == policy.state_dict()
    with pytest.raises(ValueError, match="state must have policy 'random', got 'paper'"):
        make("random").load_state_dict(old)


def test_a_state_moves_between_cores(twins):
    for name in bandit.names():
        policies = twins(name, 7, **({"arm": 3} if name == "fixed" else {}))
        for rounds in (40, 60):
            play(policies[0], rounds)
            policies[1].load_state_dict(policies[0].state_dict())
            assert play(policies[0], 40) == play(policies[1], 40)
            policies.reverse()


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def having(**changes):
    return lambda state: {**state, **changes}


def averaged(**changes):
    """A state inside the initialisation, right but for the changes."""
    right = {"round": 3, "count": [1, 2], "total": [0.5, 1.0], "mean": [0.5, 0.5]}
    return having(**{**right, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: None, r"^state must be a mapping, got None$"),
        (lambda state: [1], r"^state must be a mapping, got \[1\]$"),
        (without("policy"), r"^state must have policy 'thompson', got none$"),
        (without("seed"), r"^state must have seed 0, got none$"),
        (without("mean"), r"^state must have the keys .*total, mean, got .*total$"),
        (having(extra=1), r"^state must have the keys .*, mean, got .*, extra$"),
        (having(policy="random"), r"^state must have policy 'thompson', got 'random': make the"),
        (having(version=2), r"^state must have version 1, got 2"),
        (having(arms=3), r"^state must have arms 2, got 3"),
        (having(gamma=0.9), r"^state must have gamma 0\.98, got 0\.9"),
        (having(gamma=math.nan), r"^state must have gamma 0\.98, got nan"),
        (having(init_rounds=10), r"^state must have init_rounds 2, got 10"),
        (having(variance_scale=2.0), r"^state must have variance_scale 1\.0, got 2\.0"),
        (having(seed=1), r"^state must have seed 0, got 1"),
        (having(seed=None), r"^state must have seed 0, got None"),
        (having(round=-1), r"^state must have a count in round, got -1$"),
        (having(round=1.0), r"^state must have a count in round, got 1\.0$"),
        (having(round=True), r"^state must have a count in round, got True$"),
        (having(round=2**63), r"^state must have a count in round, got 9223372036854775808$"),
        (having(round=6), r"^state must have counts that add up to round 6, got \[2, 3\]$"),
        (having(count=[5]), r"^state must have a list of 2 in count, got \[5\]$"),
        (having(count=[5, 0, 0]), r"^state must have a list of 2 in count, got \[5, 0, 0\]$"),
        (having(count="23"), r"^state must have a list of 2 in count, got '23'$"),
        (having(count=[6, -1]), r"^state must have a count in count\[1\], got -1$"),
        (having(count=[2, "3"]), r"^state must have a count in count\[1\], got '3'$"),
        (having(mean=[0.1, math.nan]), r"^state must have a finite number in mean\[1\], got nan$"),
        (having(mean=[-math.inf, 0]), r"^state must have a finite number in mean\[0\], got -inf$"),
        (having(mean=[10**400, 0]), r"^state must have a finite number in mean\[0\], got 1000"),
        (having(mean=[None, 0]), r"^state must have a finite number in mean\[0\], got None$"),
        (having(total=[0.0, math.nan]), r"^state must have a finite number in total\[1\], got nan"),
        (having(total=None), r"^state must have a list of 2 in total, got None$"),
        (averaged(mean=[0.5, 0.6]), r"mean\[1\] = total\[1\] / count\[1\], got 0\.6, 1\.0 and 2$"),
        (averaged(count=[3, 0]), r"mean\[0\] = total\[0\] / count\[0\], got 0\.5, 0\.5 and 3$"),
        (averaged(count=[0, 3], mean=[0.5, 1 / 3]), r"mean\[0\] = .*, got 0\.5, 0\.5 and 0$"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(change, message):
    source = make(arms=2, init_rounds=2)
    for arm in (0, 1, 0, 1, 1):
        source.update(arm, 0.25)
    policy = make(arms=2, init_rounds=2)
    policy.update(1, 0.5)
    before = policy.state_dict()
    with pytest.raises(ValueError, match=message):
        policy.load_state_dict(change(source.state_dict()))
    assert policy.state_dict() == before
    policy.load_state_dict(source.state_dict())
    assert policy.state_dict() == source.state_dict()


@pytest.mark.parametrize("name", bandit.names())
def test_no_policy_takes_a_state_of_another_kind(name):
    policy, other = make(name, seed=1), make("thompson" if name != "thompson" else "random", seed=1)
    play(policy, 20)
    state = policy.state_dict()
    for wrong, message in (
        (other.state_dict(), f"policy {name!r}, got '(thompson|random)'"),
        ({**state, "version": 0}, "version 1, got 0"),
        (make(name, arms=6, seed=1).state_dict(), "arms 7, got 6"),
        ({**state, "round": 21}, "counts that add up to round 21"),
        (without("count")(state), "the keys .*count"),
        (make(name, seed=2).state_dict(), "seed 1, got 2"),
    ):
        with pytest.raises(ValueError, match=f"^state must have {message}"):
            policy.load_state_dict(wrong)
    assert policy.state_dict() == state


def put(key, *index, value):
    """A state with another number somewhere."""

    def change(state):
        state = json.loads(json.dumps(state))
        rows = state[key]
        for i in index[:-1]:
            rows = rows[i]
        rows[index[-1]] = value
        return state

    return change


BAD = {
    "scale-free-ucb": [
        (put("weight", 0, value=-0.1), r"weight\[0\] from 0 to \d+ .*, got -0\.1"),
        (put("weight", 0, value=9.0), r"weight\[0\] from 0 to \d and .* got 9\.0"),
        (put("weight", 0, value=0.5), r"weights that add up to \d\.\d+ at round 9, got"),
        (put("square", 1, value=-1e-9), r"square\[1\] not negative, .* got .*-1e-09"),
        (put("average", 0, value=math.nan), r"a finite number in average\[0\], got nan"),
        (put("level", 1, value=math.inf), r"a finite number in level\[1\], got inf"),
        (having(scale=2099), "scale from 0 to 2098, got 2099"),
        (having(scale=-1), "a count in scale, got -1"),
    ],
    "structured-ucb": [
        (put("own", 2, value=-0.1), r"own\[2\] from 0 to three times prior 0\.1, got -0\.1"),
        (put("shared", 2, value=0.4), r"shared\[2\] from 0 to three times prior 0\.1, got 0\.4"),
        (put("covariance", 1, 2, value=0.05), r"symmetric covariance .* got \S+ in covariance"),
        (
            put("covariance", 3, 3, value=-0.1),
            r"symmetric covariance .* got .*, -0\.1, .* on the diagonal",
        ),
        (put("covariance", 3, 3, value=0.0), r"symmetric covariance .* got \S+ in covariance"),
        (having(covariance=[[0.0]]), r"a list of 7 in covariance, got \[\[0\.0\]\]"),
        (put("covariance", 2, value=[1.0]), r"a list of 7 in covariance\[2\], got \[1\.0\]"),
        (put("noise", 0, value=-1.0), r"noise not negative, .* at round 9, got \[-1\.0"),
        (put("noise", 1, value=9.0), r"of weight 7\.\d+ at round 9, got \[.*, 9\.0\]"),
        (put("offset", 0, value="1"), r"a finite number in offset\[0\], got '1'"),
        (having(scale=2099), "scale from 0 to 2098, got 2099"),
    ],
    "random": [(put("mean", 0, value=9.0), r"mean\[0\] = total\[0\] / count\[0\], got 9\.0, ")],
    "greedy": [
        (put("told", 0, value=0), r"told\[0\] 1, or 0 where nothing is known, got 0 with count 2"),
        (put("told", 0, value=2), r"told\[0\] 1, .* got 2"),
        (
            lambda s: {**s, "told": [0, *s["told"][1:]], "count": [0, 9, 0, 0, 0, 0, 0]},
            r"told\[0\] .* got 0 with count 0 and mean 0\.3",
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "message"), [(name, *bad) for name, every in BAD.items() for bad in every]
)
def test_a_state_that_no_updates_lead_to_is_refused(name, change, message):
    policy, fresh = make(name), make(name)
    for t in range(9):
        policy.update(t % 7, 0.1 * (t % 4) if t < 7 else 0.3)
    with pytest.raises(ValueError, match=f"^state must have .*{message}"):
        fresh.load_state_dict(change(policy.state_dict()))
    assert fresh.state_dict() == make(name).state_dict()
    fresh.load_state_dict(policy.state_dict())
    assert fresh.state_dict() == policy.state_dict()


def test_whole_numbers_may_have_lost_their_point():
    """Some JSON writers turn 1.0 into 1."""
    policy = make(arms=2, init_rounds=0)
    policy.load_state_dict(policy.state_dict() | {"mean": [0, 0], "variance_scale": 1})
    assert all(type(m) is float for m in policy.mean)


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


PLAYED = """
policy = bandit.GaussianThompson(7, init_rounds=1, seed=6)
for _ in range(60):
    arm = policy.select()
    policy.update(arm, arm / 10)
print(json.dumps([bandit.BACKEND, policy.state_dict()]))
"""


def test_without_the_extension_python_gives_the_same_and_needs_nothing_else():
    backend, state = run(
        "import json, sys\n"
        "for name in ('optima_fast._bandit', 'numpy', 'torch', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "from optima_fast import bandit\n" + PLAYED
    )
    assert backend == "python"
    here, expected = run("import json\nfrom optima_fast import bandit\n" + PLAYED)
    assert here == bandit.BACKEND
    assert state == expected


def test_a_stale_extension_is_refused():
    message = run(
        """
        import json, sys, types
        stale = types.ModuleType("optima_fast._bandit")
        stale.ABI, stale.__file__ = 0, "/somewhere/_bandit.so"
        sys.modules["optima_fast._bandit"] = stale
        import optima_fast
        optima_fast._bandit = stale
        try:
            from optima_fast import bandit
        except ImportError as error:
            print(json.dumps(str(error)))
        """
    )
    assert message == (
        "optima_fast._bandit must have ABI 4, got 0: reinstall optima-fast, "
        "or delete /somewhere/_bandit.so"
    )
