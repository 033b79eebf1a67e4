"""A first stage for image encoders on the built-in data: name the digit in each cell."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.models.task_model import TaskModel
from optima_fast.tasks import TaskData
from optima_fast.tasks.digits import CELL_CLASSES
from optima_fast.training.config import TrainConfig


class CellStage(nn.Module):
    """For the first ``config.cell_stage`` of all steps, train the image encoder alone.

    The loss is the cross-entropy of a linear head that reads the tokens of each of the 2x2 cells
    (after the last layer) and names the digit there, or none. Without it a teacher that starts
    from random weights stays on a plateau for longer than the whole run; real teachers are
    pre-trained and need no such stage.
    """

    def __init__(self, config: TrainConfig, data: TaskData, student: TaskModel) -> None:
        super().__init__()
        assert config.steps is not None
        self._steps = round(config.steps * config.cell_stage)
        self._layer = student.layer_counts["image"] - 1
        if self._steps:
            side = student.coca.config.image_size // student.coca.config.patch_size
            self._half = side // 2
            width = student.widths["image"]
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(self._half**2 * width, CELL_CLASSES)

    def active(self, step: int) -> bool:
        return step < self._steps

    def forward(self, student: TaskModel, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, mean over images and cells."""
        tap = student.record(batch, {"image": [self._layer]}).taps["image"][0]
        h = self._half
        # [I, 2h * 2h, d] -> [I, 4 cells, h * h * d]; a class token, if any, comes first
        tokens = self.norm(tap.hidden[:, -4 * h * h :])
        tokens = tokens.unflatten(1, (2, h, 2, h)).permute(0, 1, 3, 2, 4, 5)
        logits: Tensor = self.head(tokens.reshape(len(tokens), 4, -1))
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["cells"].flatten())
