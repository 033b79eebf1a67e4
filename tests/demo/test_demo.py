"""The demo at a small size: what it trains, what it says, and what it does the second time."""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import QUIET, InThisProcess

from optima_fast.demo import __main__ as command
from optima_fast.demo import demo, pair, result, words
from optima_fast.demo.pair import METHODS, Settings
from optima_fast.errors import UserError
from optima_fast.training import Display, Interrupted, Run, checkpoints, processes

FURTHER = {"train_images": 60, "batch_size": 4, "round_steps": 2, "reward_examples": 8}
SMALL = Settings("snli_ve", 1, 6, 2, FURTHER)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "here"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.subprocess, "Popen", InThisProcess)
        demo.run(SMALL, folder, QUIET)
    signal.signal(signal.SIGTERM, before)
    return folder


def no_process(*args: object, **options: object) -> None:
    raise AssertionError("nothing is to be trained")


def test_both_students_have_one_teacher_one_start_and_one_order(finished):
    runs = [Run(finished / method) for method in METHODS]
    first, second = (dataclasses.asdict(run.config()) for run in runs)
    assert [name for name in first if first[name] != second[name]] == ["method", "out"]
    assert first["teacher"] == str(finished / "teacher")
    before = {run.summary()["student_metric_before"] for run in runs}
    assert len(before) == 1


def test_it_says_what_the_runs_say_and_that_nobody_won(finished, monkeypatch, capsys):
    """The second time nothing is trained and the same is said."""
    monkeypatch.setattr(processes.subprocess, "Popen", no_process)
    page = demo.run(SMALL, finished, Display())
    said = capsys.readouterr().out
    assert f"{finished} is finished already" in said
    for method in METHODS:
        assert f"{Run(finished / method).summary()['student_metric']:.4f}" in said
    assert "standard error" in said
    assert "No winner" in said or "the same answers" in said
    assert f"page: {page}" in said
    assert "python -m optima_fast.demo --task snli_ve --seed 2" in said


def test_the_page_holds_everything_itself(finished):
    text = (finished / "demo.html").read_text()
    known = checkpoints.read_json(finished / "demo.json")["result"]
    assert not re.search(r"https?:|<script|<link|@import", text)
    assert text.count("data:image/png;base64,") == result.EXAMPLES
    for words_ in ('href="report.html"', "arm frequencies", "standard error", "teacher:"):
        assert words_ in text
    whole = (finished / "report.html").read_text()
    for method in METHODS:
        assert f"{known['students'][method]['metric']:.4f}" in text
        assert f"{method}: learning rate" in whole


def test_what_is_measured_again_is_what_the_runs_recorded(finished):
    measured, examples = result.measure(finished)
    kept = checkpoints.read_json(finished / "demo.json")["result"]
    assert {**measured, "settings": kept["settings"]} == kept
    students = measured["students"]
    size = students["headroom"]["metric"] - students["layerwise"]["metric"]
    assert measured["paired"]["difference"] == pytest.approx(size, abs=1e-9)
    assert 0 < students["headroom"]["arithmetic"] <= students["layerwise"]["arithmetic"] == 1.0
    assert len({e.images[0].tobytes() for e in examples}) == len(examples) == result.EXAMPLES
    assert all(set(e.said) == {"teacher", *METHODS} for e in examples)


@pytest.mark.parametrize("other", [{"steps": 7}, {"teacher_steps": None}, {"task": "vqa"}])
def test_another_demo_in_the_same_folder_is_refused(finished, other):
    (name, value), now = next(iter(other.items())), dataclasses.replace(SMALL, **other)
    match = f"--{name.replace('_', '-')} was .* there and is {value or 'the default'} now"
    with pytest.raises(UserError, match=match):
        demo.run(now, finished, QUIET)


def test_each_demo_has_a_folder_of_its_own():
    assert str(demo.default_folder(Settings("vqa", 3))) == "runs/demo-vqa-seed3"
    others = [Settings(seed=2), Settings(steps=5), Settings(teacher_steps=5), Settings()]
    assert len({demo.default_folder(settings) for settings in others}) == len(others)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is there and holds no demo: choose another --out"):
        demo.run(SMALL, tmp_path, QUIET)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "coco"], "argument --task: invalid choice: 'coco'"),
        (["--seed", "one"], "argument --seed: must be a whole number, got 'one'"),
        (["--seed", "-1"], "--seed must be 0 or more and finite, got -1"),
        (["--teacher-steps", "0"], "--teacher-steps must be positive, got 0"),
        (["--steps", "0"], "--steps must be positive and finite, got 0"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# a run that logs a step, and ends or waits as it is told
FAKE = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "told").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text('{"step": 3}\\n')
if sys.argv[2] == folder.name:
    sys.exit("warning: first\\nerror: step 4: hidden is nan")
