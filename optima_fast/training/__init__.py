"""From settings to a trained student: optimizer, loop, run folders, what the user sees."""

from __future__ import annotations

from optima_fast.training.adafactor import Adafactor
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.experiment import evaluate, run
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer

__all__ = [
    "Adafactor",
    "Display",
    "Interrupted",
    "Run",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "resolve",
    "run",
]
