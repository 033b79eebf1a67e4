"""Which teacher layer each student layer learns from."""

from __future__ import annotations

from optima_fast.errors import UserError


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
