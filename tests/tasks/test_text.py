"""Words, ids and back."""

import json

import pytest
import torch

from optima_fast.errors import UserError
from optima_fast.tasks.text import SPECIALS, Vocabulary, tokenize

TEXTS = ["A bright three, a five.", "a three and a four", "it's a five"]


@pytest.fixture
def vocabulary():
    return Vocabulary.build(TEXTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What's the LARGEST digit?", ["what's", "the", "largest", "digit"]),
        ("two-digit 42, 'quoted'", ["two", "digit", "42", "quoted"]),
        ("caf\u00e9 \u00c9COLE", ["caf\u00e9", "\u00e9cole"]),
        (" ?! ", []),
    ],
)
def test_tokenize(text, words):
    assert tokenize(text) == words


def test_frequent_words_come_first_and_ties_by_name(vocabulary):
    assert vocabulary.words == (
        *SPECIALS, "a", "five", "three", "and", "bright", "four", "it's"
    )  # fmt: skip


def test_build_limits():
    assert Vocabulary.build(TEXTS, min_count=2).words[4:] == ("a", "five", "three")
    assert Vocabulary.build(TEXTS, max_size=6).words[4:] == ("a", "five")


def test_encode_has_marks_padding_and_unknown_words(vocabulary):
    assert vocabulary.encode("a three seven", 7) == [1, 4, 6, 3, 2, 0, 0]
    assert (vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (
        0, 1, 2, 3,
    )  # fmt: skip


def test_a_long_text_keeps_its_first_words_and_its_end(vocabulary):
    assert vocabulary.encode("a three and a four", 5) == [1, 4, 6, 7, 2]
    assert vocabulary.encode("a three and", 5) == [1, 4, 6, 7, 2]


def test_decode_undoes_encode(vocabulary):
    for text in TEXTS:
        assert vocabulary.decode(vocabulary.encode(text, 12)) == " ".join(tokenize(text))


def test_decode_stops_at_the_first_end(vocabulary):
    assert vocabulary.decode(torch.tensor([1, 4, 0, 6, 2, 5, 5])) == "a three"


def test_encode_all_matches_encode(vocabulary):
    table = vocabulary.encode_all([*TEXTS, TEXTS[0]], 8)
    assert table.dtype == torch.int64
    assert table.tolist() == [vocabulary.encode(text, 8) for text in [*TEXTS, TEXTS[0]]]
    assert vocabulary.encode_all([], 8).shape == (0, 8)


def test_dict_survives_json(vocabulary):
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert again.encode("a bright four", 8) == vocabulary.encode("a bright four", 8)
    assert again != Vocabulary.build(TEXTS, min_count=2)


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        {"kind": "bytes", "words": ["a"]},
        {"kind": "word", "words": "abc"},
        {"kind": "word", "words": ["a", 3]},
        {"kind": "word", "words": ["a", "a"]},
        {"kind": "word", "words": ["<pad>"]},
    ],
)
def test_a_damaged_dict_is_a_user_error(state):
    with pytest.raises(UserError, match="vocabulary"):
        Vocabulary.from_dict(state)


def test_errors(vocabulary):
    with pytest.raises(ValueError, match=r"length must be at least 3 .*, got 2"):
        vocabulary.encode("a", 2)
    with pytest.raises(ValueError, match=r"ids must be in 0 \.\. 10, got 11"):
        vocabulary.decode([1, 11])
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        Vocabulary.build(TEXTS, min_count=0)
    with pytest.raises(ValueError, match="max_size must be above 4"):
        Vocabulary.build(TEXTS, max_size=4)
    with pytest.raises(ValueError, match="no word occurs"):
        Vocabulary.build([" ?", ""])
    with pytest.raises(ValueError, match=r"words must be distinct.*got \['a'\]"):
        Vocabulary(["a", "b", "a"])
