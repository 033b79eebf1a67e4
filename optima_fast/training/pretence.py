"""Models and batches that have shapes and no memory, to meet a step before it is taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from optima_fast.models import CoCaConfig
from optima_fast.models.task_model import TaskModel, build
from optima_fast.tasks import TaskData


@contextlib.contextmanager
def pretended(
    data: TaskData,
    batch: Mapping[str, Tensor],
    *configs: CoCaConfig,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[list[TaskModel], dict[str, Tensor]]]:
    """The task's models of these shapes and a batch like the given one, valid inside.

    No random number of the process is drawn.

    Args:
        data: the task, for its head.
        batch: of which only shapes and dtypes count.
        configs: the shape of each model.
        device: where they pretend to be.
    """
    with torch.random.fork_rng(devices=[]), FakeTensorMode(), torch.device(device):
        models = [build(config, data.head, data.num_classes) for config in configs]
        shapes = {name: torch.empty(v.shape, dtype=v.dtype) for name, v in batch.items()}
        yield models, shapes


def loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """A scalar of the logits; tasks' own losses depend on what is in a batch."""
    return logits.float().mean()


def divergence(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """A scalar of both logits."""
    return (student.float() - teacher.float()).mean()
