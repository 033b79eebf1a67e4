"""The table of whole runs: what it runs, what it makes of them."""

from __future__ import annotations

import json

import bench_choice
import pytest


def test_runs_are_made_once_and_told(tmp_path, capsys, monkeypatch):
    two = {name: bench_choice.METHODS[name] for name in ("headroom", "optima")}
    monkeypatch.setattr(bench_choice, "METHODS", two)
    argv = ["--runs", str(tmp_path), "--tasks", "vqa", "--seeds", "3", "--smoke"]
    argv += [f"--cache={tmp_path / 'cache'}"]
    assert bench_choice.main([*argv, "--jobs", "1"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in first[1:]] == list(bench_choice.METHODS)
    summary = tmp_path / "vqa-headroom-s3" / "summary.json"
    written = summary.stat().st_mtime_ns
    told = json.loads(summary.read_text())
    assert (told["policy"], told["reward"]["name"]) == ("greedy", "headroom")
    assert (
        json.loads((tmp_path / "vqa-optima-s3" / "summary.json").read_text())["policy"]
        == "thompson"
    )
    assert bench_choice.main(argv) == 0
    assert capsys.readouterr().out.splitlines() == first
    assert summary.stat().st_mtime_ns == written


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


def test_a_run_that_fails_is_named(tmp_path, capsys):
    argv = ["--runs", str(tmp_path), "--tasks", "vqa", "--seeds", "0", "--smoke", "--lr=-1"]
    assert bench_choice.main(argv) == 1
    told = capsys.readouterr().err
    assert (
        f"{tmp_path / 'vqa-headroom-s0'}: error: --lr must be positive and finite, got -1" in told
    )
