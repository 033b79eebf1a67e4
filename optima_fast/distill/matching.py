"""Which teacher layer each student layer learns from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optima_fast.distill.protocols import Record
from optima_fast.errors import UserError, unknown
from optima_fast.taps.records import Layer

Matched = tuple[Layer, Layer]  # a student's and its teacher's

MAPPINGS = ("even", "reversed", "random")


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


def map_layers(
    mapping: str, students: Mapping[str, int], teachers: Mapping[str, int], *, seed: int = 0
) -> dict[str, list[int]]:
    """By module the 0-based teacher layer that each student layer learns from.

    Args:
        mapping: ``"even"`` is :func:`match_layers`; ``"reversed"`` has the same layers of the
            teacher, the last one first; ``"random"`` has any, each at most once and in any order.
        students: number of layers of the student's modules.
        teachers: of the teacher's.
        seed: of ``"random"``; each module draws for itself.

    Example:
        >>> map_layers("reversed", {"image": 3}, {"image": 12})
        {'image': [11, 7, 3]}
    """
    if mapping not in MAPPINGS:
        raise unknown("layer mapping", mapping, MAPPINGS)
    layers = {}
    for name, count in students.items():
        even = [teacher for _, teacher in match_layers(count, teachers[name])]
        drawn = random.Random(f"{name} {seed}").sample(range(teachers[name]), count)
        layers[name] = {"even": even, "reversed": even[::-1], "random": drawn}[mapping]
    return layers


def given_layers(
    name: str, layers: Sequence[int], students: int, teachers: int
) -> list[tuple[int, int]]:
    """Pairs of a mapping that was given; it may repeat a layer and go back.

    Raises:
        UserError: not one layer of the teacher for each of the student.
    """
    chosen = list(layers)
    if len(chosen) != students or not all(0 <= i < teachers for i in chosen):
        raise UserError(
            f"teacher_layers[{name!r}] must be {students} layers from 0 to {teachers - 1}, one for "
            f"each of the student's, got {chosen}"
        )
    return list(enumerate(chosen))


def matched(pairs: Sequence[LayerPair], student: Record, teacher: Record) -> list[Matched]:
    """The records of each pair: both models' are of the first pairs, in the pairs' order."""
    names = {pair.module for pair in pairs}
    of = {name: (student.layers(name), teacher.layers(name)) for name in names}
    return [(of[p.module][0][p.student], of[p.module][1][p.student]) for p in pairs]
