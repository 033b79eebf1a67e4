"""NLVR2: sentences about two canvases, pairs in batches, balance given the sentence."""

from collections import Counter, defaultdict

import pytest
import torch

from optima_fast import tasks
from optima_fast.tasks import canvases as c
from optima_fast.tasks import digits_language as language
from optima_fast.tasks.nlvr2 import CLASSES


@pytest.fixture(scope="module")
def data():
    return tasks.load("nlvr2", seed=3, train_images=6000, validation_images=50, test_images=1500)


@pytest.fixture(scope="module")
def baselines(data):
    return data.baselines()


def truth(text, left, right):
    """A sentence read word by word, about two lists of digits; None where it does not apply."""
    words = text.split()
    if "largest" in words or "smallest" in words:
        one, other = (max(left), max(right)) if "largest" in words else (-min(left), -min(right))
        return None if one == other else one > other
    if "total" in words:
        return len(left) + len(right) >= language.WORDS.index(words[2])
    if "more" in words or "fewer" in words:
        return None if len(left) == len(right) else len(left) > len(right)
    return all(any(d % 2 == ("odd" in words) for d in part) for part in (left, right))


def test_sentences_mean_what_they_say():
    left, right = (c.compose(300, "train", c.generator(seed)) for seed in (1, 2))
    for claim in language.SENTENCES:
        labels = claim.label(left, right)
        for text in claim.wordings:
            for row in range(300):
                a, b = (part.digit[row][part.digit[row] < 10].tolist() for part in (left, right))
                expected = truth(text, a, b)
                assert labels[row] == (-1 if expected is None else expected), (text, a, b)


def test_labels_in_the_data_are_true_of_the_images(data):
    for start in range(0, 400, 40):
        batch = data.train.batch(range(start, start + 40))
        cells = batch["cells"][batch["pair_image"]].view(40, 2, 4)
        assert torch.equal(batch["pair_text"], torch.arange(40).repeat_interleave(2))
        for text, target, (left, right) in zip(
            batch["text"], batch["target"].tolist(), cells.tolist(), strict=True
        ):
            a, b = ([d for d in part if d < 10] for part in (left, right))
            assert truth(data.tokenizer.decode(text), a, b) == (CLASSES[target] == "true")


def test_an_image_is_in_one_pair_only(data):
    pairs = data.train.image_index[:: data.train.group]
    assert pairs.unique().numel() == pairs.numel()
    assert torch.equal(data.train.image_index, pairs.repeat_interleave(data.train.group, 0))


def test_each_sentence_is_true_half_of_the_time(data):
    counts = defaultdict(Counter)
    for text, label in zip(data.train.text.tolist(), data.train.target.tolist(), strict=True):
        counts[tuple(text)][label] += 1
    assert len(counts) >= 12
    for counter in counts.values():
        total = sum(counter.values())
        assert total > 40
        assert abs(counter[1] / total - 0.5) < 0.12
    assert float(data.train.target.float().mean()) == pytest.approx(0.5, abs=0.01)


def test_baselines_are_at_chance(baselines):
    assert baselines["majority"] == pytest.approx(0.5, abs=0.03)
    assert baselines["text_only"] == pytest.approx(0.5, abs=0.05)


def test_head_and_classes(data):
    assert (data.head, data.num_classes, data.metric_name) == ("pair", 2, "accuracy")


def test_odd_numbers_of_canvases_leave_one_out():
    odd = tasks.load("nlvr2", train_images=41, validation_images=20, test_images=20)
    assert int(odd.train.image_index.max()) <= 39


def test_pairs_of_which_too_little_can_be_said_are_left_out():
    few = tasks.load(
        "nlvr2", train_images=200, validation_images=60, test_images=60,
        kinds=("more",), texts_per_image=1,
    )  # fmt: skip
    assert 60 < len(few.train) < 100
    batch = few.train.batch(range(len(few.train)))
    count = (batch["cells"] < 10).sum(1)[batch["pair_image"]].view(-1, 2)
    assert torch.equal(batch["target"], (count[:, 0] > count[:, 1]).long())
    assert (count[:, 0] != count[:, 1]).all()
