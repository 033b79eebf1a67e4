"""The table of whole runs: what it runs, what it makes of them."""

from __future__ import annotations

import json
import subprocess

import bench_choice
import pytest

from optima_fast.errors import UserError
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.flags import parse

ARGUMENTS = ["--tasks", "vqa", "--seeds", "3", "--smoke", "--jobs", "1"]


def test_a_run_is_made_once_and_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_choice, "METHODS", {"headroom": bench_choice.METHODS["headroom"]})
    argv = ["--runs", str(tmp_path), *ARGUMENTS, f"--cache={tmp_path / 'cache'}"]
    assert bench_choice.main(argv) == 0
    first = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in first[1:]] == ["headroom"]
    summary = tmp_path / "vqa-headroom-s3" / "summary.json"
    told = json.loads(summary.read_text())
    assert (told["policy"], told["reward"]["name"], told["seed"]) == ("greedy", "headroom", 3)
    written = summary.stat().st_mtime_ns
    assert bench_choice.main([*argv, f"--json={tmp_path / 'lines.json'}"]) == 0
    assert capsys.readouterr().out.splitlines() == first
    assert summary.stat().st_mtime_ns == written
    (line,) = json.loads((tmp_path / "lines.json").read_text())
    assert (line["metric"], line["seeds"]) == ([told["student_metric"]], [3])
    assert 0 < line["cost"] < 1


@pytest.fixture
def asked(monkeypatch):
    """The settings of the runs, which are not made: they fail if --lr is negative."""
    found = []

    def run(command, **options):
        assert command[1:3] == ["-m", "optima_fast.train"]
        try:
            found.append(resolve(TrainConfig(**parse(command[3:], prog="", description=""))))
        except UserError as error:
            return subprocess.CompletedProcess(command, 2, "", f"error: {error}\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bench_choice.subprocess, "run", run)
    return found


def test_each_method_is_run_on_each_task_and_seed(tmp_path, asked):
    argv = ["--runs", str(tmp_path), *ARGUMENTS, "--tasks", "vqa", "coco", "--seeds", "0", "3"]
    assert bench_choice.main(argv) == 0
    assert len({config.out for config in asked}) == len(asked) == 4 * len(bench_choice.METHODS)
    kinds = {(config.method, config.policy, config.arm) for config in asked}
    assert len(kinds) == len(bench_choice.METHODS)
    assert {(config.task, config.seed) for config in asked} == {
        ("vqa", 0), ("vqa", 3), ("coco", 0), ("coco", 3),
    }  # fmt: skip


def test_a_run_that_fails_is_named(tmp_path, capsys, asked):
    assert bench_choice.main(["--runs", str(tmp_path), *ARGUMENTS, "--lr=-1"]) == 1
    told = capsys.readouterr().err
    assert (
        f"{tmp_path / 'vqa-headroom-s3'}: error: --lr must be positive and finite, got -1" in told
    )
    assert not asked


def test_a_row_counts_the_seeds_it_shares(tmp_path):
    metric = {
        "headroom": {0: 0.5, 1: 0.7, 2: 0.6},
        "layerwise": {0: 0.4, 1: 0.7},
        "random": {0: 0.6, 1: 0.1, 2: 0.2, 3: 0.3},
    }
    results = {m: {s: {"student_metric": v} for s, v in x.items()} for m, x in metric.items()}
    for seed, costs in enumerate(((1.0, 0.5), (0.6,), (0.6, 0.6))):
        run = bench_choice.folder(tmp_path, "vqa", "headroom", seed)
        run.mkdir()
        lines = [json.dumps({"cost": c}) for c in costs] + ['{"loss": 1.0}']
        (run / "metrics.jsonl").write_text("\n".join(lines))
    line = bench_choice.row(tmp_path, "vqa", "headroom", results)
    assert (line["median"], line["above layerwise"], line["above random"]) == (0.6, "1/2", "2/3")
    assert line["cost"] == pytest.approx((0.75 + 0.6 + 0.6) / 3)
    assert "cost" not in bench_choice.row(tmp_path, "vqa", "random", results)
