"""What a model says of a split, with every process asking it a part."""

from __future__ import annotations

import torch

from optima_fast.models.task_model import TaskModel
from optima_fast.tasks import Split, TaskData
from optima_fast.tasks.base import Predictions
from optima_fast.training import ranks


def predict(data: TaskData, model: TaskModel, split: Split, device: torch.device) -> Predictions:
    """``data.predict``, which all processes call and which gives all of them the same."""
    part = split.part(ranks.number(), ranks.count())
    parts = ranks.gathered((data.predict(model, part, device=device), split.unreadable))
    for _, unreadable in parts:
        split.unreadable.update(unreadable)
    return Predictions.merged([said for said, _ in parts])


def evaluate(
    data: TaskData, model: TaskModel, split: Split, device: torch.device
) -> dict[str, float]:
    """``data.evaluate``, likewise."""
    return data.metrics(split, predict(data, model, split, device))
