"""SNLI-VE: verdicts under covers, balance given the text, loss and baselines."""

from collections import Counter, defaultdict
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from optima_fast import tasks
from optima_fast.tasks import canvases as c
from optima_fast.tasks import digits_language as language
from optima_fast.tasks.snli_ve import CLASSES

SIZES = {"train_images": 3000, "validation_images": 50, "test_images": 600}


@pytest.fixture(scope="module")
def data():
    return tasks.load("snli_ve", seed=2, **SIZES)


@pytest.fixture(scope="module")
def baselines(data):
    return data.baselines()


def test_class_order():
    assert (language.ENTAILMENT, language.NEUTRAL, language.CONTRADICTION) == (0, 1, 2)
    assert CLASSES == ("entailment", "neutral", "contradiction")


def truth(text, cells):
    """A statement read word by word, true or false of fully known cells (None = empty)."""
    own = [d for d in cells if d is not None]
    words = text.split()
    if "at least" in text:
        return len(own) >= language.WORDS.index(words[4])
    if "above" in text:
        return any(d > language.WORDS.index(words[-1]) for d in own) == (words[0] == "some")
    if "below" in text:
        return any(d < language.WORDS.index(words[-1]) for d in own) == (words[0] == "some")
    odd = "odd" in words
    if words[0] in ("every", "all"):
        return all(d % 2 == odd for d in own)
    return any(d % 2 == odd for d in own)


def test_verdicts_equal_those_over_all_that_covers_may_hide():
    drawn = c.compose(150, "train", c.generator(1), covers=(0, 1, 2))
    for claim in language.STATEMENTS:
        labels = claim.label(drawn)
        for row in range(len(drawn)):
            visible = [None if d == c.EMPTY else int(d) for d in drawn.digit[row]]
            hidden = [*range(10), None]
            options = [hidden if drawn.covered[row, i] else [visible[i]] for i in range(4)]
            results = {truth(claim.wordings[0], cells) for cells in product(*options)}
            expected = {(True,): 0, (False,): 2, (False, True): 1}[tuple(sorted(results))]
            assert labels[row] == expected, (claim.wordings, visible, drawn.covered[row])


def test_wordings_of_a_claim_mean_the_same():
    for claim in language.STATEMENTS:
        for cells in ([1, 2, None, 4], [None, 8, 8, 2], [5, 7, 1, 9], [None, None, None, 3]):
            assert len({truth(text, cells) for text in claim.wordings}) == 1


def test_each_text_has_each_label_equally_often(data):
    counts = defaultdict(Counter)
    for text, label in zip(data.train.text.tolist(), data.train.target.tolist(), strict=True):
        counts[tuple(text)][label] += 1
    assert len(counts) >= 10
    for counter in counts.values():
        total = sum(counter.values())
        assert total > 50
        assert max(abs(counter[k] / total - 1 / 3) for k in range(3)) < 0.08
    claims = Counter(data.train.target.tolist())
    assert max(claims.values()) - min(claims.values()) < 0.01 * len(data.train)


def test_deal_balances_and_never_repeats_a_text_in_a_row():
    rng = c.generator(3)
    labels = np.where(rng.integers(0, 10, (2000, 6)) < 2, 0, 1)
    labels[:, 5] = -1
    chosen = language.deal(labels, 2, 2, rng)
    assert chosen.shape == (2000, 2)
    assert (chosen != 5).all()
    assert (chosen[:, 0] != chosen[:, 1]).all()
    label = np.take_along_axis(labels, chosen, axis=1)
    shares = [label[chosen == text].mean() for text in range(5)]
    # twenty per cent zeros among the choices of five: two of them cannot be quite even
    assert max(shares) - min(shares) < 0.02
    assert np.mean(shares) < 0.65


def test_a_cover_alone_does_not_make_a_statement_neutral(data):
    covered = data.train.images.levels[:, 0].view(-1, 2, 12, 2, 12).double().mean((2, 4)) - 128
    covered = (covered.abs() < 6).flatten(1).any(1)[data.train.image_index[:, 0]]
    neutral = data.train.target == language.NEUTRAL
    assert not neutral[~covered].any()
    assert 0.3 < float(neutral[covered].double().mean()) < 0.7


def test_an_image_alone_does_not_give_the_label_away(data):
    """The same canvas meets statements of different labels."""
    labels = data.train.target.view(-1, data.train.group)
    assert (labels != labels[:, :1]).any(1).float().mean() > 0.8


def test_baselines_are_at_chance(baselines):
    assert baselines["majority"] == pytest.approx(1 / 3, abs=0.03)
    assert baselines["text_only"] == pytest.approx(1 / 3, abs=0.04)


def test_loss_by_hand(data):
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]])
    log_p = logits.double().log_softmax(-1)
    expected = -(log_p[0, 2] + log_p[1, 0]) / 2
    batch = {"target": torch.tensor([2, 0])}
    assert float(data.loss(logits, batch)) == pytest.approx(float(expected), rel=1e-6)
    assert data.loss(logits.bfloat16(), batch).dtype == torch.float32


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, batch):
        return SimpleNamespace(logits=self.logits(batch["target"]))


def test_oracle_and_constant(data, baselines):
    def oracle(target):
        return nn.functional.one_hot(target, 3).float()

    assert data.evaluate(Fixed(oracle), data.test, batch_size=500)["accuracy"] == 1
    common = int(data.train.target.bincount().argmax())
    constant = data.evaluate(
        Fixed(lambda target: oracle(torch.full_like(target, common))), data.test, batch_size=500
    )
    assert constant["accuracy"] == pytest.approx(baselines["majority"], abs=1e-6)
