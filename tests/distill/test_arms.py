"""Arms: the subsets, their fixed order, their names."""

from __future__ import annotations

import pytest

from optima_fast.distill import arm_name, arms, parse_arm
from optima_fast.errors import UserError

MODULES = ["image", "text", "multimodal"]


def test_the_seven_arms_stand_in_their_documented_order():
    assert [arm_name(a) for a in arms(MODULES)] == [
        "image",
        "text",
        "multimodal",
        "image+text",
        "image+multimodal",
        "text+multimodal",
        "image+text+multimodal",
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_every_non_empty_subset_is_there_once(count):
    names = [f"m{i}" for i in range(count)]
    found = arms(names)
    assert len(found) == 2**count - 1
    assert len({frozenset(a) for a in found}) == len(found)
    assert all(a for a in found)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "1 to 12 names, got 0"),
        ([f"m{i}" for i in range(13)], "1 to 12 names, got 13"),
        (["a", "a"], "distinct, got"),
        (["a+b"], r"without '\+', got 'a\+b'"),
        ([""], "non-empty string"),
        ([3], "got 3"),
    ],
)
def test_unusable_names_are_refused(modules, message):
    with pytest.raises(ValueError, match=message):
        arms(modules)


def test_a_bare_string_is_not_taken_for_its_letters():
    with pytest.raises(TypeError, match="got the string 'image'"):
        arms("image")


def test_an_arm_is_read_back_from_its_name_in_any_order():
    for arm in arms(MODULES):
        assert parse_arm(arm_name(arm), MODULES) == arm
    assert parse_arm("multimodal + image", MODULES) == ("image", "multimodal")
    assert arm_name(()) == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no module; choose from image, text, multimodal"),
        ("+", "names no module"),
        ("imag", "no module 'imag'; did you mean 'image'"),
        ("image+audio", "no module 'audio'; choose from"),
    ],
)
def test_a_wrong_arm_is_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_arm(text, MODULES)
