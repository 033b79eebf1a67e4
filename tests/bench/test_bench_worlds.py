"""The worlds that policies are compared in, and the table of what they earn there."""

from __future__ import annotations

import json
import re

import bench_worlds
import numpy as np
import policies
import pytest
import worlds as w
from bench_worlds import HELD_OUT, LOOKED_AT, MANY_HELD_OUT, MANY_TUNED, TUNED

from optima_fast import bandit
from optima_fast.distill.arms import arm_space

EVERY = TUNED + LOOKED_AT + HELD_OUT + MANY_TUNED + MANY_HELD_OUT
CLOSED = [world for world in EVERY if isinstance(world, w.Closed)]


def arms_of(world):
    return 15 if world.name.startswith("many") else 7


def test_each_world_has_a_name_and_a_group_of_its_own():
    assert len({world.name for world in EVERY}) == len(EVERY)
    grouped = [world for group in bench_worlds.GROUPS.values() for world in group]
    assert sorted(world.name for world in grouped) == sorted(world.name for world in EVERY)


@pytest.mark.parametrize("world", EVERY, ids=lambda world: world.name)
def test_a_seed_is_a_run_whoever_plays(world):
    """The same run alone as in a batch, and after another policy as before it."""
    arms = arms_of(world)
    batch, alone = (world.play(seeds, arms, 60, 0.5) for seeds in ((4, 5), (5,)))
    pulls = np.random.default_rng(0).integers(arms, size=(60, 2))
    traces = []
    for game, columns in ((batch, [0, 1]), (batch, [0, 1]), (alone, [1])):
        game.restart()
        steps = [game.step(pull[columns]) for pull in pulls]
        traces.append(np.array(steps)[:, :, -1])
    np.testing.assert_allclose(traces[1], traces[0], rtol=1e-12)
    np.testing.assert_allclose(traces[2], traces[0], rtol=1e-12)
    alone.restart()
    assert not np.allclose(world.play((6,), arms, 60, 0.5).values(), alone.values())


@pytest.mark.parametrize("world", EVERY, ids=lambda world: world.name)
def test_what_arms_pay_is_positive_and_differs(world):
    game = world.play(range(6), arms_of(world), 80, 0.5)
    for _ in range(80):
        value = game.values()
        assert value.min() > 0
        assert value.max() < 1
        assert (value.max(axis=1) > value.min(axis=1)).all()
        game.step(value.argmax(axis=1))


@pytest.mark.parametrize(
    "world", [world for world in EVERY if isinstance(world, w.Scripted)], ids=lambda w: w.name
)
def test_the_oracle_takes_the_best_of_every_round_and_nobody_more(world):
    arms = arms_of(world)
    game = world.play(range(3), arms, 50, 0.5)
    fixed = [
        bench_worlds.earned([bandit.make("fixed", arms, arm=k) for _ in range(3)], game)
        for k in range(arms)
    ]
    best = w.oracle(game)
    assert (best >= np.max(fixed, axis=0) - 1e-12).all()
    game.restart()
    by_hand = np.zeros(3)
    for _ in range(50):
        value = game.values()
        by_hand += value.max(axis=1)
        _, earned = game.step(value.argmax(axis=1))
        np.testing.assert_array_equal(earned, value.max(axis=1))
    np.testing.assert_allclose(best, by_hand)


@pytest.mark.parametrize("noise", [0.15, 1.5])
def test_noise_is_in_units_of_the_round_s_mean(noise):
    for law in (w.normal, w.heavy, w.outliers, w.skewed, w.uneven):
        game = w.Scripted("noise", w.drift, noise=law).play(range(20), 7, 400, noise)
        seen, value, mean = [], [], []
        for _ in range(400):
            mean.append(game.values().mean(axis=1))
            s, v = game.step(np.full(20, 3))
            seen.append(s)
            value.append(v)
        standard = (np.array(seen) - value) / mean
        assert abs(standard.mean()) < 0.05 * noise
        assert standard.std() == pytest.approx(noise, rel=0.2), law


def test_without_noise_what_is_seen_is_what_is_earned():
    for world in (TUNED[0], *CLOSED):
        game = world.play(range(3), arms_of(world), 30, 0.0)
        for t in range(30):
            seen, earned = game.step(np.full(3, t % 7))
            np.testing.assert_allclose(seen, earned)


def test_a_closed_loop_pays_less_for_what_was_pulled():
    for world in CLOSED:
        arms = arms_of(world)
        game = world.play(range(4), arms, 200, 0.5)
        start = game.values()
        for _ in range(50):
            game.step(np.zeros(4, dtype=int))
        fell = game.values()[:, 0] / start[:, 0]
        assert (fell < 0.95).all()
        game.restart()
        np.testing.assert_array_equal(game.values(), start)


def test_subsets_are_in_the_order_of_the_distillers_arms():
    space = arm_space("modules", {"image": 1, "text": 1, "multimodal": 1})
    assert w.subsets(7).astype(int).tolist() == space.features
    with pytest.raises(ValueError, match=r"2\*\*units - 1, got 6"):
        w.subsets(6)


def test_earned_counts_values_and_tells_rewards():
    class Table:
        runs, arms, rounds = 2, 3, 4

        def restart(self):
            self.round = 0

        def step(self, pulled):
            self.round += 1
            return 10.0 * pulled + self.round, 1.0 + pulled

    players = [bandit.make("fixed", 3, arm=k) for k in (0, 2)]
    assert bench_worlds.earned(players, Table()).tolist() == [4.0, 12.0]
    assert [player.mean for player in players] == [[2.5, 0.0, 0.0], [0.0, 0.0, 22.5]]


def test_below_counts_the_paired_runs():
    fractions = {"thompson": np.array([0.5, 0.6, 0.7, 0.8]), "x": np.array([0.6, 0.5, 0.7, 0.9])}
    assert bench_worlds.below(fractions, "x") == 25.0
    assert bench_worlds.below(fractions, "thompson") == 0.0


def test_the_smoke_form_shows_every_policy_and_that_the_default_beats_the_paper_s(tmp_path, capsys):
    path = tmp_path / "worlds.jsonl"
    arguments = ["--smoke", "--jobs", "1", "--runs", "4", "--json", str(path)]
    assert bench_worlds.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in {*bandit.names(), *policies.CONTENDERS}:
        assert (f"| {name} |" in printed) == (name not in ("fixed", "greedy"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    suite = {}
    for line in lines:
        assert 0 < line["lowest"] <= line["mean"] < 1.05
        if line["part"] == "suite":
            suite.setdefault(line["policy"], []).append(line["mean"])
    earned = {name: float(np.mean(values)) for name, values in suite.items()}
    assert earned["structured-ucb"] > 0.9 > 0.8 > earned["thompson"] > earned["random"] - 0.02
    ((default, paper, percent),) = re.findall(r"\| 250 \| (\S+) / (\S+) \((\S+)\) \|", printed)
    assert float(default) > float(paper) + 0.1
    assert float(percent) < 5


def test_parts_and_policies_can_be_chosen(capsys):
    arguments = ["--smoke", "--jobs", "1", "--runs", "2", "--part", "many", "--policies", "random"]
    assert bench_worlds.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "63 arms" in printed
    assert "| random |" in printed
    assert "| thompson |" in printed
    assert "7 arms" not in printed
    assert "structured" not in printed
