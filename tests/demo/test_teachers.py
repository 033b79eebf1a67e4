"""The teachers that come with the package: whole, as good as it says, and made by one command."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import safetensors.torch
import torch
from small_run import QUIET, SMALL

from optima_fast import tasks
from optima_fast.demo import pair, teachers
from optima_fast.demo.pair import Settings
from optima_fast.errors import UserError
from optima_fast.models.task_model import build
from optima_fast.tasks.split import Split
from optima_fast.training import Run, checkpoints, processes

TASK = pair.TASKS[0]
LARGEST = 2_300_000  # bytes of a file


def test_the_packaged_teacher_is_as_good_as_it_says(tmp_path):
    teachers.unpack(TASK, tmp_path)
    run, card = Run(tmp_path), teachers.card(TASK)
    data = tasks.load(TASK, train_images=300, validation_images=1, test_images=150)
    # few texts number their words in another order than all of them
    words, said = run.tokenizer(), map(data.tokenizer.decode, data.test.text)
    test = Split(
        data.test.images,
        words.encode_all(list(said), data.text_length),
        data.test.image_index,
        data.test.target,
    )
    model = build(run.model_config(), data.head, data.num_classes)
    checkpoints.load_weights(run.weights_path, model)
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    stated = card["test_split"]["bfloat16"]
    assert data.evaluate(model, test)[card["metric"]] == pytest.approx(stated, abs=0.05)
    assert abs(stated - card["test_split"]["float32"]) < 0.005


def test_it_is_small_and_says_where_it_is_from():
    weights, card = teachers.files(TASK)[0].read_bytes(), teachers.card(TASK)
    assert len(weights) < LARGEST
    assert hashlib.sha256(weights).hexdigest() == card["sha256"]
    assert {v.dtype for v in safetensors.torch.load(weights).values()} == {torch.bfloat16}
    assert card["command"].startswith("python -m optima_fast.demo.teachers --task")
    assert {"optima_fast", "torch"} <= card["versions"].keys()
    assert "CC BY 4.0" in card["licence"]


@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_a_damaged_teacher_is_refused(fault, tmp_path, monkeypatch):
    copy = tmp_path / "package"
    copy.mkdir()
    weights, card = teachers.files(TASK)
    monkeypatch.setattr(teachers, "HERE", copy)
    (copy / card.name).write_bytes(card.read_bytes())
    if fault == "changed":
        (copy / weights.name).write_bytes(weights.read_bytes()[:-1] + b"\0")
    monkeypatch.setattr(processes.subprocess, "Popen", None)  # nothing is to be trained
    with pytest.raises(UserError, match=f"{weights.name}.*--teacher-steps"):
        pair.train(Settings(TASK), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_what_was_trained_is_packed_and_laid_out_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = {key: SMALL[key] for key in ("train_images", "batch_size", "teacher_steps")}
    about = teachers.make(TASK, tmp_path / "packed", **few)
    known, made = json.loads(about.read_text()), Run(tmp_path / "runs" / f"teacher-{TASK}")
    assert known["test_split"]["float32"] == made.summary()["student_metric"]
    monkeypatch.setattr(teachers, "HERE", tmp_path / "packed")
    teachers.unpack(TASK, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.config() == dataclasses.replace(
        made.config(), out=None, cache=None, threads=0, device="auto"
    )
    trained = safetensors.torch.load_file(made.weights_path)
    for name, value in safetensors.torch.load_file(run.weights_path).items():
        assert torch.equal(value, trained[name].bfloat16())
    run.check_weights()
