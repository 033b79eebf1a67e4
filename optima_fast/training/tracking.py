"""The lines of metrics.jsonl to TensorBoard or Weights & Biases too, where a user asks for it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from optima_fast.errors import UserError
from optima_fast.training.config import TrainConfig
from optima_fast.training.run import Run


class Tracker:
    """Hands every number of a line on, by its step; one that does nothing for ``--track none``.

    TensorBoard's files are in ``tensorboard/`` of the run's folder. Weights & Biases gets a run of
    the same name whenever the run goes on; ``WANDB_MODE``, ``WANDB_PROJECT`` and the like are its
    own, and the project is ``optima_fast`` by default.

    Args:
        run: the run.
        config: its settings, which go along.
        step: the first step to come; what was sent of later ones is taken back, as far as the
            service can.
    """

    def __init__(self, run: Run, config: TrainConfig, step: int) -> None:
        self._kind = config.track
        self._sink: Any = None
        if self._kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            folder = str(run.folder / "tensorboard")
            self._sink = SummaryWriter(folder, purge_step=step)
        elif self._kind == "wandb":
            wandb: Any = importlib.import_module("wandb")
            where = str(run.folder.resolve())
            self._sink = wandb.init(
                project=wandb.env.get_project() or "optima_fast",
                dir=where,
                name=run.folder.name,
                id=hashlib.sha256(where.encode()).hexdigest()[:16],
                resume="allow",
                config=dataclasses.asdict(config),
            )

    def add(self, line: Mapping[str, Any]) -> None:
        """Hand on a line of metrics."""
        if self._sink is None:
            return
        numbers = dict(_numbers(line))
        step = int(numbers.pop("step"))
        if self._kind == "wandb":
            self._sink.log(numbers, step=step)
            return
        for name, value in numbers.items():
            self._sink.add_scalar(name, value, step)

    def close(self) -> None:
        """Send what is left."""
        if self._sink is not None:
            self._sink.finish() if self._kind == "wandb" else self._sink.close()


def check(config: TrainConfig) -> None:
    """Raise unless what ``--track`` names is installed.

    Raises:
        UserError: it is not.
    """
    name = config.track  # the package's too
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name}: the package {name} is not installed: pip install {name}")


def _numbers(line: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a line, by its path: ``hidden/image``."""
    for name, value in line.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}/")
        elif isinstance(value, list):
            yield from _numbers({str(i): item for i, item in enumerate(value)}, f"{path}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield path, value
