"""Several processes of one run, started as users start them: by torchrun, on gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_job
import torch
from torch.distributed.run import get_args_parser

from optima_fast.errors import UserError
from optima_fast.training import checkpoints, ranks, trainer
from optima_fast.training.config import TrainConfig
from optima_fast.training.flags import parse
from optima_fast.training.run import Run

JOB = Path(ranks_job.__file__)


def job(*command: object) -> subprocess.CompletedProcess[str]:
    """Its processes have ended."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with the runs of two processes, and the same run of one."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "arm_costs", ranks_job.costs)
        ranks_job.run(folder, "alone")
        ranks_job.fit(folder / "loop")
        ranks_job.fit(folder / "loop-balanced", **ranks_job.BALANCED)
        ranks_job.fit(folder / "loop-gate", **ranks_job.GATE)
    done = job(JOB, "whole", folder, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def killed(shared):
    """A job of two processes, ended when one was killed; four have gone on with its run."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = job(*torchrun, JOB, "killed", shared)
    run = Run(shared / "killed" / "run")
    assert checkpoints.latest_checkpoint(run.checkpoints).name == "step-00000005.pt"
    done = job(JOB, "resumed", shared, 4)
    assert done.returncode == 0, done.stderr[-3000:]
    return ended


def arms(run: Run) -> list[str]:
    return [line["arm"] for line in run.metrics() if "choice" in line]


def same(run: Run, other: Run, within: float) -> None:
    """Equal weights, but for those that no gradient but that of rounding moves."""
    one, two = run.load_weights().state_dict(), other.load_weights().state_dict()
    for name, value in one.items():
        if not name.endswith(("kv.bias", "qkv.bias")):
            torch.testing.assert_close(two[name], value, rtol=0, atol=within, msg=name)


def test_a_run_of_two_processes_is_the_run_of_one(shared):
    alone, run = Run(shared / "alone"), Run(shared / "ddp")
    same(alone, run, within=2e-4)
    summaries = alone.summary(), run.summary()
    assert [x["processes"] for x in summaries] == [1, 2]
    assert summaries[1]["test"] == pytest.approx(summaries[0]["test"], rel=1e-3)


@pytest.mark.parametrize("name", ["fsdp/run", "killed/run", "cached/run"])
def test_processes_take_the_steps_of_one(shared, killed, name):
    """Sharded, with parts one after the other; and killed and gone on with by others."""
    alone, run = Run(shared / "loop" / "run"), Run(shared / name)
    assert arms(run) == arms(alone)
    assert len(set(arms(alone))) > 5
    same(alone, run, within=2e-4)
    for one, other in zip(alone.metrics(), run.metrics(), strict=True):
        for key in ("loss", "prediction", "kl", "hidden", "attention", "validation"):
            assert (key in other) == (key in one)
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-3)


@pytest.mark.parametrize("name", ["balanced", "gate"])
def test_processes_balance_and_choose_as_one(shared, name):
    alone, run = Run(shared / f"loop-{name}" / "run"), Run(shared / name / "run")
    same(alone, run, within=2e-4)
    lines = [[line for line in x.metrics() if "loss" in line] for x in (alone, run)]
    for one, other in zip(*lines, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["arm"] == one["arm"]
        if name == "balanced":
            assert other["divided_by"] == pytest.approx(one["divided_by"], rel=1e-3)
    assert (len({line["arm"] for line in lines[0]}) > 2) == (name == "gate")


def test_all_processes_end_by_the_mistake_of_one(shared):
    first, second = (json.loads((shared / f"told-{i}.json").read_text()) for i in range(2))
    assert first["mistake"] == "UserError('no disk')"
    assert second["mistake"] == "RuntimeError('left')"
    assert "step 7: prediction is nan" in first["bad"]
    assert second["bad"] == "RuntimeError('left')"
    report = json.loads((shared / "bad" / "run" / "nonfinite.json").read_text())
    assert report["step"] == 7
    assert "prediction" in report["terms"]


def test_all_processes_stop_after_the_same_step(shared):
    told = [json.loads((shared / f"told-{i}.json").read_text()) for i in range(2)]
    # the signal reached one of them before it told the other of the step's batch, or after
    assert told[0]["stopped"] == told[1]["stopped"] == "stopped after step 4 of 10"
    kept = checkpoints.latest_checkpoint(shared / "stopped" / "run" / "checkpoints")
    assert kept.name == "step-00000004.pt"


def test_a_process_that_is_killed_ends_the_job(shared, killed):
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr


def test_one_process_is_the_first_and_asks_nobody():
    assert (ranks.count(), ranks.number(), ranks.is_first(), ranks.beside()) == (1, 0, True, 1)
    assert ranks.gathered("a") == ["a"]
    assert ranks.total([1, 2.5]) == [1, 2.5]
    assert ranks.of_first(lambda: 3) == 3
    x = torch.ones(2)
    assert ranks.summed(x) is x


def test_processes_that_cannot_be_reached_are_told(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.setenv(name, "2")

    def unreachable(*given, **options):
        raise RuntimeError("NCCL error: no network\nmore lines")

    monkeypatch.setattr(ranks.dist, "init_process_group", unreachable)
    lost = pytest.raises(UserError, match=r"lost the others \(NCCL error: no network\); what")
    with lost, ranks.joined(torch.device("cpu")):
        pass


def test_the_commands_that_are_shown_are_those_of_torchrun_and_the_trainer():
    root = JOB.parents[1]
    shown = (root / "README.md").read_text() + (root / "examples/slurm.sh").read_text()
    commands = re.findall(r"torchrun (.*?) -m optima_fast\.train (.*)", shown.replace("\\\n", ""))
    assert len(commands) >= 3
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    for launcher, flags in commands:
        assert {word.split("=")[0] for word in launcher.split() if word.startswith("--")} <= known
        given = parse(flags.replace('"$@"', "").split(), prog="train", description="")
        assert TrainConfig(**given).task == "vqa"