time.sleep(20)
"""


def watched(folder: Path, monkeypatch, failing: str = "") -> None:
    def fake(given: dict[str, Any]) -> list[str]:
        return [sys.executable, "-S", "-c", FAKE, given["out"], failing]

    monkeypatch.setattr(pair, "command", fake)
    monkeypatch.setattr(pair.teachers, "unpack", lambda task, folder: None)
    monkeypatch.setattr(pair.teachers, "packaged", lambda task: True)
    pair.train(Settings(steps=10), folder, QUIET)


def test_a_run_that_fails_is_told_and_the_other_one_stopped(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the layerwise run: step 4: hidden is nan; the same"):
        watched(tmp_path, monkeypatch, failing="layerwise")
    assert (tmp_path / "headroom" / "told").is_file()


def test_ctrl_c_reaches_both_and_says_where_they_are(tmp_path, monkeypatch):
    sleep = time.sleep

    def interrupt(seconds: float) -> None:
        sleep(0.01)
        if all((tmp_path / method / "metrics.jsonl").is_file() for method in METHODS):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pair.time, "sleep", interrupt)
    with pytest.raises(Interrupted, match="after steps headroom 3, layerwise 3 of 10"):
        watched(tmp_path, monkeypatch)
    assert all((tmp_path / method / "told").is_file() for method in METHODS)


def test_paired_examples_of_the_same_images_count_as_one():
    first, second = torch.tensor([1.0, 1, 0, 1, 1, 0]), torch.tensor([0.0, 1, 0, 0, 1, 1])
    pair_ = result.paired(first, second, 2)
    groups = np.array([0.5, 0.5, -0.5])
    assert pair_.difference == pytest.approx(groups.mean())
    assert pair_.error == pytest.approx(groups.std(ddof=1) / 3**0.5)
    assert (pair_.images, pair_.only_first, pair_.only_second) == (3, 2, 1)
    assert not pair_.beyond_noise
    assert result.paired(torch.ones(8), torch.tensor([0.0, 1] * 4), 2).beyond_noise
    assert not result.paired(torch.ones(2), torch.zeros(2), 2).beyond_noise


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "headroom is ahead of layerwise by more than the noise"),
        (
            {"difference": -0.02},
            "layerwise is ahead of headroom by more than the noise",
        ),
        ({"error": 0.02, "beyond_noise": False}, "No winner"),
        ({"difference": 0.0, "only_first": 0, "only_second": 0}, "Both give the same answers"),
    ],
)
def test_the_reading_names_a_winner_only_beyond_the_noise(finished, change, said):
    known = checkpoints.read_json(finished / "demo.json")["result"]
    known["paired"] = {
        "difference": 0.02, "error": 0.005, "images": 2000, "only_first": 300, "only_second": 200,
        "beyond_noise": True, **change,
    }  # fmt: skip
    text = " ".join(words.reading(known))
    assert said in text
    assert ("ahead" in text) == ("ahead" in said)
    known["teacher"] = 0.0
    assert ("outdo this teacher" in " ".join(words.reading(known))) == (not change)


def test_a_drawing_is_half_a_character_a_pixel():
    levels = np.zeros((24, 24), dtype=np.uint8)
    levels[0, 0] = levels[1, 1] = 255
    levels[22:, 23] = 100
    rows = words.drawing(levels)
    assert [len(row) for row in rows] == [24] * 12
    assert (rows[0][:2], rows[-1][-1]) == ("\u2580\u2584", "\u2588")
    assert set("".join(rows[1:-1])) == {" "}


def test_a_browser_is_opened_only_in_front_of_a_screen(tmp_path, monkeypatch, capsys):
    opened: list[str] = []
    monkeypatch.setattr(demo.webbrowser, "open", lambda address: opened.append(address) or True)
    monkeypatch.setattr(demo.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    demo.open_page(tmp_path / "demo.html", Display())
    assert "no browser to be had here" in capsys.readouterr().out
    monkeypatch.setenv("DISPLAY", ":0")
    demo.open_page(tmp_path / "demo.html", Display())
    assert not opened  # no terminal
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: True)
    demo.open_page(tmp_path / "demo.html", Display())
    assert opened == [(tmp_path / "demo.html").as_uri()]
