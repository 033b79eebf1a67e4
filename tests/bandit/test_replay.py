"""Replays of policies: known answers on made-up runs, honesty of the estimates, bad input."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest

from optima_fast import bandit
from optima_fast.bandit import replay
from optima_fast.bandit.__main__ import NOTES, main
from optima_fast.bandit.replay import NEAR, Log
from optima_fast.errors import UserError

MEANS = [0.02, 0.06, 0.11]  # of three arms, the subsets of two modules


def recorded(choices: list[int], rewards: list[float], arms: int) -> Log:
    return Log("run", [f"a{i}" for i in range(arms)], choices, rewards)


def uniform(generator: random.Random, rounds: int) -> Log:
    """Arms drawn uniformly, rewards that depend on the arm alone."""
    choices = [generator.randrange(len(MEANS)) for _ in range(rounds)]
    return recorded(choices, [generator.gauss(MEANS[a], 0.05) for a in choices], len(MEANS))


class Always:
    """Pulls one arm and remembers what it was told."""

    warm_up = 0

    def __init__(self, arm: int) -> None:
        self.arm = arm
        self.told: list[tuple[int, float]] = []

    def select(self) -> int:
        return self.arm

    def update(self, arm: int, reward: float) -> None:
        self.told.append((arm, reward))


def write(folder: Path, log: Log) -> Path:
    """A run folder with the lines that a trainer writes, those of steps between them."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [0] * len(log.arms)
    lines = []
    for round, (arm, reward) in enumerate(zip(log.choices, log.rewards, strict=True), 1):
        counts[arm] += 1
        lines.append({"step": round, "round": round, "arm": log.arms[arm], "loss": 1.0})
        lines.append(
            {"round": round, "arm": log.arms[arm], "reward": reward, "counts": list(counts)}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_rejection_shows_a_policy_its_own_rounds_and_no_other():
    log = uniform(random.Random(0), 200)
    policy = Always(1)
    outcome = replay.rejection(policy, log)
    own = [r for a, r in zip(log.choices, log.rewards, strict=True) if a == 1]
    assert policy.told == [(1, r) for r in own]
    assert outcome == (len(own), 0, pytest.approx(statistics.fmean(own)), 0.0)
    assert replay.rejection(Always(2), log).best == 1.0


def test_rejection_is_unbiased_on_a_uniform_recording_of_a_stationary_world():
    """What a learning policy earns in the replay is what it earns in the world, to 4 errors."""
    generator = random.Random(1)
    differences = []
    for seed in range(400):
        log = uniform(generator, 160)
        replayed = replay.rejection(policy(seed), log)
        there = policy(seed + 10_000)
        earned = []
        for _ in range(replayed.rounds):
            arm = there.select()
            earned.append(generator.gauss(MEANS[arm], 0.05))
            there.update(arm, earned[-1])
        differences.append(replayed.mean - statistics.fmean(earned))
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    assert error < 0.002  # the arms' means span 0.09
    assert abs(statistics.fmean(differences)) < 4 * error


def policy(seed: int) -> bandit.Policy:
    return bandit.make("thompson", len(MEANS), init_rounds=1, variance_scale=0.01, seed=seed)


def test_a_world_pays_every_round_from_the_nearest_rewards_of_the_arm():
    generator = random.Random(2)
    rounds = 120
    choices = [generator.choice([0, 0, 0, 1, 2]) for _ in range(rounds)]
    log = recorded(choices, [float(t) for t in range(rounds)], 3)
    for arm in range(3):
        pulled = [t for t, a in enumerate(choices) if a == arm]
        policy = Always(arm)
        outcome = replay.world(policy, log, seed=5)
        assert outcome.rounds == rounds
        for t, (_, reward) in enumerate(policy.told):
            distances = sorted(abs(t - u) for u in pulled)
            assert reward in pulled  # a reward is the number of its round here
            assert abs(reward - t) <= distances[NEAR - 1]
        used = {reward for _, reward in policy.told}
        assert len(used) > 0.6 * len(pulled)


def test_a_world_follows_drift_and_its_luck_depends_on_the_seed_alone():
    generator = random.Random(3)
    choices = [generator.randrange(2) for _ in range(400)]
    # arm 0 pays at first, arm 1 at the end
    rewards = [(1 - t / 400) if a == 0 else t / 400 for t, a in enumerate(choices)]
    log = recorded(choices, rewards, 2)
    told = []
    for seed in (0, 0, 1):
        always = Always(0)
        assert replay.world(always, log, seed).mean == pytest.approx(0.5, abs=0.02)
        told.append(always.told)
    assert told[0] == told[1] != told[2]
    assert told[0][0][1] > 0.9
    assert told[0][-1][1] < 0.1


def test_fewer_rewards_than_a_window_are_all_drawn_from():
    log = recorded([0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0], 2)
    seen = {replay.world(Always(1), log, seed).mean for seed in range(40)}
    assert seen == {2.0, 2.5, 3.0, 3.5, 4.0}


def test_known_policies_get_their_known_rewards():
    """Constant rewards: random earns the plain mean, the best arm is found by the others."""
    generator = random.Random(4)
    choices = [generator.randrange(3) for _ in range(600)]
    log = recorded(choices, [[0.1, 0.4, 0.9][a] for a in choices], 3)
    rows = replay.compare([log], ["thompson", "random"], seed=0, repeats=10, init_rounds=1)
    for method, table in rows.items():
        assert [row["policy"] for row in table] == ["thompson", "random"]
        thompson, chance = table
        assert chance["mean"] == pytest.approx(1.4 / 3, abs=0.02), method
        assert chance["best"] == pytest.approx(1 / 3, abs=0.03)
        assert chance["vs_random"] == 0.0
        assert thompson["vs_random"] == thompson["mean"] - chance["mean"] > 0.2
        assert thompson["best"] > 0.7
    assert rows["world"][0]["rounds"] == 600
    assert [row["warm_up"] for row in rows["world"]] == [3, 0]
    assert rows["rejection"][0]["rounds"] == pytest.approx(200, abs=20)


def test_runs_and_seeds_are_averaged():
    logs = [recorded([0, 1] * 20, [x, x] * 20, 2) for x in (1.0, 3.0)]
    rows = replay.compare(logs, ["random"], seed=3, repeats=4)
    for table in rows.values():
        (row,) = table
        assert (row["mean"], row["deviation"], row["vs_random"]) == (2.0, 0.0, 0.0)
    one = replay.compare([uniform(random.Random(5), 90)], ["random"], seed=3, repeats=4)
    assert one["world"][0]["deviation"] > 0.0


def test_a_policy_that_met_none_of_its_arms_has_no_mean(tmp_path, capsys):
    log = recorded([0], [0.5], 50)
    assert replay.rejection(Always(7), log)[0] == 0
    assert math.isnan(replay.rejection(Always(7), log).mean)
    write(tmp_path, recorded([0, 1, 2], [0.5, 0.25, 0.0], 3))
    table = json_of(capsys, tmp_path, "--least", "1", "--repeats", "1", "--seed", "1")
    assert all(row["mean"] is None or row["rounds"] for row in table["rejection"])


def json_of(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    assert main(["replay", *map(str, argv), "--json"]) == 0
    document: dict = json.loads(capsys.readouterr().out)
    return document


def test_a_run_is_read_by_what_its_counts_say(tmp_path):
    log = uniform(random.Random(6), 60)
    read = replay.read(write(tmp_path / "run", log))
    assert (read.choices, read.rewards, read.arms) == (log.choices, log.rewards, log.arms)
    assert read.pulls() == [log.choices.count(i) for i in range(3)]
    assert sum(n * m for n, m in zip(read.pulls(), read.means(), strict=True)) == pytest.approx(
        sum(log.rewards)
    )


def test_a_byte_order_mark_before_a_record_is_skipped(tmp_path):
    log = uniform(random.Random(6), 60)
    path = write(tmp_path / "run", log) / "metrics.jsonl"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert replay.read(path.parent).rewards == log.rewards


def test_the_command_prints_tables_with_what_they_are_worth(tmp_path, capsys):
    runs = [str(write(tmp_path / n, uniform(random.Random(7), 80))) for n in "ab"]
    assert main(["replay", *runs, "--policies", "random,thompson", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    assert all(note in out for note in NOTES.values())
    assert "unbiased only for arms recorded uniformly at random" in out
    assert "biased, as earlier pulls change nothing" in out
    assert out.count("rounds recorded") == 2
    assert out.index("a2 ") < out.index("a0 ")  # the best arm first
    rows = [line.split() for line in out.splitlines() if line.startswith(("random ", "thompson "))]
    assert len(rows) == 4
    assert {len(row) for row in rows} == {7}


def test_the_json_holds_what_the_tables_do_and_repeats(tmp_path, capsys):
    run = write(tmp_path, uniform(random.Random(8), 80))
    one, two = (json_of(capsys, run, "--seed", "4", "--repeats", "3") for _ in range(2))
    assert one == two
    assert set(one) == {"notes", "runs", "rejection", "world"}
    assert sum(arm["rounds"] for arm in one["runs"][0]["arms"]) == one["runs"][0]["rounds"] == 80
    known = set(bandit.names()) - {"fixed"}
    for method in ("rejection", "world"):
        assert {row["policy"] for row in one[method]} == known
        means = [row["mean"] for row in one[method]]
        assert means == sorted(means, reverse=True)
    other = json_of(capsys, run, "--seed", "5", "--repeats", "3")
    assert other["world"] != one["world"]


def test_init_rounds_go_to_the_policies_that_have_them(tmp_path, capsys):
    run = write(tmp_path, recorded([0, 1] * 40, [0.0, 1.0] * 40, 2))
    argv = ("--policies", "thompson,random", "--repeats", "5")
    shares = []
    for rounds in ("1", "40"):
        table = json_of(capsys, run, *argv, "--init-rounds", rounds)["world"]
        shares.append({row["policy"]: row["best"] for row in table})
    assert shares[0]["thompson"] > 0.6
    assert shares[1]["thompson"] == 0.5
    assert shares[0]["random"] == shares[1]["random"]


def test_a_policy_s_old_name_is_told_and_taken(tmp_path, capsys):
    run = write(tmp_path, uniform(random.Random(9), 80))
    argv = ["replay", str(run), "--repeats", "1", "--json", "--policies"]
    assert main([*argv, "paper,thompson"]) == 0
    old = capsys.readouterr()
    assert old.err == (
        "warning: policy paper is an old spelling: write thompson; the next release refuses it\n"
    )
    assert main([*argv, "thompson"]) == 0
    assert capsys.readouterr() == (old.out, "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policies", "tompson"], "unknown policy 'tompson'; did you mean 'thompson'"),
        (["--policies", "thompson,zzz"], "unknown policy 'zzz'; choose from thompson, "),
        (["--policies", ","], "--policies ',' names none; take all, or from"),
        (["--policies", "fixed"], "policy fixed has one arm"),
        (
            ["--policies", "thompson,exp3s"],
            "policy exp3s is not in optima_fast any more, bench/policies.py .*: take one of tho",
        ),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--repeats", "0"], "--repeats must be 1 or more, got 0"),
        (["--least", "0"], "--least must be 1 or more, got 0"),
        (["--init-rounds", "-2"], "--init-rounds must be 0 or more, got -2"),
        (
            ["--policies", "thompson", "--init-rounds", "99999999"],
            "policy thompson: init_rounds must be from 0 to",
        ),
        (["--seed", str(2**64)], "policy .*: seed must be from 0 to"),
        (["--least", "70"], r"a\d was pulled \d+ times in 80 rounds, and .* needs 70 of each arm"),
        (["nowhere"], "cannot read nowhere/metrics.jsonl: No such file"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, argv, message):
    run = write(tmp_path, uniform(random.Random(9), 80))
    assert main(["replay", str(run), *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rewards: record them with --method optima"),
        ('{"step": 1, "loss": 2.0}\n', "holds no rewards"),
        ("{", "line 1: not the record of a round"),
        ("[1]\n", "line 1: not the record of a round"),
        ('{"reward": 1.0, "arm": "a"}\n', "line 1: not the record of a round .'counts'."),
        ('{"reward": "x", "arm": "a", "counts": [1]}\n', "line 1: not the record"),
        ('{"reward": null, "arm": "a", "counts": [1]}\n', "line 1: not the record"),
        ('{"reward": NaN, "arm": "a", "counts": [1]}\n', "line 1: not the record"),
        ('{"reward": 1.0, "arm": "a", "counts": [2, 0]}\n', "do not follow"),
        ('{"reward": 1.0, "arm": "a", "counts": [1, 1]}\n', "line 1: not the record"),
        ('{"reward": 1.0, "arm": "a", "counts": [0, 0]}\n', "line 1: not the record"),
        (
            '{"reward": 1, "arm": "a", "counts": [1, 0]}\n{"reward": 1, "arm": "a", "counts": [2]}',
            "line 2: not the record",
        ),
    ],
)
def test_files_without_a_record_are_refused(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        replay.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl"):
        replay.read(tmp_path)
