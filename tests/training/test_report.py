"""What a finished run shows: rewards by arm, arms over the rounds, what the rewards cost."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any
from xml.dom import minidom

import pytest

from optima_fast import report
from optima_fast.training import overview, page
from optima_fast.training.display import Display
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


def figures(text: str) -> list[minidom.Element]:
    return [minidom.parseString(x).documentElement for x in re.findall(r"<svg.*?</svg>", text)]


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


def test_the_figure_has_a_mark_a_round_and_the_share_so_far():
    pulls = {"image": 1, "text": 3, "multimodal": 0}
    raster, shares = figures(page.choices(LINES, pulls))
    marks = raster.getElementsByTagName("rect")
    assert len(marks) == 4
    x = [float(mark.getAttribute("x")) for mark in marks]
    step = (page.WIDTH - page.LEFT) / 4
    assert x == pytest.approx([page.LEFT + i * step for i in range(4)], abs=0.1)
    rows = [float(m.getAttribute("y")) + float(m.getAttribute("height")) for m in marks]
    assert rows[0] == rows[2] == rows[3] == rows[1] + page.ROW  # text stands below image
    tall = [float(mark.getAttribute("height")) for mark in marks]
    assert tall[0] == tall[3] > tall[1] == tall[2] > 4
    colours = [mark.getAttribute("fill") for mark in marks]
    assert colours[2] == page.NEGATIVE
    assert colours[0] == colours[3] not in (colours[1], page.NEGATIVE)
    labels = [t.firstChild.data for t in raster.getElementsByTagName("text")]
    assert labels == ["image (1)", "text (3)"]

    curves = {
        c.getElementsByTagName("title")[0].firstChild.data: c
        for c in shares.getElementsByTagName("polyline")
    }
    assert set(curves) == {"image", "text"}
    assert curves["text"].getAttribute("stroke") == colours[0]
    height = int(shares.getAttribute("height"))
    points = [p.split(",") for p in curves["text"].getAttribute("points").split()]
    assert [1 - float(y) / height for _, y in points] == pytest.approx(
        [1, 1 / 2, 2 / 3, 3 / 4], abs=1e-3
    )
    assert float(points[-1][0]) == page.WIDTH


def test_many_arms_are_cut_to_those_pulled_most_and_said_so():
    pulls = {f"arm{'+long' * 6}<{i}>": 100 - i for i in range(63)}
    lines = [line(i + 1, name, 0.0) for i, name in enumerate(pulls)]
    text = page.choices(lines, pulls)
    raster, shares = figures(text)
    assert len(raster.getElementsByTagName("rect")) == page.ROWS
    assert len(shares.getElementsByTagName("polyline")) == len(page.COLOURS)
    assert page.NEGATIVE not in text  # a reward of 0 is none below it
    assert f"{63 - page.ROWS} more arms were pulled less often" in text
    assert overview.shares({"a": 3, "b": 1, "c": 0}) == "a 75%, b 25%"
    assert overview.shares(dict.fromkeys(map(str, range(20)), 5)).endswith("8 others 40%")


def test_a_run_without_rewards_has_its_arms_all_the_same():
    assert page.choices([], {"image": 3, "text": 0}) == "<p>image 3</p>"
    assert page.choices([], {}) == "<p>none</p>"
    assert page._rewards([line(1, "text")]) == "<p>No reward was measured.</p>"
    raster = figures(page.choices([line(1, "text"), line(2, "text")], {"text": 2}))[0]
    assert len(raster.getElementsByTagName("rect")) == 2


def test_report_prints_each_arm_s_rewards_and_writes_the_page(digits_run, tmp_path, capsys):
    shutil.copytree(digits_run.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
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
    assert report.main([str(unfinished.folder), str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert f"{unfinished.folder} is not finished: left out" in out
    assert "rewards by arm" in out
    best = rewards_by_arm(run.metrics())[0]
    assert any(best.name in row and f"{best.mean:+.5f}" in row for row in out.splitlines())
    text = (run.folder / "report.html").read_text()
    assert len(figures(text)) == 3
    assert "Rewards by arm" in text
    assert f"{best.mean:+.5f}" in text
    # a run of before there was such a record
    del summary["reward"]
    (run.summary_path).write_text(json.dumps(summary))
    assert report.main([str(run.folder)]) == 0
    overview.show(Run(run.folder), summary, Display())
    assert "training examples in" not in capsys.readouterr().out


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
