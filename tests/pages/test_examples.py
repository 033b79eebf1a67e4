"""Which test examples are shown, what is right of them, and their images."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from official import make_coco
from PIL import Image
from small_run import finetuned

from optima_fast import report
from optima_fast.pages import examples, html
from optima_fast.pages.examples import Example, Said, Truth
from optima_fast.tasks import load


def test_the_first_right_and_the_first_wrong_ones_are_shown():
    right = {3: True, 5: False, 8: True, 9: True, 12: False, 14: False}
    assert examples.choose(right, 2) == [3, 8, 5, 12]
    assert examples.choose(right, 9) == [3, 8, 9, 5, 12, 14]
    assert examples.choose({1: True}, 2) == [1]
    assert examples.choose(dict.fromkeys(range(9)), 2) == [0, 1, 2, 3]


@pytest.mark.parametrize("task", ["vqa", "snli_ve", "nlvr2", "coco"])
def test_each_example_has_another_image_and_the_right_answer(task):
    data = load(task, "digits", train_images=20, validation_images=2, test_images=8)
    split, truth = data.test, Truth(data)
    rows = examples.first_rows(split)
    shown = [tuple(split.image_index[row].view(-1).tolist()) for row in rows]
    assert rows == sorted(rows)
    assert len(set(shown)) == len(shown) == len(set(map(str, split.image_index.tolist())))
    example = truth.example(rows[1], {"student": truth.answer(rows[1])}, {"student": 0.5})
    assert len(example.images) == (2 if task == "nlvr2" else 1)
    assert example.images[0].shape == (24, 24)
    if task == "coco":
        assert truth.answer(rows[1]) in split.references[shown[1][0]]
        assert example.said["student"] == Said(truth.answer(rows[1]), None, 0.5)
        return
    target = split.target[rows[1]]
    number = int(target.argmax()) if target.dim() else int(target)
    assert example.answer == data.classes[number]
    assert example.said["student"] == Said(example.answer, True, 0.5)
    other = next(name for name in data.classes if name != example.answer)
    assert truth.right(rows[1], other) is False
    assert example.text == data.tokenizer.decode(split.text[rows[1]])


def test_an_image_is_small_and_what_it_was():
    levels = torch.arange(24 * 24).view(24, 24).remainder(256).byte().numpy()
    shown = html.image(levels, '"quoted"')
    assert 'class="pixels"' in shown
    assert 'alt="&quot;quoted&quot;"' in shown
    data = re.search(r"base64,([^\"]*)", shown)
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as image:
        assert np.array_equal(np.asarray(image), levels)
    large = html.image(np.zeros((400, 800, 3), np.uint8), "")
    assert "pixels" not in large
    data = re.search(r"base64,([^\"]*)", large)
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as image:
        assert image.size == (html.LARGEST, html.LARGEST // 2)


def test_what_is_said_is_marked_and_escaped():
    said = {"teacher": Said("<yes>", True), "student": Said("no", False, 0.25)}
    grey = np.zeros((2, 2), np.uint8)
    shown = examples.gallery([Example((grey, grey), "is it?", "<yes>", said)])
    assert '<figure class="two">' in shown
    assert 'teacher: <span class="right">&lt;yes&gt; (right)</span>' in shown
    assert 'student: <span class="wrong">no (wrong)</span> 25%' in shown


def test_captions_of_files_are_shown_beside_a_person_s(tmp_path):
    make_coco(tmp_path / "data")
    run = finetuned(tmp_path, "coco", tmp_path / "data", steps=2)
    assert report.main([str(run.folder), "--examples=1"]) == 0
    text = (run.folder / "report.html").read_text()
    assert text.count("data:image/png") == text.count("a person: ") == 2
    assert text.count("finetune, seed 0: ") >= 2
    assert "(wrong)" not in text
