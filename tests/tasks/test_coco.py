"""Captioning: captions that fit, token losses, greedy evaluation, baselines."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from optima_fast import tasks
from optima_fast.tasks import canvases as c
from optima_fast.tasks import digits_language as language
from optima_fast.tasks.caption_metrics import cider
from optima_fast.tasks.text import tokenize


@pytest.fixture(scope="module")
def data():
    sizes = {"train_images": 160, "validation_images": 30, "test_images": 80}
    return tasks.load("coco", seed=4, texts_per_image=2, **sizes)


@pytest.fixture(scope="module")
def baselines(data):
    return data.baselines()


def test_captions_name_what_can_be_seen():
    drawn = c.compose(200, "train", c.generator(1))
    forms = set()
    for row, group in enumerate(language.captions(drawn, 5, c.generator(2))):
        own = sorted(drawn.digit[row][drawn.digit[row] < 10].tolist())
        for caption in group:
            head, _, listed = caption.rpartition(":")
            words = tokenize(listed)
            if words[:3] == ["an", "image", "with"]:
                head, words = " ".join(words[3:5]), words[5:]
            named = [language.WORDS.index(word) for word in words if word in language.WORDS]
            assert sorted(named) == own
            marked = [i for i, word in enumerate(words) if word in ("bright", "shining")]
            assert len(marked) == 1
            assert language.WORDS.index(words[marked[0] + 1]) == drawn.brightest[row]
            if head:
                count, noun = head.split()
                assert language.WORDS.index(count) == len(own)
                assert noun.endswith("s") == (len(own) > 1)
            assert "a eight" not in caption
            forms.add((caption.split()[0], bool(head)))
    assert len(forms) > 3


def test_each_image_has_its_captions_as_examples(data):
    split = data.train
    assert len(split.references) == len(split.images) == 160
    assert len(split) == 160 * split.group
    for i in (0, 7, len(split) - 1):
        expected = split.references[i // split.group][i % split.group]
        assert data.tokenizer.decode(split.text[i]) == " ".join(tokenize(expected))


def test_loss_counts_words_and_the_end_but_no_padding(data):
    text = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().log_softmax(-1)
    picked = [log_p[0, 0, 5], log_p[0, 1, 6], log_p[0, 2, 2], log_p[1, 0, 7], log_p[1, 1, 2]]
    expected = -torch.stack(picked).mean()
    assert float(data.loss(logits, {"text": text})) == pytest.approx(float(expected), rel=1e-6)
    logits[0, 3] = logits[1, 2:] = float("nan")
    assert float(data.loss(logits, {"text": text})) == pytest.approx(float(expected), rel=1e-6)


def test_divergence_is_the_mean_over_the_same_words(data):
    text = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])
    student, teacher = torch.randn(2, 2, 4, 9, generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[counts].mean()
    got = data.divergence(student, teacher, {"text": text})
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    assert float(data.divergence(teacher, teacher, {"text": text})) == 0


def speaker(monkeypatch, data, split, say):
    """Replace greedy decoding by `say(number of the image in the split)`."""
    seen = []

    def greedy(model, images, *, bos_id, eos_id, max_length):
        assert not model.training
        assert not torch.is_grad_enabled()
        assert (bos_id, eos_id, max_length) == (1, 2, data.text_length)
        rows = torch.arange(len(seen), len(seen) + len(images))
        assert torch.equal(images, split.images[rows])
        seen.extend(rows.tolist())
        return data.tokenizer.encode_all([say(int(row)) for row in rows], max_length)

    monkeypatch.setitem(sys.modules, "optima_fast.models.generate", SimpleNamespace(greedy=greedy))
    return nn.Dropout()


def test_evaluation_scores_each_image_once_against_all_its_references(data, monkeypatch, baselines):
    split = data.test
    model = speaker(monkeypatch, data, split, lambda row: split.references[row][0])
    result = data.evaluate(model, split, batch_size=32)
    expected = cider([group[0] for group in split.references], split.references)[0]
    assert result["cider"] == pytest.approx(expected, rel=1e-9)
    assert model.training
    assert expected > 2 * baselines["text_only"]


def test_a_constant_speaker_reaches_the_majority_baseline(data, monkeypatch, baselines):
    counts = {}
    for group in data.train.references:
        for caption in group:
            counts[caption] = counts.get(caption, 0) + 1
    common = min(counts, key=lambda caption: (-counts[caption], caption))
    model = speaker(monkeypatch, data, data.test, lambda _: common)
    result = data.evaluate(model, data.test, batch_size=50)
    assert result["cider"] == pytest.approx(baselines["majority"], rel=1e-9)


def test_the_best_blind_caption_beats_the_commonest_one(baselines):
    assert 0 <= baselines["majority"] < baselines["text_only"]


def test_captioning_needs_references(data):
    bare = tasks.Split(data.test.images, data.test.text, data.test.image_index, name="test")
    with pytest.raises(ValueError, match="the test split has no targets: it can be predicted only"):
        data.evaluate(nn.Identity(), bare)
