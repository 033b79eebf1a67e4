"""Which teacher layer each student layer learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from optima_fast.distill.protocols import Record
from optima_fast.errors import UserError
from optima_fast.taps.records import Layer

Matched = tuple[Layer, Layer]  # a student's and its teacher's


class LayerPair(NamedTuple):
    """One student layer and the teacher layer it learns from, both 0-based."""

    module: str
    student: int
    teacher: int

    @property
    def key(self) -> str:
        """What its parameters and state are called."""
        return f"{self.module}_{self.student}"

    def __str__(self) -> str:
        return f"{self.module} layer {self.student + 1} from teacher layer {self.teacher + 1}"


def match_layers(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs of 0-based layer indices (student, teacher).

    Counting from 1, student layer ``i`` of ``S`` learns from teacher layer ``ceil(i * T / S)``
    of ``T``: the paper's ``i * r`` where the ratio is whole, the next layer up where it is not,
    and always last from last.

    Raises:
        UserError: the student has no layer, or more layers than the teacher.

    Example:
        >>> match_layers(3, 12)
        [(0, 3), (1, 7), (2, 11)]
        >>> match_layers(2, 3)
        [(0, 1), (1, 2)]
    """
    if student_layers < 1:
        raise UserError(f"a student needs at least one layer, got {student_layers}")
    if student_layers > teacher_layers:
        raise UserError(
            f"the student is deeper than its teacher ({student_layers} layers against "
            f"{teacher_layers}): take a smaller student or a larger teacher"
        )
    return [
        (i - 1, -(-i * teacher_layers // student_layers) - 1) for i in range(1, student_layers + 1)
    ]


def given_layers(
    name: str, layers: Sequence[int], students: int, teachers: int
) -> list[tuple[int, int]]:
    chosen = list(layers)
    if len(chosen) != students or not all(0 <= i < teachers for i in chosen):
        raise UserError(
            f"teacher_layers[{name!r}] must be {students} layers from 0 to {teachers - 1}, one for "
            f"each of the student's, got {chosen}"
        )
    if chosen != sorted(chosen):
        raise UserError(f"teacher_layers[{name!r}] must not go back, got {chosen}")
    return list(enumerate(chosen))


def matched(pairs: Sequence[LayerPair], student: Record, teacher: Record) -> list[Matched]:
    """The records of each pair: both models' are of the first matched layers, in their order."""
    names = {pair.module for pair in pairs}
    of = {name: (student.layers(name), teacher.layers(name)) for name in names}
    return [(of[p.module][0][p.student], of[p.module][1][p.student]) for p in pairs]
