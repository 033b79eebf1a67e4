"""Runs on official layouts: small models learn the few real examples by heart; predictions."""

from __future__ import annotations

import csv
import functools
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from official import make_vqa, picture, shared, write
from PIL import Image
from small_run import QUIET, small

from optima_fast import evaluate
from optima_fast.errors import UserError
from optima_fast.tasks.images import Preprocessing
from optima_fast.tasks.vqa_answers import score
from optima_fast.training import experiment


def trained(tmp_path, task, data, **settings):
    """A run without a teacher of a small student on a folder."""
    given = {"init_rounds": None, "train_images": None, "reward_examples": 4}
    given |= {"task": task, "data": str(data), "method": "finetune", "tokenizer": "words"}
    given |= {"student": "digits_student", "image_size": 36}
    given |= {"workers": "0", "checkpoint_every": 1000}
    return experiment.run(small(tmp_path, **{**given, **settings}), QUIET)


def by_heart(run):
    """Metrics on the training split, from the files of the run."""
    _, metrics, _ = experiment.evaluate(run.folder, split="train")
    return metrics


@pytest.fixture
def read_once(monkeypatch):
    """Each image is decoded for its first batch alone: hundreds of epochs of a few photographs."""
    monkeypatch.setattr(Preprocessing, "read", functools.cache(Preprocessing.read))


@pytest.fixture(scope="module")
def vqa_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    root = make_vqa(folder / "data", images=8)
    picture(root / "test2015" / f"COCO_test2015_{7:012d}.jpg")
    questions = [{"question": "Is it odd val?", "question_id": 900, "image_id": 7}]
    write(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})
    return trained(folder, "vqa", root, steps=4)[0]


def test_predictions_of_a_run_score_as_it_says(vqa_run, tmp_path):
    file = tmp_path / "answers.json"
    _, metrics, recorded = experiment.evaluate(vqa_run.folder, predictions=file)
    assert metrics["accuracy"] == recorded
    said = {entry["question_id"]: entry["answer"] for entry in json.loads(file.read_text())}
    root = Path(vqa_run.config().data)
    notes = json.loads((root / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    answers = {n["question_id"]: [a["answer"] for a in n["answers"]] for n in notes}
    official = [score(said[number], answers[number]) for number in said]
    assert len(official) == 8
    assert np.mean(official) == pytest.approx(metrics["accuracy"], abs=1e-7)
    _, _, recorded = experiment.evaluate(vqa_run.folder, split="validation")
    assert recorded == vqa_run.summary()["validation_metric"]


def test_test_dev_is_predicted_without_metrics(vqa_run, tmp_path, capsys):
    file = tmp_path / "test-dev.json"
    arguments = [str(vqa_run.folder), "--split", "test-dev", "--predictions", str(file)]
    assert evaluate.main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "test-dev split: no metrics, its answers are not public" in shown
    (entry,) = json.loads(file.read_text())
    assert entry["question_id"] == 900
    assert isinstance(entry["answer"], str)
    assert [path.name for path in tmp_path.iterdir()] == ["test-dev.json"]
    content = file.read_bytes()
    assert evaluate.main(arguments) == 2
    assert "is there already: choose a new file" in capsys.readouterr().err
    assert file.read_bytes() == content


def test_splits_that_are_not_there(vqa_run, capsys):
    assert evaluate.main([str(vqa_run.folder), "--split", "test-std"]) == 2
    assert "has no test-std split of vqa" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unknown split 'tests'; did you mean 'test'"):
        experiment.evaluate(vqa_run.folder, split="tests")


@pytest.mark.slow
def test_real_photographs_are_captioned_by_heart(tmp_path, read_once):
    run, summary = trained(tmp_path, "coco", shared("coco"), steps=140, batch_size=26, lr=6e-3)
    metrics = by_heart(run)
    # a caption that is one of five or more references, word for word, reaches about 2.9
    assert metrics["cider"] > 2.5
    assert metrics["bleu4"] > 0.9
    assert set(summary["test"]) == set(metrics)


@pytest.mark.slow
def test_the_real_vqa_questions_are_learnt_by_heart(tmp_path, caplog, read_once):
    with caplog.at_level(logging.WARNING):
        run, _ = trained(tmp_path, "vqa", shared("vqav2"), steps=50, batch_size=16, lr=5e-3)
    assert by_heart(run)["accuracy"] > 0.9
    assert "only a training split" in caplog.text


@pytest.mark.slow
def test_official_nlvr2_lines_are_learnt_by_heart(tmp_path, read_once):
    """The first official dev lines, as training data too, with images of noise."""
    lines = shared("nlvr2", "dev.json").read_text().splitlines()[:60]
    rng = np.random.default_rng(0)
    for part, rows in (("train", lines[:40]), ("dev", lines[40:50]), ("test1", lines[50:])):
        (tmp_path / f"{part}.json").write_text("\n".join(rows))
        (tmp_path / "images" / part).mkdir(parents=True)
        for row in rows:
            name = json.loads(row)["identifier"].rpartition("-")[0]
            for side in (0, 1):
                noise(tmp_path / "images" / part / f"{name}-img{side}.png", rng)
    run, summary = trained(tmp_path, "nlvr2", tmp_path, steps=60, batch_size=20, lr=3e-3)
    metrics = by_heart(run)
    assert metrics["accuracy"] > 0.95
    assert metrics["consistency"] > 0.9
    assert 0 <= summary["test"]["consistency"] <= summary["test"]["accuracy"] <= 1
    file = tmp_path / "said.csv"
    experiment.evaluate(run.folder, split="train", predictions=file)
    labels = {json.loads(row)["identifier"]: json.loads(row)["label"] for row in lines}
    hits = [said == labels[i] for i, said in csv.reader(file.read_text().splitlines())]
    assert np.mean(hits) == pytest.approx(metrics["accuracy"])


@pytest.mark.slow
def test_official_snli_ve_pairs_are_learnt_by_heart(tmp_path):
    for part in ("train", "dev", "test"):
        shutil.copy(shared("snli_ve", "sample_pairs.jsonl"), tmp_path / f"snli_ve_{part}.jsonl")
    rng = np.random.default_rng(0)
    (tmp_path / "flickr30k-images").mkdir()
    for image in ("2248275918", "402978771"):
        noise(tmp_path / "flickr30k-images" / f"{image}.jpg", rng)
    run, _ = trained(tmp_path, "snli_ve", tmp_path, steps=60, batch_size=16, lr=3e-3)
    assert by_heart(run)["accuracy"] == 1


def noise(path, rng):
    if not os.path.exists(path):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
