"""The loss of a training step, or of a part of its batch: a module that DDP or FSDP can wrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from optima_fast.distill import Balance, Distiller, StepLosses
from optima_fast.distill.arms import Arm
from optima_fast.distill.shares import Extent, Shares
from optima_fast.models.task_model import TaskModel
from optima_fast.tasks import TaskData
from optima_fast.tasks.base import soft_bce
from optima_fast.training.cells import CellStage
from optima_fast.training.config import TrainConfig

T = TypeVar("T")


class Step(nn.Module):
    """All that is trained, and its loss.

    Args:
        config: resolved settings.
        data: the task.
        student: the model that learns.
        distiller: compares it with its teacher; None without one.
        cells: the first stage of a teacher's own training.
        balance: what makes the total of the distiller's terms instead of their weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TaskData,
        student: TaskModel,
        distiller: Distiller | None,
        cells: CellStage,
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self._config, self._data = config, data
        self.student, self.distiller, self.cells = student, distiller, cells
        self.balance = balance

    def forward(
        self, step: int, batch: dict[str, Tensor], arm: Arm, shares: Shares | None
    ) -> StepLosses:
        """Losses of a batch, or what a part of one adds to them; see :class:`Distiller`.

        The total alone has a gradient.
        """
        if self.cells.active(step):
            items = 1.0 if shares is None else shares.modules["image"].items
            return _alone(items * self.cells(self.student, batch))
        if self.distiller is None:
            logits = self.student(batch).logits
            assert logits is not None
            share = 1.0 if shares is None else shares.prediction
            return _alone(share * self._data.loss(logits, batch).float())
        losses: StepLosses = self.distiller(
            batch, arm, predict=self._data.loss, divergence=self._divergence, shares=shares
        )
        total = losses.total if self.balance is None else self.balance(losses)
        return losses.terms(Tensor.detach)._replace(total=total)

    def shares_of(self, batch: dict[str, Tensor]) -> Shares:
        """How much of each kind a batch on the CPU holds."""
        extents = {name: Extent.of(mask) for name, mask in self.student.tokens(batch).items()}
        predicted, compared = self._data.counted(batch)
        return Shares(predicted, compared, extents)

    def during(self, body: Callable[[], T]) -> T:
        """Call ``body``; a method of this module, so that FSDP sees that it is in use."""
        return body()

    def _divergence(self, student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if self._config.soft_labels == "bce":
            return soft_bce(student, teacher)
        return self._data.divergence(student, teacher, batch)


def added(parts: Sequence[StepLosses]) -> StepLosses:
    """The losses of a whole batch, of what its parts add to them."""
    if len(parts) == 1:
        return parts[0]
    first, *others = parts
    for other in others:
        first = first.terms(torch.add, other)
    return first


def _alone(loss: Tensor) -> StepLosses:
    return StepLosses(loss, loss.detach(), None, None, None, ())
