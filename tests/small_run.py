"""Runs small enough for a test: tiny data, tiny models, a few dozen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.run import Run

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


def small(tmp_path: Path, **settings: Any) -> TrainConfig:
    """Settings of a small run below ``tmp_path``; its teacher is kept there too."""
    defaults = {**SMALL, "out": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    return resolve(TrainConfig(**{**defaults, **settings}))


def hold(folder: Path, ready: Any, done: Any) -> None:
    """Keep a run folder, in a process of its own (which imports this module by name)."""
    with Run(folder).held():
        ready.set()
        done.wait(60)
