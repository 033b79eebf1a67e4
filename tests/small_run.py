"""Runs small enough for a test: tiny data, tiny models, a few dozen steps."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optima_fast import train
from optima_fast.distill import StepLosses
from optima_fast.training import experiment
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer

QUIET = Display(quiet=True)

# the method by default, which is told what every arm is worth
DEFAULT_CHOICE: dict[str, Any] = {"method": "headroom", "init_rounds": None}

SMALL: dict[str, Any] = {
    "train_images": 60,
    "batch_size": 4,
    "steps": 30,
    "round_steps": 2,
    "method": "optima",
    "init_rounds": 1,
    "teacher_steps": 4,
    "reward_examples": 16,
    "threads": 1,
}


class InThisProcess:
    """Runs the trainer at once instead of in a process, without another second of imports."""

    def __init__(self, argv: list[str], **options: Any) -> None:
        assert argv[:3] == [sys.executable, "-m", "optima_fast.train"]
        self.code = train.main(argv[3:])

    def poll(self) -> int:
        return self.code

    wait = poll


def small(tmp_path: Path, **settings: Any) -> TrainConfig:
    """Settings of a small run below ``tmp_path``; its teacher is kept there too."""
    defaults = {**SMALL, "out": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    return resolve(TrainConfig(**{**defaults, **settings}))


def trainer(tmp_path: Path, **settings: Any) -> Trainer:
    """A trainer on small data, with a teacher that never trained."""
    config = small(tmp_path, **settings)
    device = experiment.prepare(config)
    data = experiment.load_data(config)
    teacher = None
    if config.method != "finetune":
        torch.manual_seed(7)
        teacher = experiment.new_model(config.teacher, data).to(device)
    torch.manual_seed(config.seed)
    student = experiment.new_model(config.student, data, config.dropout).to(device)
    run = Run(config.out)
    run.begin(config)
    return Trainer(config, data, student, teacher, run, QUIET)


def finetuned(folder: Path, task: str, data: str | Path = "digits", **settings: Any) -> Run:
    """A finished run of a few steps without a teacher, on the digits or a folder of ``task``."""
    given: dict[str, Any] = {"task": task, "data": str(data), "method": "finetune", "steps": 4}
    if data != "digits":
        given |= {"train_images": None, "tokenizer": "words", "image_size": 36, "workers": "0"}
        given |= {"student": "digits_student", "lr": 3e-3}
    return experiment.run(small(folder, **{**given, "init_rounds": None, **settings}), QUIET)[0]


def rounds(t: Trainer) -> list[dict[str, Any]]:
    """The lines of rounds that were rewarded."""
    return [line for line in t.run.metrics() if "reward" in line]


def untimed(run: Run) -> list[dict[str, Any]]:
    """All lines, without the times."""
    return [{**line, "samples_per_second": 0, "seconds": 0} for line in run.metrics()]


def stop(t: Trainer, *, after: int) -> None:
    """Train up to a step and stop as Ctrl-C does."""
    step = t._train_step

    def stopping() -> StepLosses:
        t._stop.asked = t.step + 1 == after
        return step()

    t._train_step = stopping  # type: ignore[method-assign]
    with contextlib.suppress(Interrupted):
        t.fit()


class NothingIsRead(TorchDispatchMode):
    """An error where a value goes to the host, which on CUDA would wait for the device."""

    READS = frozenset(
        {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero"}
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # an index of booleans is turned into one of positions, which are counted first
        chosen = (
            [] if name not in ("index", "index_put_") else [x for x in args[1] if x is not None]
        )
        by_mask = any(x.dtype == torch.bool for x in chosen)
        assert name not in self.READS, f"{func} reads a tensor"
        assert not by_mask, f"{func} reads a tensor"
        return func(*args, **(kwargs or {}))
