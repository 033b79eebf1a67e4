"""Which teacher layer a student layer learns from."""

from __future__ import annotations

import pytest

from optima_fast.distill import match_layers
from optima_fast.distill.matching import map_layers
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


def test_other_mappings_than_even_ones():
    students, teachers = {"image": 3, "text": 2}, {"image": 12, "text": 2}
    assert map_layers("even", students, teachers) == {"image": [3, 7, 11], "text": [0, 1]}
    assert map_layers("reversed", students, teachers) == {"image": [11, 7, 3], "text": [1, 0]}
    drawn = [map_layers("random", students, teachers, seed=seed) for seed in range(40)]
    assert drawn[0] == map_layers("random", students, teachers)
    assert {i for layers in drawn for i in layers["image"]} == set(range(12))
    assert all(len(set(layers["image"])) == 3 for layers in drawn)
    assert any(layers["image"] != sorted(layers["image"]) for layers in drawn)
    assert {tuple(layers["text"]) for layers in drawn} == {(0, 1), (1, 0)}


def test_a_mapping_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="unknown layer mapping 'revers'; did you mean 'reversed'"):
        map_layers("revers", {"image": 1}, {"image": 1})
    with pytest.raises(UserError, match="deeper than its teacher .3 layers against 2."):
        map_layers("random", {"image": 3}, {"image": 2})
