"""Distillation in stages, and which student of a run is kept."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from small_run import QUIET, small, stop, trainer

from optima_fast import train
from optima_fast.errors import UserError
from optima_fast.models import presets
from optima_fast.training import checkpoints, experiment, stages, teachers
from optima_fast.training.config import TrainConfig
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.run import Run

TINY = dataclasses.replace(
    presets.get("digits_student"), image_layers=1, text_layers=1, multimodal_layers=1
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "digits_tiny", TINY)


def staged(tmp_path, **settings) -> TrainConfig:
    """Unresolved settings of two stages."""
    given = {"method": "layerwise", "steps": 4, "train_images": 60, "batch_size": 4, "threads": 1}
    given |= {"teacher_steps": 2, "out": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")}
    return TrainConfig(stages="digits_student, digits_tiny", **{**given, **settings})


def test_each_student_is_the_teacher_of_the_next_and_a_stage_goes_on(tmp_path, monkeypatch):
    config = staged(tmp_path)
    evaluate, calls = experiment.Trainer.fit, []

    def interrupted(self):
        calls.append(self.config.student)
        if len(calls) == 3:
            step = self._train_step

            def asking():
                self._stop.asked = self.step == 1
                return step()

            self._train_step = asking
        return evaluate(self)

    monkeypatch.setattr(experiment.Trainer, "fit", interrupted)
    with pytest.raises(Interrupted):
        stages.run(config, QUIET)
    assert calls == ["digits_teacher", "digits_student", "digits_tiny"]
    run, summary = stages.run(config, QUIET)
    assert calls == ["digits_teacher", "digits_student", "digits_tiny", "digits_tiny"]
    first = Run(tmp_path / "runs" / "1-digits_student")
    assert run.folder == tmp_path / "runs" / "2-digits_tiny"
    assert summary["teacher_metric"] == first.summary()["student_metric"]
    assert run.config().teacher == str(first.folder)
    assert run.model_config().layer_counts == {"image": 1, "text": 1, "multimodal": 1}
    assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stages": "digits_tiny,digits_student"},
            "digits_student cannot learn from digits_tiny, ",
        ),
        ({"stages": "digits_tiny,digits_tinny"}, "--stages 'digits_tinny' is no run folder and no"),
        ({"resume": "runs/x"}, "--resume runs/x is of one run: with --stages the same command go"),
    ],
)
def test_stages_that_cannot_be_are_told_before_the_first(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        stages.run(dataclasses.replace(staged(tmp_path), **settings), QUIET)
    assert not list(tmp_path.iterdir())


def test_stages_name_the_students(tmp_path, capsys):
    for more in ({"student": "digits_tiny"}, {"method": "finetune"}):
        with pytest.raises(UserError, match="--stages .* names the students of a teacher: leave"):
            staged(tmp_path, **more)
    flags = ["--stages=digits_student,digits_tiny", "--train-images=60", f"--out={tmp_path}/x"]
    assert train.main([*flags, "--dry-run"]) == 0
    assert "student (digits_student)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def measured(monkeypatch, values):
    """Give the validation split these metrics in turn; those of the test split stay."""
    whole = experiment.Trainer.evaluate

    def evaluate(self, split):
        metrics = whole(self, split)
        if split is self.data.validation:
            metrics[self.data.metric_name] = values.pop(0)
        return metrics

    monkeypatch.setattr(experiment.Trainer, "evaluate", evaluate)


@pytest.mark.parametrize(("keep", "step", "metric"), [("best", 4, 0.75), ("last", 8, 0.5)])
def test_the_student_that_is_kept(tmp_path, monkeypatch, keep, step, metric):
    settings = {"method": "kd", "steps": 8, "init_rounds": None, "eval_every": 2, "keep": keep}
    config = small(tmp_path, checkpoint_every=3, **settings)
    measured(monkeypatch, [0.25, 0.75, 0.75, 0.5])
    states = {}
    one = experiment.Trainer._train_step

    def stepping(self):
        losses = one(self)
        if self.distiller is not None:
            states[self.step + 1] = {n: p.clone() for n, p in self.student.state_dict().items()}
        return losses

    monkeypatch.setattr(experiment.Trainer, "_train_step", stepping)
    # the teacher's own training is measured too
    monkeypatch.setattr(experiment, "_teacher", _untrained)
    run, summary = experiment.run(config, QUIET)
    assert (summary["kept_step"], summary["validation_metric"]) == (step, metric)
    for name, value in run.load_weights().state_dict().items():
        assert torch.equal(value, states[step][name]), name
    kept = [path.name for path in run.checkpoints.glob("best-*")]
    assert kept == (["best-00000004.safetensors"] if keep == "best" else [])
    assert summary["student_metric"] == experiment.evaluate(run.folder)[1]["accuracy"]


def _untrained(config, models, data, *rest):
    torch.manual_seed(7)
    return experiment.new_model(config.teacher, data), 0.5, None


def test_the_best_is_known_after_a_stop(tmp_path, monkeypatch):
    settings = {"method": "kd", "steps": 8, "eval_every": 2, "keep": "best", "log_every": 1}
    t = trainer(tmp_path, **settings)
    measured(monkeypatch, [0.75, 0.5, 0.5, 0.25])
    stop(t, after=5)
    rest = trainer(tmp_path, **settings)
    rest.resume(checkpoints.latest_checkpoint(rest.run.checkpoints))
    rest.fit()
    assert (rest.finish(), rest.kept_step) == (0.75, 2)


def test_a_run_stops_after_its_hours(tmp_path, monkeypatch):
    t = trainer(tmp_path, method="kd", steps=8, max_hours=1e-9)
    with pytest.raises(Interrupted, match="after step 1 of 8"):
        t.fit()
    assert teachers.teacher_config(t.config).max_hours == 1e-9  # its teacher's training too
    # how long it takes is no part of what a run computes
    experiment.place(dataclasses.replace(t.config, max_hours=2.0))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, monkeypatch):
    flags = ["--method=kd", "--steps=6", "--checkpoint-every=2", "--train-images=60"]
    flags += ["--batch-size=4", "--teacher-steps=2", "--threads=1", "--log-every=1"]
    flags += [f"--out={tmp_path}/run", f"--cache={tmp_path}/cache"]
    assert train.main(flags) == 0
    run = Run(tmp_path / "run")
    whole, lines = run.load_weights().state_dict(), run.metrics()
    run.summary_path.unlink()
    older, newest = checkpoints.found(run.checkpoints)
    newest.write_bytes(newest.read_bytes()[:-200])
    capsys.readouterr()
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    assert f"warning: checkpoint {newest} is damaged" in said
    assert f"going on from {older} (step 4 of 6)" in said
    for name, value in run.load_weights().state_dict().items():
        assert torch.equal(value, whole[name]), name
    assert [x["step"] for x in run.metrics()] == [x["step"] for x in lines]
    for path in checkpoints.found(run.checkpoints):
        path.write_bytes(b"")
    run.summary_path.unlink()
    assert train.main(flags) == 2
    assert "is damaged (File is not a zip file); delete it to start over" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "data.json").read_text())
