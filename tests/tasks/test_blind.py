"""Answers from the text alone: the sparse forms give what dense tables gave."""

import numpy as np
import torch

from optima_fast.tasks import blind


def dense(classes, worth, size):
    return torch.zeros(len(classes), size).scatter_add_(1, classes, worth)


def drawn(seed, n=400, k=3, size=9):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 3, (n, 3), generator=generator)
    classes = torch.rand(n, size, generator=generator).argsort(1)[:, :k]
    worth = torch.rand(n, k, generator=generator).mul(4).floor().div(4)
    asked = torch.randint(0, 4, (60, 3), generator=generator)
    return text, classes, worth, asked


def test_best_by_text_is_the_largest_sum_over_the_same_text():
    for seed in range(5):
        text, classes, worth, asked = drawn(seed)
        table = dense(classes, worth, 9).double()
        said = blind.best_by_text(text, classes, worth, asked, 7)
        new = 0
        for row, answer in zip(asked, said.tolist(), strict=True):
            same = (text == row).all(1)
            new += not same.any()
            assert answer == (int(table[same].sum(0).argmax()) if same.any() else 7)
        assert 0 < new < 60


def test_a_text_whose_answers_are_worth_nothing_is_as_good_as_new():
    text, asked = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[3, 4], [1, 2], [9, 9]])
    classes = torch.tensor([[5, 2], [0, 0]])
    worth = torch.tensor([[0.5, 0.25], [0.0, 0.0]])
    assert blind.best_by_text(text, classes, worth, asked, 8).tolist() == [8, 5, 8]


def test_best_by_words_finds_the_word_that_tells():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 30_000, (600, 4), generator=generator)
    label = torch.arange(600) % 3
    text[:, 2] = label + 5
    classes = torch.stack([torch.full((600,), 40), label * 100], 1)
    worth = torch.tensor([[0.3, 0.9]]).repeat(600, 1)
    worth[:6] = 0  # no answer is worth anything: nothing to learn from
    asked = text[:50].clone()
    asked[:, [0, 1, 3]] = torch.randint(30_000, 49_408, (50, 3), generator=generator)
    said = blind.best_by_words(text, classes, worth, asked)
    assert said.tolist() == (label[:50] * 100).tolist()


def test_best_by_words_learns_the_commonest_classes_of_a_sample(monkeypatch):
    monkeypatch.setattr(blind, "MOST_CLASSES", 2)
    monkeypatch.setattr(blind, "SAMPLE", 30)
    label = np.array([0, 1, 1, 2, 2, 2, 2] * 17)
    text = torch.from_numpy(label[:, None] + 5)
    said = blind.best_by_words(
        text, torch.from_numpy(label[:, None]), torch.ones(119, 1), torch.tensor([[5], [6], [7]])
    )
    assert said.tolist()[1:] == [1, 2]
    assert said[0] in (1, 2)


def test_best_by_words_does_not_count_words_it_never_saw():
    text, label = torch.tensor([[5, 0], [9, 0]] * 20), torch.tensor([[0], [1]] * 20)
    asked = torch.tensor([[5, 7], [9, 2], [5, 99]])
    said = blind.best_by_words(text, label, torch.ones(40, 1), asked.repeat(1, 3)[:, [0, 1, 3, 5]])
    assert said.tolist() == [0, 1, 0]


def test_one_class_and_none():
    text = torch.tensor([[1], [2]])
    one = blind.best_by_words(text, torch.tensor([[4], [4]]), torch.ones(2, 1), text)
    assert one.tolist() == [4, 4]
    none = blind.best_by_words(text, torch.tensor([[4], [4]]), torch.zeros(2, 1), text)
    assert none.tolist() == [0, 0]
