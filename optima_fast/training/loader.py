"""The batches of training steps, read and augmented ahead of the step that takes them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator

from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.tasks import Split, TaskData
from optima_fast.tasks.augment import RandAugment
from optima_fast.tasks.split import Loaded
from optima_fast.tasks.workers import in_order, usable_cores
from optima_fast.training import ranks
from optima_fast.training.config import TrainConfig
from optima_fast.training.rewards import training_sampler
from optima_fast.training.sampler import Sampler

TRIES = 100  # batches without a readable image before it is not a few files that are broken


def workers(config: TrainConfig) -> int:
    """How many processes read images."""
    if config.workers != "auto":
        return int(config.workers)
    return 0 if config.data == "digits" else max(1, usable_cores() // ranks.beside() - 1)


def batches(
    config: TrainConfig, split: Split, sampler: Sampler, first: int
) -> Generator[Loaded, None, None]:
    """This process's parts of the batches of the steps ``first``, ``first + 1``, ... to the last.

    There are ``config.accumulate`` of them a step. Each is a function of the settings, the number
    of processes and its step alone, however many workers there are and wherever a run began or went
    on.

    Args:
        config: resolved settings.
        split: what is trained on.
        sampler: which examples a step sees.
        first: 0-based step.

    Raises:
        UserError: an image cannot be read, and ``--image-errors`` is fail.
    """
    assert config.steps
    augment = RandAugment.parse(config.augment or "none", config.seed)
    if augment is not None:
        import kornia.enhance
        import kornia.geometry  # noqa: F401  (workers find it imported)

    fetch = _Fetch(split, sampler, augment, ranks.number(), ranks.count(), config.accumulate)
    parts = range(first * config.accumulate, config.steps * config.accumulate)
    return in_order(fetch, parts, workers(config))


def first_batch(config: TrainConfig, data: TaskData) -> dict[str, Tensor]:
    """The first batch that is trained on: how many images its texts share is part of its size."""
    plain = dataclasses.replace(config, augment="none", workers="0")
    return next(batches(plain, data.train, training_sampler(config, data.train), 0)).batch


class _Fetch:
    """A step's batch; where none of its images can be read, that of the next step that has one."""

    def __init__(
        self,
        split: Split,
        sampler: Sampler,
        augment: RandAugment | None,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.split, self.sampler, self.augment = split, sampler, augment
        self.rank, self.ranks, self.accumulate = rank, ranks, accumulate

    def __call__(self, number: int) -> Loaded:
        step, turn = divmod(number, self.accumulate)
        part = self.rank * self.accumulate + turn, self.ranks * self.accumulate
        augment = None if self.augment is None else functools.partial(self.augment, step)
        errors: dict[int, str] = {}
        for later in range(step, step + TRIES):
            loaded = self.split.load(self.sampler.at(later, *part), augment)
            errors |= loaded.errors
            if loaded.batch:
                return Loaded(loaded.index, loaded.batch, errors)
        raise UserError(
            f"no image of {TRIES} batches can be read: {len(errors)} files, such as: "
            f"{next(iter(errors.values()))}"
        )
