"""The commands as a user types them; a process of its own where the process is what is tested."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import signal
import subprocess
import sys

import pytest
import torch
from small_run import SMALL, untimed

import optima_fast
from optima_fast import cli, doctor, entry, evaluate, train
from optima_fast.errors import UserError
from optima_fast.training import checkpoints
from optima_fast.training.config import TrainConfig, flag
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _signals():
    """An entry point sets what a polite kill does, which is nothing until then."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


def flags(**settings: object) -> list[str]:
    return [f"{flag(name)}={value}" for name, value in {**SMALL, **settings}.items()]


def test_train_then_evaluate_tell_the_same_number(digits_run, capsys):
    summary = json.loads((digits_run.folder / "summary.json").read_text())
    for text in (
        "teacher (digits_teacher)",
        "student after",
        "majority",
        "arms (9 rounds)",
        "next:",
        "scaled down",
    ):
        assert text in digits_run.said
    assert evaluate.main([str(digits_run.folder)]) == 0
    done = capsys.readouterr()
    assert done.err == ""
    assert f"accuracy {summary['student_metric']:.4f}: the same as" in done.out
    assert evaluate.main([str(digits_run.folder), "--device", "cuda:99"]) == 2
    assert "--device cuda:99: this torch sees" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from optima_fast import train
from optima_fast.training.trainer import Trainer
step = Trainer._train_step
def dying(trainer):
    if trainer.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer)
Trainer._train_step = dying
train.main(sys.argv[1:])
"""


def test_killed_without_warning_a_run_goes_on_to_the_same_end(digits_run, tmp_path):
    """Killed after a round and steps that its last checkpoint does not know."""
    whole, parts = Run(digits_run.folder), Run(tmp_path / "parts")
    argv = [*digits_run.flags, f"--out={parts.folder}", "--checkpoint-every=5"]
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED, *argv], stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert parts.metrics()[-1]["step"] == 13
    assert checkpoints.latest_checkpoint(parts.checkpoints).name == "step-00000010.pt"
    assert not parts.finished()

    command = [sys.executable, "-P", "-m", "optima_fast.train", *argv, "--resume=auto"]
    resumed = subprocess.run(command, capture_output=True, text=True)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert "going on from" in resumed.stdout
    assert whole.weights_path.read_bytes() == parts.weights_path.read_bytes()
    for name in ("student_metric", "arms"):
        assert whole.summary()[name] == parts.summary()[name]
    assert untimed(whole) == untimed(parts)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    step = Trainer._train_step

    def interrupt(trainer):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", interrupt)
    assert train.main(flags(out=tmp_path / "run", method="finetune", steps=6)) == 130
    done = capsys.readouterr()
    assert "stopped after step 3 of 6; the same command goes on from there" in done.out
    assert done.err == ""


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (lambda: _raise(UserError("no such thing")), 2, "error: no such thing"),
        (lambda: signal.raise_signal(signal.SIGINT), 130, "interrupted; what was saved is intact"),
        (lambda: signal.raise_signal(signal.SIGTERM), 130, "interrupted; what was saved is intact"),
        (
            lambda: _raise(ModuleNotFoundError("No module named 'x'", name="x.y")),
            2,
            "error: No module named 'x': pip install 'optima-fast[train]'",
        ),
        (
            lambda: _raise(ModuleNotFoundError("No module named 'kornia'", name="kornia.enhance")),
            2,
            "error: No module named 'kornia': pip install 'optima-fast[data]'",
        ),
        (
            lambda: _raise(ModuleNotFoundError("No module named 'onnx'", name="onnx")),
            2,
            "error: No module named 'onnx': pip install 'optima-fast[export]'",
        ),
        (lambda: 1, 1, ""),
    ],
)
def test_how_an_entry_point_ends(body, code, message, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        assert entry.guarded(body) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.rstrip("\n") == message


def test_a_module_of_our_own_that_is_missing_is_a_bug():
    with pytest.raises(ModuleNotFoundError):
        entry.guarded(lambda: _raise(ModuleNotFoundError("no", name="optima_fast.x")))


@pytest.mark.parametrize(
    ("module", "argv", "message"),
    [
        ("train", ["--setps", "3"], "error: unknown flag '--setps'; did you mean '--steps'"),
        ("train", ["--data", "/no/folder"], "error: no data folder"),
        ("train", ["--tokenizer", "clip"], "error: --tokenizer clip is for a data"),
        ("evaluate", ["/no/run"], "error: /no/run holds no run"),
        ("report", ["/no/run"], "error: /no/run holds no run"),
        ("evaluate", [], "error: the following arguments are required: RUN"),
        ("report", [], "error: the following arguments are required: RUN"),
        ("predict", [], "error: the following arguments are required: MODEL"),
        ("export", ["run"], "error: the following arguments are required: --to"),
        ("doctor", ["--task", "vqa"], "error: --task and --data go together"),
        ("doctor", ["--images", "all"], "error: --images is for a data set"),
        ("cli", ["train", "--setps", "3"], "error: unknown flag '--setps'"),
        ("cli", ["trian"], "usage: optima-fast {demo,train,compare,evaluate,predict,report,export"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    module, argv, message, tmp_path, monkeypatch, capsys
):
    """By ``python -m``, but for the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    monkeypatch.delitem(sys.modules, f"optima_fast.{module}", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"optima_fast.{module}", run_name="__main__")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_is_its_module(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: python -m optima_fast.{command} " in capsys.readouterr().out


def test_help_lists_every_setting(capsys):
    assert cli.main(["--help"]) == 0
    assert "{demo,train,compare,evaluate,predict,report,export,doctor}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    words = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {flag(f.name) for f in dataclasses.fields(TrainConfig)} < words
    assert {"--config", "--dry-run"} < words


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


def test_doctor_checks_the_losses(monkeypatch, capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "losses on cpu: ok" in said
    assert "bandit backend" in said
    right = optima_fast.hidden_mse

    def wrong(*tensors: torch.Tensor, backend: str) -> torch.Tensor:
        return right(*tensors, backend=backend) * (1.01 if backend == "auto" else 1.0)

    monkeypatch.setattr(optima_fast, "hidden_mse", wrong)
    assert doctor.main([]) == 1
    assert "losses on cpu: WRONG (relative error 1.0e-02)" in capsys.readouterr().out
