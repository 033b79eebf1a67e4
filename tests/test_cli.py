"""The commands as a user types them, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import SMALL

from optima_fast.training import checkpoints
from optima_fast.training.run import Run


def flags(tmp_path: Path, **settings: object) -> list[str]:
    merged = {**SMALL, "cache": tmp_path / "cache", **settings}
    return [f"--{k.replace('_', '-')}={v}" for k, v in merged.items()]


def command(module: str, *argv: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *argv]


def call(module: str, *argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(module, *argv), capture_output=True, text=True, **options)


def test_train_then_evaluate_tell_the_same_number(tmp_path):
    out = tmp_path / "run"
    done = call("optima_fast.train", *flags(tmp_path, out=out, steps=14))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = json.loads((out / "summary.json").read_text())
    for text in (
        "teacher (digits_teacher)",
        "student after",
        "majority",
        "arms (7 rounds)",
        "next:",
    ):
        assert text in done.stdout
    assert "scaled down" in done.stdout
    again = call("optima_fast.evaluate", str(out))
    assert again.returncode == 0, again.stderr
    assert f"accuracy {summary['student_metric']:.4f}: the same as" in again.stdout


def test_killed_without_warning_a_run_goes_on_to_the_same_end(tmp_path):
    settings = {"steps": 60, "checkpoint_every": 5, "round_steps": 4, "init_rounds": 2}
    whole = tmp_path / "whole"
    assert call("optima_fast.train", *flags(tmp_path, out=whole, **settings)).returncode == 0

    parts = tmp_path / "parts"
    argv = flags(tmp_path, out=parts, **settings)
    process = subprocess.Popen(command("optima_fast.train", *argv), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while checkpoints.latest_checkpoint(parts / "checkpoints") is None:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (parts / "summary.json").exists()

    resumed = call("optima_fast.train", *argv, "--resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stdout
    a, b = Run(whole), Run(parts)
    assert a.weights_path.read_bytes() == b.weights_path.read_bytes()
    assert a.summary()["student_metric"] == b.summary()["student_metric"]
    assert a.summary()["arms"] == b.summary()["arms"]
    logged = []
    for run in (a, b):
        rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
        logged.append([{**row, "samples_per_second": 0, "seconds": 0} for row in rows])
    assert logged[0] == logged[1]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    argv = flags(tmp_path, out=tmp_path / "run", method="finetune", steps=20_000)
    argv += ["--checkpoint-every=10", "--eval-every=100000"]
    with subprocess.Popen(
        command("optima_fast.train", *argv),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints") is None:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("module", "argv", "message"),
    [
        (
            "optima_fast.train",
            ["--setps", "3"],
            "error: unknown flag --setps; did you mean --steps",
        ),
        ("optima_fast.train", ["--data", "/no/folder"], "error: no data folder"),
        ("optima_fast.evaluate", ["/no/run"], "error: /no/run holds no run"),
        ("optima_fast.report", ["/no/run"], "error: /no/run holds no run"),
        ("optima_fast.cli", ["train", "--setps", "3"], "error: unknown flag --setps"),
        ("optima_fast.cli", ["evaluate", "/no/run"], "error: /no/run holds no run"),
        ("optima_fast.evaluate", [], "error: the following arguments are required: RUN"),
        ("optima_fast.report", [], "error: the following arguments are required: RUN"),
        ("optima_fast.export", ["run"], "error: the following arguments are required: --to"),
        ("optima_fast.doctor", ["--task", "vqa"], "error: --task and --data go together"),
        ("optima_fast.doctor", ["--images", "all"], "error: --images is for a data set"),
        ("optima_fast.train", ["--tokenizer", "clip"], "error: --tokenizer clip is for a data"),
        ("optima_fast.cli", [], "usage: optima-fast {train,evaluate,report,export,doctor}"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(module, argv, message, tmp_path):
    done = call(module, *argv, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_one_line_and_stays(tmp_path):
    folder = tmp_path / "run"
    argv = flags(tmp_path, out=folder, method="finetune", steps=6)
    assert call("optima_fast.train", *argv).returncode == 0
    (folder / "summary.json").unlink()
    newest = checkpoints.latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:100])
    done = call("optima_fast.train", *argv)
    assert done.returncode == 2
    assert f"error: checkpoint {newest} is damaged" in done.stderr
    assert done.stderr.count("\n") == 1
    assert newest.stat().st_size == 100


def test_a_missing_extra_is_told(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['yaml'] = None\n"
        "from optima_fast.train import main\n"
        "sys.exit(main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "pip install 'optima-fast[train]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_checks_the_losses():
    done = call("optima_fast.doctor")
    assert done.returncode == 0, done.stderr
    assert "losses on cpu: ok" in done.stdout
    assert "bandit backend" in done.stdout


def test_help_lists_every_setting():
    done = call("optima_fast.train", "--help")
    assert done.returncode == 0
    for name in ("--task", "--round-steps", "--gamma", "--resume", "--config"):
        assert name in done.stdout
