"""Which teacher layer a student layer learns from."""

from __future__ import annotations

import pytest

from optima_fast.distill import match_layers
from optima_fast.errors import UserError


@pytest.mark.parametrize(
    ("student", "teacher", "from_one"),
    [
        (6, 24, [4, 8, 12, 16, 20, 24]),
        (3, 12, [4, 8, 12]),
        (3, 24, [8, 16, 24]),
        (2, 12, [6, 12]),
        (1, 12, [12]),
        (2, 3, [2, 3]),  # the ratio 1.5 of a two-stage run, rounded up
        (4, 4, [1, 2, 3, 4]),
    ],
)
def test_student_layer_i_learns_from_layer_i_times_the_ratio(student, teacher, from_one):
    pairs = match_layers(student, teacher)
    assert [s + 1 for s, _ in pairs] == list(range(1, student + 1))
    assert [t + 1 for _, t in pairs] == from_one


def test_layers_ascend_and_the_last_learns_from_the_last():
    for teacher in range(1, 30):
        for student in range(1, teacher + 1):
            matched = [t for _, t in match_layers(student, teacher)]
            assert matched == sorted(set(matched))
            assert matched[-1] == teacher - 1


def test_a_student_deeper_than_its_teacher_is_refused():
    with pytest.raises(UserError, match="deeper than its teacher .5 layers against 4."):
        match_layers(5, 4)
    with pytest.raises(UserError, match="at least one layer, got 0"):
        match_layers(0, 4)
