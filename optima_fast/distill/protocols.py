"""What a :class:`Distiller` asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from optima_fast.taps.records import Layer

Batch = Mapping[str, Tensor]


class Record(Protocol):
    """What a model returns: its output, and the records of the layers asked for."""

    @property
    def logits(self) -> Any: ...

    def layers(self, module: str) -> Sequence[Layer]: ...


class Distillable(Protocol):
    """What a :class:`Distiller` needs of a student or a teacher.

    ``optima_fast.models.TaskModel`` is one; :meth:`Distiller.from_models` makes one of any model.
    A request is a mapping from the name of a module to 0-based layers, ascending.
    """

    @property
    def layer_counts(self) -> Mapping[str, int]: ...
    @property
    def widths(self) -> Mapping[str, int]: ...
    @property
    def __call__(self) -> Callable[..., Any]: ...

    def record(
        self, batch: Batch, taps: Mapping[str, Sequence[int]], *, lse: bool = False
    ) -> Record: ...
