"""Which examples each step sees: a function of the seed and the step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.tasks import Split


class Sampler:
    """Shuffles the runs of examples that show the same image, anew for each epoch.

    It has no position to save: :meth:`at` gives any step's examples directly, so a resumed run
    sees what the uninterrupted one would have.

    Args:
        split: what to draw from; ``split.group`` neighbours share their images and stay together.
        batch_size: runs per step.
        seed: of the order.
        without: bool [runs], those never drawn; default none.

    Raises:
        UserError: the split holds fewer runs than one batch.
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int, *, without: Tensor | None = None
    ) -> None:
        self._group = split.group
        drawn = np.ones(len(split) // split.group, dtype=bool)
        if without is not None:
            drawn &= ~without.numpy()
        self._drawn = np.flatnonzero(drawn)
        if batch_size > len(self._drawn):
            what = "images" if split.group > 1 else "examples"
            kept = " that are not held out" if without is not None else ""
            raise UserError(
                f"--batch-size {batch_size} is more than the {len(self._drawn)} {what} of the "
                f"{split.name} split{kept}: lower it"
            )
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def size(self, part: int, parts: int) -> int:
        """Number of examples in a part of a step."""
        return self._group * (self._batch_size // parts + (part < self._batch_size % parts))

    def at(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Indices of the examples of 0-based ``step``, int64; or of one of its parts.

        Parts differ in size by one run at most, the larger first.
        """
        per_epoch = len(self._drawn) // self._batch_size
        epoch, position = divmod(step, per_epoch)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._order = self._drawn[generator.permutation(len(self._drawn))]
            self._epoch = epoch
        runs = self._order[position * self._batch_size : (position + 1) * self._batch_size]
        runs = np.array_split(runs, parts)[part]
        examples = runs[:, None] * self._group + np.arange(self._group)
        return torch.from_numpy(examples.reshape(-1).astype(np.int64))
