"""The default choice of --method optima: every arm's headroom is known, the best is pulled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import DEFAULT_CHOICE, small

from optima_fast import bandit
from optima_fast.distill import Headroom, arm_name
from optima_fast.training import experiment
from optima_fast.training.display import Display
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer


def trainer(tmp_path: Path, **settings: object) -> Trainer:
    config = small(tmp_path, **{**DEFAULT_CHOICE, **settings})
    experiment.prepare(config)
    data = experiment.load_data(config)
    torch.manual_seed(7)
    teacher = experiment.new_model(config.teacher, data)
    torch.manual_seed(config.seed)
    student = experiment.new_model(config.student, data)
    run = Run(config.out)
    run.begin(config)
    return Trainer(config, data, student, teacher, run, Display(quiet=True))


def rounds(t: Trainer) -> list[dict]:
    lines = [json.loads(line) for line in t.run.metrics_path.read_text().splitlines()]
    return [line for line in lines if "reward" in line]


@pytest.mark.parametrize("arms", ["modules", "layer-groups:2"])
def test_each_round_pulls_the_arm_with_most_left(tmp_path, arms):
    t = trainer(tmp_path, arms=arms, steps=24)
    measured = []
    measure = t._measure
    t._measure = lambda: measured.append(measure()) or measured[-1]
    t.fit()
    lines = rounds(t)
    assert len(lines) == 12 == len(measured) - 1

    counts = {name: len(pairs) for name, pairs in t.distiller.pairs.items()}
    headroom = Headroom(t.space.arms, t.meter.costs, counts, output="multimodal")
    for measurement, line in zip(measured, [*lines, None], strict=True):
        headroom.measured(measurement)
        rewards = headroom.rewards()
        if line is not None:
            assert line["choice"] == rewards.index(max(rewards))
            assert line["arm"] == arm_name(t.space.arms[line["choice"]])
            expected = rewards
        if measurement is not measured[0]:
            before = lines[measured.index(measurement) - 1]
            assert before["rewards"] == before["means"] == rewards
            assert before["headroom"] == headroom.layers()
            assert before["reward"] == rewards[before["choice"]]
    assert expected
    assert set(t.meter.costs) != {1.0}


@pytest.mark.parametrize("at", [7, 8])
def test_a_stopped_run_goes_on_exactly(tmp_path, at):
    """In a round, and between two: the best so far is part of a checkpoint."""
    whole = trainer(tmp_path / "a", steps=20, checkpoint_every=100)
    whole.fit()
    first = trainer(tmp_path / "b", steps=20, checkpoint_every=100)
    step = first._train_step

    def stop(*args):
        first._stop.asked = first.step == at - 1
        return step(*args)

    first._train_step = stop
    with pytest.raises(Exception, match=f"stopped after step {at}"):
        first.fit()
    second = trainer(tmp_path / "b", steps=20, checkpoint_every=100)
    assert second.meter.headroom.state_dict() != first.meter.headroom.state_dict()
    second.resume(first.run.checkpoints / f"step-{at:08d}.pt")
    assert second.meter.headroom.state_dict() == first.meter.headroom.state_dict()
    second.fit()
    timing = {"samples_per_second": 0, "seconds": 0}
    a, b = ([{**x, **timing} for x in rounds(t)] for t in (whole, second))
    assert a == b


def test_other_bandits_hear_of_the_arm_they_pulled_alone(tmp_path):
    t = trainer(tmp_path, policy="scale-free-ucb", reward="headroom", steps=20)
    t.fit()
    lines = rounds(t)
    assert len({line["arm"] for line in lines[:7]}) == 7
    by_hand = bandit.make("scale-free-ucb", 7, seed=t.config.seed)
    for line in lines:
        assert by_hand.select() == line["choice"]
        by_hand.update(line["choice"], line["reward"])
        assert line["reward"] == line["rewards"][line["choice"]]
        assert by_hand.mean == line["means"]


def test_greedy_with_a_reward_of_one_arm_is_told_no_more(tmp_path):
    t = trainer(tmp_path, reward="paper", steps=20)
    t.fit()
    assert [line["choice"] for line in rounds(t)[:7]] == list(range(7))
