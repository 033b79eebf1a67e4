"""VQA answers: the official normal form, score and answer set."""

import json

import pytest
from official import shared

from optima_fast.tasks.vqa_answers import accepted, answer_set, normalise, score


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        (" 11:15 \n", "11:15"),
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("$5", "$5"),
        ("a/c", "c"),
        ("7-up", "7 up"),
        ("the red, white", "red white"),
        ("red,white", "red white"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("St. Louis", "st louis"),
        ("4.5", "4.5"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("man's", "man's"),
        ("yes!", "yes"),
        ("An apple", "apple"),
        ("the", ""),
        ("." * 40, "." * 8),
    ],
)
def test_normal_form(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(("same", "worth"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_score_is_the_mean_over_leave_one_out_sets(same, worth):
    # same annotators see same - 1 others agree, the others see same
    by_hand = (same * min(1, max(same - 1, 0) / 3) + (10 - same) * min(1, same / 3)) / 10
    assert by_hand == pytest.approx(worth)
    answers = ["cat"] * same + ["dog"] + [f"other {i}" for i in range(9 - same)]
    assert score("cat", answers) == pytest.approx(worth)


def test_unanimous_answers_are_compared_as_written():
    assert score("YES", ["yes"] * 10) == 0
    assert score("yes", ["YES"] * 10) == 0
    assert score("yes", [" yes \n"] * 5 + ["yes"] * 5) == 1
    assert score("none", ["none"] * 10) == 1
    assert score("0", ["none"] * 10) == 0


def test_differing_answers_are_compared_in_normal_form():
    answers = ["none"] * 4 + ["The Dog."] * 6
    assert score("0", answers) == score("none", answers) == score("zero", answers) == 1
    assert score("DOG", answers) == 1
    assert score("a dog", answers) == 1


def test_accepted_scores():
    scores, differ = accepted(["a cat", "cat", "two dogs"])
    assert differ
    assert scores == pytest.approx({"cat": (2 * 1 / 3 + 2 / 3) / 3, "2 dogs": (2 * 1 / 3) / 3})
    with pytest.raises(ValueError, match="at least one annotator's answer, got none"):
        accepted([])


def test_answer_set_by_frequency_then_name():
    questions = [["red"] * 10, ["Red"] * 9 + ["blue"], ["none"] * 10, ["b"] * 10, ["the"] * 10]
    assert answer_set(questions, 9) == ("red", "b", "none", "the")
    assert answer_set(questions, 2) == ("red", "b")
    assert answer_set([["the"] * 9 + ["an"]], 9) == ()


def test_golden_normal_forms():
    golden = json.loads(shared("golden", "vqa_answer_normalisation.json").read_text())
    wrong = {raw: normalise(raw) for raw, normal in golden.items() if normalise(raw) != normal}
    assert len(golden) == 3000
    assert wrong == {}
