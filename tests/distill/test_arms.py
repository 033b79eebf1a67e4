"""Arms: the subsets, their fixed order, their names."""

from __future__ import annotations

import pytest

from optima_fast.distill import arm_name, arm_space, arms, group_arms, parse_arm
from optima_fast.distill.arms import ARM_SPACES, arm_layers, layer_units
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
        ("imag", "unknown module 'imag'; did you mean 'image'"),
        ("image+audio", "unknown module 'audio'; choose from"),
        ("image[0]", r"layers of image must be from 1 to 6, .*, got 'image\[0\]'"),
        ("image[2-7]", "from 1 to 6"),
        ("image[3-2]", "the first not after the last"),
        ("text+image[]", r"a member must be MODULE, MODULE\[LAYER\] or .*, got 'image\[\]'"),
        ("image[1,2]", "a member must be"),
        ("image[1]2", "a member must be"),
        ("image[9999999]", "a member must be"),
        ("[1]", "a member must be"),
        ("audio[1]", "unknown module 'audio'"),
    ],
)
def test_a_wrong_arm_is_named(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_arm(text, TINY12)
    assert str(caught.value).startswith(f"arm {text!r}")


TINY12 = {"image": 6, "text": 3, "multimodal": 3}
TINY6 = {"image": 3, "text": 2, "multimodal": 1}


@pytest.mark.parametrize(
    ("counts", "groups", "units"),
    [
        (TINY12, 1, ["image", "text", "multimodal"]),
        (
            TINY12,
            2,
            [
                "image[1-3]",
                "image[4-6]",
                "text[1]",
                "text[2-3]",
                "multimodal[1]",
                "multimodal[2-3]",
            ],
        ),
        (
            TINY6,
            3,
            ["image[1]", "image[2]", "image[3]", "text[1]", "text[2]", "multimodal"],
        ),
        ({"image": 7}, 3, ["image[1-2]", "image[3-4]", "image[5-7]"]),
        ({"image": 1}, 3, ["image"]),
    ],
)
def test_layers_are_split_into_contiguous_groups(counts, groups, units):
    assert layer_units(counts, groups) == units
    covered = [arm_layers((unit,), counts) for unit in units]
    for module, count in counts.items():
        assert [i for c in covered for i in c.get(module, [])] == list(range(count))


def test_arms_of_groups_stand_in_the_order_of_their_subsets_and_are_written_short():
    assert [arm_name(a) for a in group_arms({"image": 6, "text": 1}, 3)] == [
        "image[1-2]",
        "image[3-4]",
        "image[5-6]",
        "text",
        "image[1-4]",
        "image[1-2]+image[5-6]",
        "image[1-2]+text",
        "image[3-6]",
        "image[3-4]+text",
        "image[5-6]+text",
        "image",
        "image[1-4]+text",
        "image[1-2]+image[5-6]+text",
        "image[3-6]+text",
        "image+text",
    ]


@pytest.mark.parametrize(
    ("kind", "counts", "size"),
    [
        ("modules", TINY12, 7),
        ("layer-groups:2", TINY12, 63),
        ("layer-groups:3", TINY12, 511),
        ("layer-groups:3", TINY6, 63),
        ("layer-groups:3", {"image": 3, "text": 3, "multimodal": 2}, 255),
        ("layer-groups:2", {"image": 2, "text": 1, "multimodal": 1}, 15),
    ],
)
def test_a_space_has_distinct_arms_and_says_what_each_is_made_of(kind, counts, size):
    space = arm_space(kind, counts)
    assert len(space.arms) == len(space.features) == size
    assert len(set(space.arms)) == size
    assert {tuple(counts), ("image",), ("image", "text")} <= set(space.arms)
    for arm, row in zip(space.arms, space.features, strict=True):
        members = tuple(u for u, there in zip(space.units, row, strict=True) if there)
        assert arm_layers(arm, counts) == arm_layers(members, counts)
        assert parse_arm(arm_name(arm), counts) == arm
        assert set(row) <= {0, 1}
    assert [sum(row) for row in space.features] == sorted(sum(row) for row in space.features)
    if kind == "modules":
        assert space.arms == arms(list(counts))


def test_parts_of_modules_are_read_in_any_way_of_writing_them():
    assert parse_arm("text + image[4-6]+image[1-3]", TINY12) == ("image", "text")
    assert parse_arm("image[2]+image[1]+image[4]", TINY12) == ("image[1-2]", "image[4]")
    assert parse_arm("image[2-5]+image[3]", TINY12) == ("image[2-5]",)
    assert parse_arm("text[1]", {"text": 1}) == ("text",)
    # before the number of layers is known
    assert parse_arm("text[2]+image+image[7]", MODULES) == ("image", "text[2]")
    assert arm_layers(("text[2-3]", "image"), {"image": 2, "text": 3}) == {
        "text": [1, 2],
        "image": [0, 1],
    }


@pytest.mark.parametrize(
    ("kind", "counts", "message"),
    [
        ("layers", TINY12, f"arms must be one of {', '.join(ARM_SPACES)}, got 'layers'"),
        ("layer-groups:4", TINY12, "got 'layer-groups:4'"),
        (
            "layer-groups:3",
            {f"m{i}": 3 for i in range(5)},
            "with 3, 3, 3, 3, 3 layers are subsets of 15 groups, more than 12: take fewer",
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused(kind, counts, message):
    with pytest.raises(UserError, match=message):
        arm_space(kind, counts)


def test_a_module_without_layers_has_no_groups():
    with pytest.raises(ValueError, match="text must have at least one layer, got 0"):
        layer_units({"text": 0}, 2)
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        layer_units(TINY12, 0)
