"""What TensorBoard and Weights & Biases get of a run."""

from __future__ import annotations

import pytest
from small_run import QUIET, small, stop, trainer

from optima_fast.errors import UserError
from optima_fast.training import experiment, tracking
from optima_fast.training.tracking import Tracker

SETTINGS = {"method": "layerwise", "steps": 6, "log_every": 1, "eval_every": 3}


def sent(lines):
    """Every number of the lines, by name and step."""
    return {
        (name, line["step"]): value
        for line in lines
        for name, value in tracking._numbers(line)
        if name != "step"
    }


def test_tensorboard_gets_every_number_once_also_of_a_run_that_went_on(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    t = trainer(tmp_path, track="tensorboard", **SETTINGS)
    stop(t, after=5)
    rest = trainer(tmp_path, track="tensorboard", **SETTINGS)
    rest.resume(t.run.checkpoints / "step-00000004.pt")
    rest.fit()
    read = event_accumulator.EventAccumulator(str(rest.run.folder / "tensorboard"))
    read.Reload()
    found = [((tag, e.step), e.value) for tag in read.Tags()["scalars"] for e in read.Scalars(tag)]
    expected = sent(rest.run.metrics())
    assert len(found) == len(expected) > 30
    assert ("hidden/image", 6) in expected
    assert ("validation/accuracy", 3) in expected
    for key, value in found:
        assert value == pytest.approx(expected[key], rel=1e-6), key


def test_wandb_gets_every_line_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    summary = {}
    close = Tracker.close

    def closing(self):
        self._sink.log({"end": 1}, step=7)  # the rows before it are complete now
        summary.update(self._sink.summary)
        close(self)

    monkeypatch.setattr(Tracker, "close", closing)
    t = trainer(tmp_path, track="wandb", **SETTINGS)
    t.fit()
    expected = sent(t.run.metrics())
    assert summary["loss"] == expected["loss", 6]
    assert summary["hidden/text"] == expected["hidden/text", 6]
    assert summary["validation/accuracy"] == expected["validation/accuracy", 3]
    assert len(list((t.run.folder / "wandb").glob("offline-run-*"))) == 1


def test_no_service_is_asked_by_default(tmp_path):
    t = trainer(tmp_path, **SETTINGS)
    t.fit()
    assert t.tracker._sink is None
    assert {path.name for path in t.run.folder.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "checkpoints")
    }


def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    message = "--track wandb: the package wandb is not installed: pip install wandb"
    with pytest.raises(UserError, match=message):
        experiment.run(small(tmp_path, track="wandb"), QUIET)
    assert not list(tmp_path.iterdir())


def test_names_of_numbers():
    line = {"step": 3, "arm": "a", "ok": True, "means": [0.5, None], "x": {"y": {"z": 1}}}
    assert dict(tracking._numbers(line)) == {"step": 3, "means/0": 0.5, "x/y/z": 1}
