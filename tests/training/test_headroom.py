"""The default method: every arm's headroom is known, the arm with most of it is pulled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import DEFAULT_CHOICE, small

from optima_fast import bandit
from optima_fast.distill import Headroom, arm_name
from optima_fast.errors import UserError
from optima_fast.training import experiment
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer

FEW = {"batch_size": 2, "reward_examples": 4, "train_images": 20, "eval_every": 99}
FEW |= {"checkpoint_every": 99}


@pytest.fixture
def known_costs(monkeypatch):
    """Of the arms' steps, which take longer to count than to do here."""
    costs = [0.6, 0.57, 0.97, 0.78, 0.98, 0.98, 1.0]
    monkeypatch.setattr("optima_fast.training.trainer.arm_costs", lambda *_, **__: costs)


def trainer(tmp_path: Path, **settings: object) -> Trainer:
    config = small(tmp_path, **{**DEFAULT_CHOICE, **FEW, **settings})
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
    return [{**line, "seconds": 0} for line in lines if "reward" in line]


def test_each_round_pulls_the_arm_with_most_left(tmp_path):
    t = trainer(tmp_path, steps=16)
    assert (t.config.policy, t.config.reward, t.config.reward_cost) == (
        *("greedy", "headroom", "flops"),
    )
    assert set(t.meter.costs) != {1.0}
    measured = []
    measure = t._measure
    t._measure = lambda: measured.append(measure()) or measured[-1]
    t.fit()
    lines = rounds(t)
    assert len(lines) == 8 == len(measured) - 1

    counts = {name: len(pairs) for name, pairs in t.distiller.pairs.items()}
    headroom = Headroom(t.space.arms, t.meter.costs, counts, output="multimodal")
    headroom.measured(measured[0])
    for line, after in zip(lines, measured[1:], strict=True):
        rewards = headroom.rewards()
        assert line["choice"] == rewards.index(max(rewards))
        assert line["arm"] == arm_name(t.space.arms[line["choice"]])
        headroom.measured(after)
        assert line["rewards"] == line["means"] == headroom.rewards()
        assert line["headroom"] == headroom.layers()
        assert line["reward"] == line["rewards"][line["choice"]]


@pytest.mark.usefixtures("known_costs")
def test_a_stopped_run_goes_on_exactly(tmp_path):
    """In a round, and between two: the best so far is part of a checkpoint."""
    whole = trainer(tmp_path / "whole", steps=12)
    whole.fit()
    for at in (7, 8):
        first = trainer(tmp_path / str(at), steps=12)
        step = first._train_step

        def stop(*args, first=first, step=step, at=at):
            first._stop.asked = first.step == at - 1
            return step(*args)

        first._train_step = stop
        with pytest.raises(Interrupted, match=f"stopped after step {at}"):
            first.fit()
        second = trainer(tmp_path / str(at), steps=12)
        assert second.meter.known.state_dict() != first.meter.known.state_dict()
        second.resume(first.run.checkpoints / f"step-{at:08d}.pt")
        assert second.meter.known.state_dict() == first.meter.known.state_dict()
        second.fit()
        assert rounds(second) == rounds(whole)


@pytest.mark.usefixtures("known_costs")
def test_other_bandits_hear_of_the_arm_they_pulled_alone(tmp_path):
    choice = {"method": "optima", "policy": "scale-free-ucb", "reward": "headroom"}
    t = trainer(tmp_path, **choice, steps=20)
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
    t = trainer(tmp_path, method="optima", policy="greedy", steps=14)
    assert t.config.reward == "drop"
    t.fit()
    assert [line["choice"] for line in rounds(t)] == list(range(7))


def test_it_has_no_other_policy_or_reward_and_no_option(tmp_path):
    for name, value in (("policy", "thompson"), ("reward", "kl")):
        message = f"--{name} {value} is for --method optima, not for --method headroom"
        with pytest.raises(UserError, match=message):
            TrainConfig(method="headroom", **{name: value})
    assert resolve(TrainConfig(policy="greedy", reward="headroom")) == resolve(TrainConfig())
    message = "--init-rounds is no option of --method headroom, which has none: leave it out"
    with pytest.raises(UserError, match=message):
        experiment.run(small(tmp_path, method="headroom", init_rounds=2), Display(quiet=True))
    assert not list(tmp_path.iterdir())
