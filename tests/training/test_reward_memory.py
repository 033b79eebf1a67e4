"""The teacher's side of the reward: run once where there is room, and as before where not."""

from __future__ import annotations

import logging

import pytest
from small_run import DEFAULT_CHOICE, rounds, stop, trainer

from optima_fast.distill.measurement import average
from optima_fast.errors import UserError
from optima_fast.training import checkpoints
from optima_fast.training.config import TrainConfig
from optima_fast.training.trainer import Trainer

CHOICES = [DEFAULT_CHOICE, {"method": "optima"}]
FEW = {"batch_size": 2, "reward_examples": 20, "train_images": 20, "round_steps": 1}


@pytest.fixture(autouse=True)
def known_costs(monkeypatch):
    """Of the arms' steps, which take longer to count than to do here."""
    costs = [0.6, 0.57, 0.97, 0.78, 0.98, 0.98, 1.0]
    monkeypatch.setattr("optima_fast.training.trainer.arm_costs", lambda *_, **__: costs)


def counted(t: Trainer) -> list[int]:
    """Examples of each run of the whole teacher: a step, at --kl-weight 0, never needs its head."""
    calls: list[int] = []
    t.distiller.teacher.register_forward_pre_hook(lambda _, x: calls.append(len(x[0]["text"])))
    return calls


def lines(t: Trainer) -> list[dict]:
    return [{**line, "seconds": 0} for line in rounds(t)]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_teacher_runs_once_on_each_of_the_reward_s_batches(tmp_path, choice, caplog):
    settings = {**FEW, **choice, "steps": 8}
    kept = trainer(tmp_path / "kept", **settings)
    of_kept = counted(kept)
    kept.fit()
    assert of_kept == [8, 8, 4]
    assert not caplog.records
    again = trainer(tmp_path / "again", **settings, reward_memory=0.0)
    of_again = counted(again)
    again.fit()
    # before the first round, and after each
    assert of_again == 9 * [8, 8, 4]
    assert len(lines(kept)) == 8
    assert lines(kept) == lines(again)
    assert again.meter.kept_bytes == 0 < kept.meter.kept_bytes < 2**20


@pytest.mark.parametrize("choice", CHOICES)
def test_what_does_not_fit_is_run_again_and_told_once(tmp_path, choice, caplog):
    settings = {**FEW, **choice, "steps": 7}
    whole = trainer(tmp_path / "whole", **settings)
    whole.fit()
    room = whole.meter.kept_bytes - 1
    part = trainer(tmp_path / "part", **settings, reward_memory=room / 2**30)
    of_part = counted(part)
    with caplog.at_level(logging.WARNING):
        part.fit()
    assert of_part == [8, 8, 4, *7 * [4]]
    assert 0.7 * room < part.meter.kept_bytes <= room
    assert lines(part) == lines(whole)
    (record,) = caplog.records
    assert "what the teacher says of the 20 examples of the reward takes about" in record.message
    assert "--reward-memory" in record.message


def test_a_run_goes_on_exactly_with_more_or_less_memory(tmp_path):
    settings = {**FEW, **DEFAULT_CHOICE, "steps": 7}
    whole = trainer(tmp_path / "whole", **settings)
    whole.fit()
    first = trainer(tmp_path / "parts", **settings)
    stop(first, after=3)
    second = trainer(tmp_path / "parts", **settings, reward_memory=0.0)
    second.resume(checkpoints.latest_checkpoint(second.run.checkpoints))
    stop(second, after=5)
    third = trainer(tmp_path / "parts", **settings)
    third.resume(checkpoints.latest_checkpoint(third.run.checkpoints))
    third.fit()
    assert lines(third) == lines(whole)
    assert third.seconds["reward"] > 0


def test_a_part_is_measured_without_the_others(tmp_path):
    t = trainer(tmp_path, **FEW, **DEFAULT_CHOICE)
    read = []
    load = t.data.train.load
    t.data.train.load = lambda index: read.append(len(index)) or load(index)
    calls = counted(t)
    last = t.meter.part(2, t.device)
    assert (last[1], read, calls) == (4, [4], [4])
    parts = [t.meter.part(0, t.device), t.meter.part(1, t.device), last]
    assert [size for _, size in parts] == [8, 8, 4]
    assert t.meter.measure(t.device) == average(parts)
    assert (read, calls) == ([4, 8, 8], [4, 8, 8])


def test_a_line_of_the_headroom_holds_what_was_measured(tmp_path):
    t = trainer(tmp_path, **FEW, **DEFAULT_CHOICE, steps=1)
    t.fit()
    (line,) = rounds(t)
    assert set(line["losses"]) == {"hidden", "prediction", "teacher"}
    assert set(line["layers"]) == {"hidden", "unexplained"}


def test_memory_below_nothing_is_refused():
    with pytest.raises(UserError, match="--reward-memory must be 0 or more and finite, got -1"):
        TrainConfig(reward_memory=-1.0)
