"""Options of a data folder that reach its images, texts and splits."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from optima_fast import tasks
from optima_fast.errors import UserError
from optima_fast.models import generate
from optima_fast.tasks.base import Predictions
from optima_fast.tasks.caption_metrics import cider
from optima_fast.tasks.subwords import ClipBytePairs


@pytest.fixture
def coco(tmp_path):
    for number, part in enumerate(("train", "val")):
        ids = [100 * number + i for i in range(6)]
        for i in ids:
            path = tmp_path / f"{part}2017" / f"{i:012d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (9, 9), (i % 100 * 40,) * 3).save(path)
        notes = {
            "images": [{"id": i, "file_name": f"{i:012d}.png"} for i in ids],
            "annotations": [
                {"id": 10 * i + j, "image_id": i, "caption": f"A {word} thing, number {i % 100}."}
                for j, word in enumerate(("grey", "plain"))
                for i in ids
            ],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(notes))
    return tmp_path


def test_a_checkpoint_s_normalisation_and_tokenizer(coco):
    options = {"image_size": 4, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)}
    data = tasks.load("coco", str(coco), tokenizer="clip", text_length=8, **options)
    pixel = data.train.images[torch.tensor([1])][0, :, 0, 0].tolist()
    assert pixel == pytest.approx([(40 / 255 - 0.5) / std for std in (0.25, 0.5, 1.0)], abs=1e-6)
    assert data.tokenizer == ClipBytePairs()
    assert data.train.text[0].tolist() == ClipBytePairs().encode("A grey thing, number 0.", 8)


def test_squashed_images_show_their_edges(coco):
    path = next((coco / "train2017").glob("*0.png"))
    image = Image.new("RGB", (18, 9))
    image.paste((255, 255, 255), (0, 0, 3, 9))
    image.save(path)
    whole, cut = (
        tasks.load("coco", str(coco), image_size=9, resize=resize).train.images[torch.tensor([0])]
        for resize in ("squash", "shortest")
    )
    assert whole[..., 0].min() > 1
    assert cut[..., 0].max() < -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_errors": "ignore"}, "image_errors must be fail or skip, got 'ignore'"),
        ({"workers": -1}, "workers must be an integer >= 0, got -1"),
        ({"std": (0.0, 1.0, 1.0)}, "mean and std must be three numbers each, and std above 0"),
        ({"resize": "crop"}, "resize must be one of shortest, longest, squash, got 'crop'"),
        ({"tokenizer": "bpe"}, "tokenizer must be words, clip, sentencepiece or a file"),
    ],
)
def test_wrong_options(coco, options, message):
    with pytest.raises(UserError, match=message):
        tasks.load("coco", str(coco), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_caption_of_an_unreadable_image_is_left_out_and_counted(coco, monkeypatch, workers):
    def by_shade(model, images, **_):
        """The number of each image, seen from how bright it is, as the caption."""
        levels = (images[:, 0, 0, 0] * 0.26862954 + 0.48145466) * 255 / 40
        texts = [f"A grey thing, number {round(float(level))}." for level in levels]
        return data.tokenizer.encode_all(texts, data.text_length)

    monkeypatch.setattr(generate, "greedy", by_shade)
    options = {"image_size": 4, "image_errors": "skip", "workers": workers}
    data = tasks.load("coco", str(coco), **options)
    complete = data.evaluate(nn.Identity(), data.train, batch_size=4)
    assert "left_out" not in complete
    data = tasks.load("coco", str(coco), **options)
    data.train.images.paths[2].write_bytes(b"")
    captions = data.predict(nn.Identity(), data.train, batch_size=4)
    assert [c[-1:] for c in captions.texts] == ["0", "1", "", "3", "4", "5"]
    found = data.evaluate(nn.Identity(), data.train, batch_size=4)
    assert found["left_out"] == 1
    left = [(c, r) for c, r in zip(captions.texts, data.train.references, strict=True) if c]
    assert found["cider"] == pytest.approx(cider(*map(list, zip(*left, strict=True)))[0])
    assert found["cider"] > 0.5 < complete["cider"]


def test_soft_scores_follow_what_is_left(tmp_path):
    (tmp_path / "train2014").mkdir()
    questions, notes = [], []
    for i in range(5):
        name = f"COCO_train2014_{i:012d}.jpg"
        Image.new("RGB", (5, 5), (9 * i,) * 3).save(tmp_path / "train2014" / name)
        ids = {"image_id": i, "question_id": i}
        questions.append({"question": f"Which {i}?", **ids})
        given = [{"answer": str(i), "answer_id": j, "answer_confidence": "yes"} for j in range(10)]
        notes.append({**ids, "answer_type": "number", "answers": given})
    root = tmp_path
    (root / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps({"questions": questions})
    )
    (root / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": notes}))
    data = tasks.load("vqa", str(root), image_size=5, image_errors="skip", held_out_fraction=0.4)
    data.train.images.paths[0].write_bytes(b"")
    loaded = data.train.load(torch.arange(len(data.train)), lambda pixels, number: 1 - pixels)
    assert len(loaded.index) == len(data.train) - 1
    answers = [data.classes[int(row.argmax())] for row in loaded.batch["target"]]
    shades = [int(path.stem[-3:]) for path in data.train.images.paths[1:]]
    assert answers == [str(shade) for shade in shades]
    levels = (loaded.batch["images"][:, 0, 0, 0] * 0.26862954 + 0.48145466) * 255
    assert levels.tolist() == pytest.approx([255 - 9 * shade for shade in shades], abs=1.5)


def test_consistency_is_that_of_the_sentences_that_are_left(tmp_path):
    for part in ("train", "dev", "test1"):
        entries = []
        for pair in range(2):
            name = f"{part}-0-{pair}"
            for side in (0, 1):
                path = tmp_path / "images" / part / f"{name}-img{side}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (5, 5), (60 * pair + 30 * side,) * 3).save(path)
            for sentence in range(2):
                entries.append(
                    {
                        "identifier": f"{name}-{sentence}",
                        "sentence": f"Sentence {sentence}.",
                        "label": "True",
                    }
                )
        (tmp_path / f"{part}.json").write_text("".join(json.dumps(e) + "\n" for e in entries))
    data = tasks.load("nlvr2", str(tmp_path), image_size=5, image_errors="skip")
    said = Predictions(["true", "true", "false", "true"])
    assert data.metrics(data.test, said) == {"accuracy": 0.75, "consistency": 0.5}
    data.test.note({int(data.test.image_index[2, 0]): "broken"})
    left = {"accuracy": 1.0, "consistency": 1.0, "left_out": 2}
    assert data.metrics(data.test, said) == left
