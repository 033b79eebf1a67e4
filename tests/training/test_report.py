"""What a report prints and what is in its page: of one run, of several, of damaged ones."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from official import edit, make_coco, make_vqa
from small_run import finetuned, small

from optima_fast import report
from optima_fast.errors import UserError
from optima_fast.pages import records
from optima_fast.training import overview
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.flags import parse
from optima_fast.training.rounds import of_rounds, rewards_by_arm
from optima_fast.training.run import Run


def line(number: int, arm: str, reward: float | None = None) -> dict[str, Any]:
    found = {"step": 2 * number, "round": number, "arm": arm}
    return found if reward is None else {**found, "reward": reward}


LINES = [
    {"step": 1, "round": 0, "arm": "text", "loss": 3.0, "prediction": 2.0},
    line(1, "text", 0.5),
    {"step": 3, "round": 1, "arm": "text", "loss": 2.0, "prediction": 1.0},
    line(2, "image", 0.25),
    line(3, "text", -0.25),
    line(4, "text", 0.5),
    {"step": 8, "validation": {"accuracy": 0.5}},
]


def test_rewards_are_gathered_by_arm_the_best_first():
    assert [x["round"] for x in of_rounds(LINES)] == [1, 2, 3, 4]
    text, image = sorted(rewards_by_arm(LINES), key=lambda r: -r.pulls)
    assert text[:3] == ("text", 3, 0.25)
    assert text.spread == pytest.approx(0.4330127)
    assert (text.least, text.most) == (-0.25, 0.5)
    assert image == ("image", 1, 0.25, 0.0, 0.25, 0.25)
    means = [r.mean for r in rewards_by_arm([*LINES, line(5, "image", 0.9)])]
    assert means == sorted(means, reverse=True)
    assert rewards_by_arm([line(1, "text")]) == []


def copied(run: Path, to: Path, **changes: Any) -> Run:
    """A copy of a run with other settings; a new seed also in its summary."""
    shutil.copytree(run, to)
    copy = Run(to)
    copy.begin(dataclasses.replace(copy.config(), out=str(to), **changes))
    summary = json.loads(copy.summary_path.read_text())
    summary |= {name: value for name, value in changes.items() if name in summary}
    copy.summary_path.write_text(json.dumps(summary))
    return copy


def made(*runs: Run, out: Path, examples: int = 0, data: Path | None = None) -> str:
    """The page of these runs."""
    flags = [f"--out={out}", f"--examples={examples}", *([f"--data={data}"] if data else [])]
    assert report.main([*(str(run.folder) for run in runs), *flags]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def run(digits_run, tmp_path_factory) -> Run:
    return copied(digits_run.folder, tmp_path_factory.mktemp("report") / "run")


def test_report_prints_each_arm_s_rewards_and_writes_the_page(digits_run, tmp_path, capsys):
    run = copied(digits_run.folder, tmp_path / "run")
    summary = run.summary()
    reward = summary["reward"]
    assert {k: reward[k] for k in ("name", "clip", "cost", "split", "examples", "batches")} == {
        "name": "drop", "clip": True, "cost": "none", "split": "train", "examples": 16,
        "batches": 1,
    }  # fmt: skip
    assert 0.0 < reward["seconds"] == summary["seconds"]["reward"]
    assert 0.0 < reward["share"] < 1.0
    overview.show(run, summary, Display())
    assert "drop on 16 training examples in 1 batch: " in capsys.readouterr().out

    unfinished = Run(tmp_path / "unfinished")
    unfinished.begin(run.config())
    (tmp_path / "notes").mkdir()
    given = [str(tmp_path / "notes"), str(unfinished.folder), str(run.folder)]
    assert report.main(given) == 0
    out = capsys.readouterr().out
    assert f"left out: {tmp_path / 'notes'} holds no run (no config.yaml)" in out
    assert f"{unfinished.folder} is not finished: left out" in out
    best = rewards_by_arm(run.metrics())[0]
    assert any(best.name in row and f"{best.mean:+.5f}" in row for row in out.splitlines())
    text = (run.folder / "report.html").read_text()
    assert f"{best.mean:+.5f}" in text
    # a run of before there was such a record
    del summary["reward"]
    run.summary_path.write_text(json.dumps(summary))
    assert report.main([str(run.folder)]) == 0
    overview.show(Run(run.folder), summary, Display())
    assert "training examples in" not in capsys.readouterr().out


def test_the_page_of_a_run_has_result_command_examples_and_plots(run, tmp_path):
    text = made(run, out=tmp_path / "page.html", examples=2)
    summary = run.summary()
    for key in ("student_metric", "teacher_metric", "student_metric_before", "text_only_metric"):
        assert f"<b>{summary[key]:.4f}</b>" in text
    assert "<h1>vqa: optima, seed 0</h1>" in text
    assert "python -m optima_fast.train --method=optima" in re.sub(r"<[^>]*>", "", text)
    # questions, the teacher's and the student's answers, each with its image
    count = text.count("data:image/png;base64,")
    assert 1 <= count <= 4
    assert text.count("teacher: <span") == text.count("optima, seed 0: <span") == count
    assert text.count("right answer: <b>") == count
    plots = re.findall(r'<svg[^>]* aria-label="([^"]*)"', text)
    assert plots == [
        *(f"vqa: validation over {x}" for x in ("steps", "arithmetic", "seconds")),
        *(f"optima: {x}" for x in ("arm of each round", "arm frequencies", "reward means")),
        *(f"optima: {x}" for x in ("reward", "losses", "hidden states by module")),
        *(f"optima: {x}" for x in ("attention by module", "learning rate")),
    ]
    for words in ("optimizer steps", "GFLOP", "share of all rounds", "mean reward", "accuracy"):
        assert f">{words}" in text or f"{words}</text>" in text
    assert text.count("the paper&#x27;s figure") == 3
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", text)


def test_the_command_makes_the_same_settings(run, tmp_path):
    for config in (run.config(), small(tmp_path, task="coco", method="kd", fsdp=True)):
        words = shlex.split(records.command(config))
        given = parse(words[3:], prog="", description="")
        assert resolve(TrainConfig(**given)) == config
        for i in range(3, len(words)):  # and none of it is needless
            fewer = parse([*words[3:i], *words[i + 1 :]], prog="", description="")
            with contextlib.suppress(UserError):
                assert resolve(TrainConfig(**fewer)) != config, words[i]


def test_runs_that_differ_in_their_seed_are_one_method(run, tmp_path, capsys):
    folder = tmp_path / "compare"
    seeds = [copied(run.folder, folder / f"seed{seed}", seed=seed) for seed in (1, 2)]
    other = copied(run.folder, folder / "other", gamma=0.5)
    for copy, metric in zip((*seeds, other), (0.25, 0.75, 0.125), strict=True):
        summary = json.loads(copy.summary_path.read_text())
        copy.summary_path.write_text(json.dumps({**summary, "student_metric": metric}))
    given = [f"{path}/" for path in sorted(folder.iterdir())]
    assert report.main([*given, "--examples=1"]) == 0
    assert f"wrote {folder / 'report.html'}" in capsys.readouterr().out
    text = (folder / "report.html").read_text()
    plain = re.sub(r"<[^>]*>", " ", text)
    gamma = run.config().gamma
    assert f"optima --gamma {gamma}  1, 2  0.5000  0.2500-0.7500" in plain
    assert "optima --gamma 0.5  0  0.1250  0.1250-0.1250" in plain
    assert "median of 2 seeds" in text
    assert "vqa: test split" in text
    assert text.count("<span>optima_fast.train</span>") == 3
    # examples are chosen by the first run, and a student of each method is asked
    assert text.count("optima --gamma 0.5, seed 0: <span") == text.count("right answer: <b>") > 0

    assert report.main([str(run.folder), str(other.folder)]) == 2
    assert "several folders" in (error := capsys.readouterr().err)
    assert f"{folder} and {run.folder.parent}" in error or f"{run.folder.parent} and" in error
    assert "--out FILE.html" in error
    assert error.count("\n") == 1


def test_without_rounds_the_page_says_which_modules_were_distilled(run, tmp_path):
    copy = copied(run.folder, tmp_path / "run")
    lines = [x for x in copy.metrics() if "loss" in x]
    copy.metrics_path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = made(copy, out=tmp_path / "page.html")
    assert "arm of each round" not in text
    told = html.escape(overview.shares(run.summary()["arms"]))
    assert f"Modules that were distilled: {told}" in text
    copy.metrics_path.write_text("")
    assert "Too few logged steps to draw." in made(copy, out=tmp_path / "page.html")


def test_what_is_not_at_hand_is_said_and_the_rest_is_shown(run, tmp_path):
    copy = copied(run.folder, tmp_path / "other")
    known = json.loads(copy.data_path.read_text())
    known["test"]["sha256"] = "0"
    copy.data_path.write_text(json.dumps(known))
    text = made(copy, out=tmp_path / "page.html", examples=1)
    assert f"No examples are shown: {copy.folder} was measured on another test split" in text
    assert "optima: losses" in text

    gone = copied(run.folder, tmp_path / "gone")
    gone.remember_teacher(Run(tmp_path / "away"))
    text = made(gone, out=tmp_path / "page.html", examples=1)
    assert "The teacher is not asked: there is no run of it at hand." in text
    assert "right answer: <b>" in text
    assert "teacher: <span" not in text
    gone.teacher_path.write_text("[]")
    assert "teacher.json names no run: delete it" in made(
        gone, out=tmp_path / "page.html", examples=1
    )


def test_a_folder_of_data_that_is_gone_is_named_and_may_have_moved(tmp_path, capsys):
    vqa_folder = tmp_path / "data"
    make_vqa(vqa_folder)
    run = finetuned(tmp_path, "vqa", vqa_folder)
    text = made(run, out=tmp_path / "page.html", examples=1)
    assert "data:image/png" in text
    assert "Modules that were distilled: none" in text
    assert "teacher: <span" not in text
    assert "The teacher is not asked" not in text
    vqa_folder.rename(tmp_path / "moved")
    text = made(run, out=tmp_path / "page.html", examples=1)
    gone = f"{run.folder} was trained on {vqa_folder}, which is not there: --data FOLDER"
    assert f"No examples are shown: {gone}" in text
    assert "Arithmetic is not counted" in text
    assert "validation over arithmetic" not in text

    def said(*flags: str) -> str:
        assert report.main([str(run.folder), *flags, f"--out={tmp_path / 'page.html'}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    text = made(run, out=tmp_path / "page.html", examples=1, data=tmp_path / "moved")
    assert "data:image/png" in text
    assert "validation over arithmetic" in text
    command = re.sub(r"<[^>]*>", "", text)
    assert f"--data={tmp_path / 'moved'}" in command
    assert "error: no data folder 'away': give an existing folder" in said("--data=away")
    make_coco(tmp_path / "coco")
    assert "what is there is of --task coco" in said(f"--data={tmp_path / 'coco'}")
    edit(
        tmp_path / "moved" / "v2_mscoco_val2014_annotations.json",
        lambda c: [a.update(answer="1") for a in c["annotations"][0]["answers"]],
    )
    assert "was measured on another test split than" in said(f"--data={tmp_path / 'moved'}")


def test_data_that_moved_is_of_one_task_and_no_built_in_data(run, tmp_path, capsys):
    folder = tmp_path / "data"
    make_vqa(folder)
    vqa = finetuned(tmp_path, "vqa", folder)
    folder.rename(tmp_path / "moved")
    flag = f"--data={tmp_path / 'moved'}"
    page = tmp_path / "page.html"
    assert "No examples are shown" in made(vqa, run, out=page, examples=1)
    text = made(vqa, run, out=page, examples=1, data=tmp_path / "moved")
    assert "No examples are shown" not in text
    assert report.main([str(run.folder), flag, f"--out={page}"]) == 2
    assert "all runs are on the built-in data: leave it out" in capsys.readouterr().err
    coco = copied(vqa.folder, tmp_path / "coco", task="coco")
    assert report.main([str(vqa.folder), str(coco.folder), flag, f"--out={page}"]) == 2
    error = capsys.readouterr().err
    assert "is of one task, and the runs on folders are of vqa, coco: report each task" in error


EVIL = "<img src=x onerror=alert(1)>$x$&amp;"


def test_names_are_text_and_nothing_else(run, tmp_path):
    copy = copied(run.folder, tmp_path / EVIL)
    arm = next(iter(copy.summary()["arms"]))
    for path in (copy.metrics_path, copy.summary_path):
        path.write_text(path.read_text().replace(f'"{arm}"', json.dumps(EVIL)))
    text = made(copy, run, out=tmp_path / "page.html")
    assert "<img" not in text
    assert "onerror" in text
    assert html.escape(EVIL) in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--out=."], "--out . is a folder: name a file in it, report.html"),
        (["--out=no/page.html"], "--out no/page.html: there is no folder no; create it first"),
        (["--examples=-1"], "argument --examples: must be a whole number from 0 on, got '-1'"),
    ],
)
def test_a_mistake_is_one_line(run, flags, expected, capsys):
    assert report.main([str(run.folder), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["safetensors", "torch-export"])
def test_an_exported_student_is_told_from_a_run(digits_run, tmp_path, capsys, kind):
    exported = tmp_path / "exported"
    if kind == "safetensors":
        shutil.copytree(digits_run.folder, exported, ignore=shutil.ignore_patterns("metrics.jsonl"))
    else:
        left = ("metrics.jsonl", "student.safetensors")
        shutil.copytree(digits_run.folder, exported, ignore=shutil.ignore_patterns(*left))
    assert report.main([str(exported)]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.startswith(f"error: {exported} holds a student without the record of its")
    assert f"measure it: python -m optima_fast.evaluate {exported}" in done.err
    assert done.err.count("\n") == 1

    shutil.copytree(digits_run.folder, tmp_path / "run")
    assert report.main([str(exported), str(tmp_path / "run")]) == 0
    done = capsys.readouterr()
    assert f"left out: {exported} holds a student" in done.out
    assert "rewards by arm" in done.out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "kl on 256 training examples in 2 batches: 3.1 s, 5% of the run"),
        ({"clip": False}, "kl, signed on 256 training"),
        ({"cost": "flops", "split": "held-out"}, "kl, per flops on 256 held-out training examples"),
    ],
)
def test_the_reward_s_line_says_how_it_was_measured(changes, expected):
    reward = {
        "name": "kl", "clip": True, "cost": "none", "split": "train", "examples": 256, "batches": 2,
        "seconds": 3.14, "share": 0.0512,
    }  # fmt: skip
    assert overview.reward_line({**reward, **changes}).startswith(expected)
