"""The official folder layouts: what is read, and how it is split."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from official import (
    MAKE,
    SIZE,
    answers,
    edit,
    files,
    levels,
    load,
    load_image,
    make_coco,
    make_nlvr2,
    make_snli_ve,
    make_vqa,
    picture,
    shade,
    shared,
)
from PIL import Image

from optima_fast import tasks
from optima_fast.errors import UserError
from optima_fast.tasks import annotations
from optima_fast.tasks.nlvr2 import consistency
from optima_fast.tasks.vqa_answers import score

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("task", MAKE)
def test_each_task_loads_through_the_public_function(tmp_path, task):
    data = tasks.load(task, str(MAKE[task](tmp_path)), image_size=SIZE)
    assert data.task == task
    assert (data.channels, data.image_size) == (3, SIZE)
    for name in SPLITS:
        split = getattr(data, name)
        assert len(split) > 0
        assert split.name == name
        batch = split.batch(range(len(split)))
        assert batch["images"].shape == (len(split.images), 3, SIZE, SIZE)
        assert batch["text"].shape == (len(split), data.text_length)
        assert batch["text"].dtype == torch.int64
        assert len(batch["pair_image"]) == len(split) * (2 if task == "nlvr2" else 1)
        if task != "coco":
            logits = torch.randn(len(split), data.num_classes, generator=torch.manual_seed(0))
            assert torch.isfinite(data.loss(logits, batch))
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert not files(getattr(data, one)) & files(getattr(data, other))
    assert data.tokenizer.id("train") != data.tokenizer.unk_id
    for word in ("val", "dev", "test", "test1"):  # words of held-out texts alone
        assert word not in data.tokenizer.words


@pytest.mark.parametrize("task", MAKE)
def test_baselines_and_reloading(tmp_path, task):
    root = MAKE[task](tmp_path)
    first, again = load(task, root, seed=3), load(task, root, seed=3)
    assert first.tokenizer == again.tokenizer
    assert first.classes == again.classes
    for name in SPLITS:
        assert getattr(first, name).images.paths == getattr(again, name).images.paths
        assert torch.equal(getattr(first, name).text, getattr(again, name).text)
    results = first.baselines()
    assert set(results) == {"majority", "text_only"}
    assert all(0 <= value <= 10 for value in results.values())


def test_vqa_targets_are_official_scores_of_each_answer(tmp_path):
    root = make_vqa(tmp_path)
    notes = root / "v2_mscoco_train2014_annotations.json"
    unanimous = [["none"] * 10, ["YES"] * 10, ["a cat"] * 9 + ["The cat"]]

    def change(content):
        for entry, given in zip(content["annotations"], unanimous, strict=False):
            entry["answers"] = answers(*given)

    edit(notes, change)
    data = load("vqa", root)
    assert {"none", "0", "YES", "cat"} <= set(data.classes)
    raw = {e["question_id"]: e["answers"] for e in json.loads(notes.read_text())["annotations"]}
    # examples are in the order of the annotation file
    target = data.train.batch(range(len(data.train)))["target"]
    expected = torch.tensor(
        [[score(c, [a["answer"] for a in given]) for c in data.classes] for given in raw.values()]
    )
    torch.testing.assert_close(target, expected)
    classes, worth = data.worth(data.train)
    dense = torch.zeros(expected.shape).scatter_add_(1, classes, worth)
    torch.testing.assert_close(dense, expected)
    assert expected[0, data.classes.index("none")] == 1
    assert expected[0, data.classes.index("0")] == 0
    assert expected[3, data.classes.index("none")] == expected[3, data.classes.index("0")] > 0
    assert data.train.kinds == ("number",) * len(data.train)


def test_vqa_pairs_questions_with_their_own_image(tmp_path):
    data = load("vqa", make_vqa(tmp_path))
    batch = data.train.batch([0, 7])  # annotations are written backwards: image 3, then 0
    shown = batch["images"][batch["pair_image"]]
    assert [shade(image) for image in shown] == [30, 0]
    assert data.tokenizer.decode(batch["text"][0]) == "is it odd train"
    assert data.classes[int(batch["target"][0].argmax())] == "1"


def test_vqa_answer_set_is_limited_and_unknown_answers_score_nothing(tmp_path):
    data = load("vqa", make_vqa(tmp_path), answers=1)
    assert data.classes == ("0",)
    assert data.train.batch([0])["target"].tolist() == [[pytest.approx(0.3)]]  # one "none"


def test_vqa_is_divided_by_image_when_only_training_is_there(tmp_path, caplog):
    root = make_vqa(tmp_path, parts=("train",), images=10)
    with caplog.at_level(logging.WARNING):
        data = load("vqa", root, held_out_fraction=0.4, validation_fraction=0.75)
    assert [len(getattr(data, name)) for name in SPLITS] == [12, 6, 2]
    assert [len(files(getattr(data, name))) for name in SPLITS] == [6, 3, 1]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "12 train, 6 validation, 2 test" in lines[0]
    other = load("vqa", root, held_out_fraction=0.4, validation_fraction=0.75, seed=1)
    assert files(other.train) != files(data.train)


def test_coco_captions_are_examples_and_references(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = load("coco", make_coco(tmp_path))
    assert [len(getattr(data, name)) for name in SPLITS] == [12, 6, 6]
    assert "divided its held-out split" in caplog.text
    for name in SPLITS:
        split = getattr(data, name)
        for row, path in enumerate(split.images.paths):
            assert [c.split()[1] for c in split.references[row]] == ["0", "1", "2"]
            part = "train" if name == "train" else "val"
            assert split.references[row][2] == f"Caption 2 of {part} {int(path.stem)}."
    batch = data.train.batch([1, 5])  # caption 0 and caption 1 of image 1
    assert len(batch["images"]) == 1
    assert shade(batch["images"][0]) == 10
    assert "target" not in batch
    assert data.tokenizer.decode(batch["text"][0]) == "caption 0 of train 1"


def test_snli_ve_drops_pairs_without_gold_label_and_counts_them(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        data = load("snli_ve", make_snli_ve(tmp_path))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert all("left out 3 of 12 pairs without gold label" in line for line in lines)
    assert len(data.train) == 9
    assert len(data.train.images) == 3  # with and without .jpg are one image
    assert [data.classes[t] for t in data.train.target[:3]] == [
        "entailment",
        "neutral",
        "contradiction",
    ]
    assert data.tokenizer.decode(data.train.text[1]) == "statement 1 train"


@pytest.mark.parametrize("layout", ["", "{part}", "{directory}", "{part}/{directory}"])
def test_nlvr2_in_each_layout_of_its_images(tmp_path, layout):
    data = load("nlvr2", make_nlvr2(tmp_path, layout=layout))
    assert len(data.train) == 12
    batch = data.train.batch([4, 5])
    shown = batch["images"][batch["pair_image"]]
    assert [shade(image) for image in shown] == [10, 210, 10, 210]
    assert batch["pair_text"].tolist() == [0, 0, 1, 1]
    assert [data.classes[t] for t in batch["target"]] == ["true", "false"]


def test_nlvr2_divides_by_set_of_images(tmp_path):
    data = load("nlvr2", make_nlvr2(tmp_path, parts=("train", "dev"), sets=4))
    sets = [{name.split("-")[1] for name in files(s)} for s in (data.validation, data.test)]
    assert not sets[0] & sets[1]
    assert [len(s) for s in sets] == [2, 2]
    assert len(data.validation) == len(data.test) == 8


def test_options_reach_the_vocabulary_and_the_texts(tmp_path):
    root = make_coco(tmp_path)
    assert load("coco", root).text_length == 7
    short = load("coco", root, text_length=4, max_words=6)
    assert short.train.text.shape[1] == 4
    assert len(short.tokenizer) == 6
    assert len(load("coco", root, min_count=8).tokenizer) == 4 + len(["caption", "of", "train"])
    edit(
        root / "annotations" / "captions_train2017.json",
        lambda c: c["annotations"][0].update(caption="word " * 90),
    )
    assert load("coco", root).text_length == 64


def test_images_are_decoded_only_when_a_batch_asks(tmp_path):
    root = make_vqa(tmp_path)
    broken = root / "train2014" / f"COCO_train2014_{3:012d}.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    data = load("vqa", root)
    data.train.batch([7])
    with pytest.raises(UserError, match=rf"cannot read the image .*{broken.name}"):
        data.train.batch([0])


def test_too_few_images_to_divide(tmp_path):
    root = make_vqa(tmp_path / "three", parts=("train",), images=3)
    assert [len(getattr(load("vqa", root), name)) for name in SPLITS] == [2, 2, 2]
    few = load("coco", make_coco(tmp_path / "coco"), validation_fraction=0.01)
    assert [len(files(s)) for s in (few.validation, few.test)] == [1, 3]
    root = make_vqa(tmp_path / "two", parts=("train",), images=2)
    with pytest.raises(UserError, match=r"has 2 image\(s\) to divide into 3 splits"):
        load("vqa", root)


def test_consistency_by_hand_and_bad_input():
    names = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0"]
    assert consistency(names, [True, True, False, True]) == pytest.approx(2 / 3)
    assert consistency(names, [False, True, True, False]) == pytest.approx(1 / 3)
    assert consistency(names, [False, True, False, True]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="got 4 and 1"):
        consistency(names, [True])
    with pytest.raises(ValueError, match="split-set-pair-sentence, got 'dev-1'"):
        consistency(["dev-1"], [True])


def test_real_nlvr2_lines(tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(shared("nlvr2", "dev.json"), tmp_path / "dev.json")
    examples = annotations.nlvr2(tmp_path, annotations.Listing())["validation"]().examples
    assert len(examples) == 6982
    assert sum(e.label for e in examples) / 6982 == pytest.approx(0.5085935262102549)
    assert examples[0].images[1].name == "dev-850-0-img1.png"


def test_real_snli_ve_lines(tmp_path):
    shutil.copy(shared("snli_ve", "sample_pairs.jsonl"), tmp_path / "snli_ve_train.jsonl")
    picture(tmp_path / "flickr30k-images" / "2248275918.jpg")
    picture(tmp_path / "flickr30k-images" / "402978771.jpg")
    examples = annotations.snli_ve(tmp_path, annotations.Listing())["train"]().examples
    assert len(examples) == 16
    assert [examples[i].label for i in range(3)] == [2, 1, 0]
    assert {e.images[0].name for e in examples} == {"2248275918.jpg", "402978771.jpg"}


def test_real_vqa():
    data = load("vqa", shared("vqav2"))
    splits = [getattr(data, name) for name in SPLITS]
    assert sum(map(len, splits)) == 22
    assert sum(len(s.images) for s in splits) == 18
    for split in splits:
        batch = split.batch(range(len(split)))
        assert torch.isfinite(batch["images"]).all()
        assert batch["target"].max() <= 1
    assert set(data.train.kinds) <= {"yes/no", "number", "other"}
    grey = [path for split in splits for path in split.images.paths if _mode(path) == "L"]
    assert [path.name for path in grey] == ["COCO_train2014_000000000086.jpg"]
    one = levels(load_image(grey[0], 32))
    np.testing.assert_allclose(one[..., 0], one[..., 2], atol=1e-3)


def test_real_coco():
    data = load("coco", shared("coco"))
    splits = [getattr(data, name) for name in SPLITS]
    assert sum(map(len, splits)) == 435
    assert [len(s.images) for s in splits] == [26, 30, 31]
    assert {len(group) for s in splits for group in s.references} <= {5, 6, 7}
    for split in splits:
        images = split.images[torch.arange(len(split.images))]
        assert torch.isfinite(images).all()
        assert images.std() > 0.3


def _mode(path):
    with Image.open(path) as image:
        return image.mode
