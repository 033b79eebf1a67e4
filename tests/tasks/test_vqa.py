"""VQA: questions and their answers, soft scores, loss, metric and baselines."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from optima_fast import tasks
from optima_fast.tasks import canvases as c
from optima_fast.tasks import digits_language as language
from optima_fast.tasks.vqa import soft_scores


class Fixed(nn.Module):
    """A model whose logits are a function of the batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, batch):
        assert not self.training
        assert not torch.is_grad_enabled()
        return SimpleNamespace(logits=self.logits(batch))


@pytest.fixture(scope="module")
def data():
    return tasks.load("vqa", seed=1, train_images=1500, validation_images=50, test_images=500)


@pytest.fixture(scope="module")
def baselines(data):
    return data.baselines()


def test_three_annotators_make_an_answer_right():
    scores = soft_scores([[0, 1, 2, 3, 4, 10]])
    assert scores.dtype == torch.float32
    assert scores[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])


def test_answers_are_right():
    drawn = c.compose(300, "train", c.generator(1))
    kinds = tuple(language.QUESTIONS)
    named, texts, votes = language.questions(drawn, kinds, 3, 0.0, c.generator(2))
    assert votes.sum(1).tolist() == [10] * 900
    for i, (kind, text, vote) in enumerate(zip(named, texts, votes, strict=True)):
        digit, tone = drawn.digit[i // 3], drawn.tone[i // 3]
        own = sorted(digit[digit < 10])
        bright = digit[np.argmax(tone)]
        right = {
            "count": str(len(own)),
            "largest": str(own[-1]),
            "smallest": str(own[0]),
            "brightest": str(bright),
            "parity": "odd" if bright % 2 else "even",
        }[kind]
        assert vote[language.ANSWERS.index(right)] == 10
        assert text in language.QUESTIONS[kind].wordings


def test_the_questions_about_a_canvas_are_of_different_kinds(data):
    kinds = np.array(data.train.kinds).reshape(-1, data.train.group)
    assert all(len(set(row)) == len(row) for row in kinds)
    assert set(kinds.reshape(-1)) == set(language.QUESTIONS)


def test_annotators_err_as_often_as_asked():
    drawn = c.compose(2000, "train", c.generator(1))
    _, _, votes = language.questions(drawn, ("largest",), 1, 0.2, c.generator(2))
    right = votes[np.arange(2000), drawn.largest]
    assert votes.sum(1).tolist() == [10] * 2000
    assert right.mean() / 10 == pytest.approx(1 - 0.2 * 0.9, abs=0.01)
    _, _, votes = language.questions(drawn, ("parity",), 1, 1.0, c.generator(2))
    assert votes[:, :10].sum() == 0
    assert votes[:, 10].mean() == pytest.approx(5, abs=0.2)


def test_loss_by_hand(data):
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]])
    target = torch.tensor([[1.0, 1 / 3, 0.0], [0.0, 0.0, 1.0]])
    log_p = logits.double().log_softmax(-1)
    expected = -(0.75 * log_p[0, 0] + 0.25 * log_p[0, 1] + log_p[1, 2]) / 2
    assert float(data.loss(logits, {"target": target})) == pytest.approx(float(expected), rel=1e-6)
    with_none = {"target": torch.cat([target, torch.zeros(1, 3)])}
    more = torch.cat([logits, torch.tensor([[9.0, 0.0, 0.0]])])
    assert float(data.loss(more, with_none)) == pytest.approx(float(expected), rel=1e-6)
    assert float(data.loss(logits, {"target": torch.zeros(2, 3)})) == 0
    assert data.loss(logits.bfloat16(), {"target": target}).dtype == torch.float32


def test_divergence_is_the_mean_over_questions(data):
    student, teacher = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    batch = data.train.batch(range(4))
    expected = nn.functional.kl_div(
        student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean"
    )
    got = data.divergence(student, teacher, batch)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    assert float(data.divergence(teacher, teacher, batch)) == 0


def test_oracle_and_constant(data, baselines):
    oracle = data.evaluate(Fixed(lambda b: b["target"]), data.test, batch_size=300)
    assert oracle["accuracy"] == 1
    assert {name for name in oracle if "/" in name} == {f"accuracy/{k}" for k in language.QUESTIONS}
    best = int(data.train.target.sum(0).argmax())
    row = torch.eye(data.num_classes)[best]
    constant = data.evaluate(
        Fixed(lambda b: row.expand(len(b["text"]), -1)), data.test, batch_size=300
    )
    assert constant["accuracy"] == pytest.approx(baselines["majority"], abs=1e-6)


def test_accuracy_is_soft_and_weighs_kinds_by_their_examples(data):
    def second(batch):
        return -batch["target"] + (batch["target"] > 0) * 10.0

    split = data.test
    positive = split.target.masked_fill(split.target == 0, 2.0)
    expected = split.target.gather(1, positive.argmin(1, keepdim=True)).double()[:, 0]
    result = data.evaluate(Fixed(second), split, batch_size=77)
    assert result["accuracy"] == pytest.approx(float(expected.mean()), abs=1e-9)
    chosen = torch.tensor([kind == "largest" for kind in split.kinds])
    assert result["accuracy/largest"] == pytest.approx(float(expected[chosen].mean()), abs=1e-9)


def test_loss_of_an_evaluation_is_the_mean_over_examples(data):
    model = Fixed(lambda b: b["target"] * 3)
    whole = data.loss(data.test.target * 3, {"target": data.test.target})
    result = data.evaluate(model, data.test, batch_size=999)
    assert result["loss"] == pytest.approx(float(whole), rel=1e-5)
    assert model.training


def test_text_alone_is_far_from_enough(baselines):
    assert 0.05 < baselines["majority"] < 0.2
    assert baselines["majority"] < baselines["text_only"] < 0.35


def test_text_only_is_the_best_answer_to_each_text(data, baselines):
    best = {}
    for text, target in zip(data.train.text.tolist(), data.train.target, strict=True):
        best[tuple(text)] = best.get(tuple(text), 0) + target
    scores = [
        float(target[best[tuple(text)].argmax()])
        for text, target in zip(data.test.text.tolist(), data.test.target, strict=True)
    ]
    assert baselines["text_only"] >= np.mean(scores) - 1e-6
