"""Runs on folders whose data moved, went or changed, and runs that start from damaged ones."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil

import pytest
from official import edit, make_vqa
from small_run import QUIET, small

from optima_fast import evaluate
from optima_fast.errors import UserError
from optima_fast.tasks import tokenizers
from optima_fast.tasks.text import Vocabulary
from optima_fast.training import checkpoints, experiment
from optima_fast.training.config import OF_A_CHOICE, TrainConfig, resolve
from optima_fast.training.flags import parse
from optima_fast.training.run import Run

ANNOTATIONS = "v2_mscoco_{}2014_annotations.json"
FINETUNE = {
    "task": "vqa", "method": "finetune", "tokenizer": "words", "student": "digits_student",
    "image_size": 36, "steps": 4, "batch_size": 4, "train_images": None,
}  # fmt: skip


def settings(tmp_path, **given):
    return small(tmp_path, data=str(tmp_path / "data"), **{**FINETUNE, **given})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run and its data, in one folder."""
    folder = tmp_path_factory.mktemp("done")
    make_vqa(folder / "data")
    experiment.run(settings(folder), QUIET)
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """The same below `tmp_path`, settings and all."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(done), str(tmp_path)))
    return tmp_path


def unfinished(folder):
    """The run as a stop at its last checkpoint leaves it."""
    run = Run(folder / "run")
    run.summary_path.unlink()
    last = checkpoints.latest_checkpoint(run.checkpoints)
    assert last is not None
    state = checkpoints.load_checkpoint(last)
    state["config"] |= {"data": str(folder / "data")}
    checkpoints.save_checkpoint(run.checkpoints, state["step"], state)
    return run


def other_question(data):
    file = data / "v2_OpenEnded_mscoco_train2014_questions.json"
    edit(file, lambda content: content["questions"][0].update(question="Is it odd val?"))


def other_answer(data):
    file = data / ANNOTATIONS.format("val")
    edit(file, lambda c: [a.update(answer="1") for a in c["annotations"][0]["answers"]])


def other_image(data):
    old = data / "train2014" / f"COCO_train2014_{3:012d}.jpg"
    old.rename(old.with_name(f"COCO_train2014_{4:012d}.jpg"))
    for name in (ANNOTATIONS, "v2_OpenEnded_mscoco_{}2014_questions.json"):
        file = data / name.format("train")
        file.write_text(file.read_text().replace('"image_id": 3', '"image_id": 4'))


def fewer_images(data):
    (data / "train2014" / f"COCO_train2014_{3:012d}.jpg").unlink()


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (other_question, "8 train examples then, 8 now"),
        (other_answer, "4 (validation|test) examples then, 4 now"),
        (other_image, "8 train examples then, 8 now"),
        (fewer_images, "8 train examples then, 6 now"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(copy, change, numbers):
    run = unfinished(copy)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    change(copy / "data")
    with pytest.raises(UserError, match=f"was begun on other data: {numbers}") as caught:
        experiment.run(settings(copy), QUIET)
    assert "another --out" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_a_run_goes_on_with_the_same_data_or_without_a_checkpoint_with_any(copy):
    unfinished(copy)
    _, summary = experiment.run(settings(copy), QUIET)
    assert summary["steps"] == 4
    run = unfinished(copy)
    fewer_images(copy / "data")
    shutil.rmtree(run.checkpoints)
    experiment.run(settings(copy), QUIET)
    assert json.loads(run.data_path.read_text())["train"]["examples"] == 6


def test_a_run_is_measured_where_its_data_is_now(copy, capsys):
    recorded = Run(copy / "run").summary()["student_metric"]
    (copy / "data").rename(copy / "moved")
    assert evaluate.main([str(copy / "run")]) == 2
    said = capsys.readouterr().err
    assert f"was trained on {copy / 'data'}, which is not there: --data FOLDER says" in said
    assert said.count("\n") == 1
    assert evaluate.main([str(copy / "run"), "--data", str(copy / "moved")]) == 0
    assert f"accuracy {recorded:.4f}: the same as" in capsys.readouterr().out
    edit(copy / "run" / "summary.json", lambda summary: summary.update(student_metric=-2.0))
    assert evaluate.main([str(copy / "run"), "--data", str(copy / "moved")]) == 0
    assert f"accuracy {recorded:.4f}: was -2.0000 in" in capsys.readouterr().out


def test_a_run_on_the_digits_is_measured_on_no_folder(digits_run):
    with pytest.raises(UserError, match="is a run on the built-in data: leave --data x out"):
        experiment.evaluate(digits_run.folder, data="x")


@pytest.mark.parametrize("flag", ["teacher", "student_init"])
@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_weights_of_a_run_are_looked_at_before_anything_trains(copy, flag, damage):
    weights = Run(copy / "run").weights_path
    content = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    if damage == "another":
        checkpoints.save_state(weights, {})
    words = {"cut": "is damaged", "gone": "no weights at", "another": "of another model: .*missing"}
    given = {"method": "kd", "teacher": "digits_teacher", flag: str(copy / "run")}
    given |= {"tokenizer": None} if flag == "teacher" else {}
    config = settings(copy, out=str(copy / "next"), **given)
    with pytest.raises(UserError, match=words[damage]):
        experiment.run(config, QUIET)
    assert not (copy / "next").exists()
    assert not (copy / "cache").exists()


def test_another_tokenizer_than_the_teachers_is_refused(copy):
    given = {"method": "kd", "teacher": str(copy / "run"), "out": str(copy / "next"), "steps": 2}
    with pytest.raises(UserError, match=r"--tokenizer clip is not what .* with \(word, \d+ ids\)"):
        experiment.run(settings(copy, **given, tokenizer="clip"), QUIET)
    experiment.run(settings(copy, **given, tokenizer="words"), QUIET)


def test_a_tokenizer_goes_by_the_name_that_makes_it():
    words = Vocabulary.build(["one two"])
    assert tokenizers.named("words", words)
    assert not tokenizers.named("sentencepiece", words)
    assert tokenizers.named("clip", tokenizers.make("clip", []))


def test_the_next_command_takes_over_all_settings_of_a_run(digits_run):
    folder = digits_run.folder
    command = shlex.split("".join(digits_run.said.rpartition("optima_fast.train ")[2].splitlines()))
    config = resolve(TrainConfig(**parse(command, prog="", description="")))
    given = {"method": "layerwise", "out": f"{folder}-layerwise"}
    given |= {name: getattr(config, name) for name in OF_A_CHOICE}
    assert config == dataclasses.replace(Run(folder).config(), **given)


def test_unreadable_images_are_counted_in_whole_numbers_where_they_are_skipped(copy, capsys):
    (copy / "data" / "train2014" / f"COCO_train2014_{1:012d}.jpg").write_bytes(b"\xff\xd8")
    command = [str(copy / "run"), "--split", "train"]
    assert evaluate.main(command) == 2
    assert "; --image-errors skip leaves out what shows it\n" in capsys.readouterr().err
    config = copy / "run" / "config.yaml"
    config.write_text(config.read_text().replace("image_errors: fail", "image_errors: skip"))
    assert evaluate.main(command) == 0
    assert " left_out 2 " in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_program_teaches_nobody(done, tmp_path):
    shutil.copytree(done / "run", tmp_path / "program")
    (tmp_path / "program" / "student.safetensors").rename(tmp_path / "program" / "student.onnx")
    for read in (Run(tmp_path / "program").check_weights, Run(tmp_path / "program").load_coca):
        with pytest.raises(UserError, match="student.onnx, a program that can only be asked: give"):
            read()
