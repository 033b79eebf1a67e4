"""Options of a data folder that reach its images, texts and splits."""

import pytest
import torch
from official import make_coco, make_nlvr2, make_vqa, shade
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
    return make_coco(tmp_path, images=6)


def test_a_checkpoint_s_normalisation_and_tokenizer(coco):
    options = {"image_size": 4, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0)}
    data = tasks.load("coco", str(coco), tokenizer="clip", text_length=8, **options)
    pixel = data.train.images[torch.tensor([1])][0, :, 0, 0].tolist()
    assert pixel == pytest.approx([(10 / 255 - 0.5) / std for std in (0.25, 0.5, 1.0)], abs=1e-6)
    assert data.tokenizer == ClipBytePairs()
    assert data.train.text[0].tolist() == ClipBytePairs().encode("Caption 0 of train 0.", 8)


def test_squashed_images_show_their_edges(coco):
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 8, 16))
    image.save(coco / "train2017" / f"{0:012d}.jpg", quality=95)
    whole, cut = (
        tasks.load("coco", str(coco), image_size=8, resize=resize).train.images[torch.tensor([0])]
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
        texts = [f"Caption 0 of train {shade(image) // 10}." for image in images]
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
    root = make_vqa(tmp_path, parts=("train",), images=5)
    data = tasks.load("vqa", str(root), image_size=5, image_errors="skip", held_out_fraction=0.4)
    data.train.images.paths[0].write_bytes(b"")
    loaded = data.train.load(torch.arange(len(data.train)), lambda pixels, number: 1 - pixels)
    assert len(loaded.index) == len(data.train) - 2
    answers = [data.classes[int(row.argmax())] for row in loaded.batch["target"]]
    numbers = [int(path.stem[-3:]) for path in data.train.images.paths[1:]]
    # two questions an image, the second one first: is its number odd, and what is it
    assert answers == [str(answer) for i in numbers for answer in (i % 2, i)]
    assert [shade(image) for image in loaded.batch["images"]] == [255 - 10 * i for i in numbers]


def test_consistency_is_that_of_the_sentences_that_are_left(tmp_path):
    data = tasks.load("nlvr2", str(make_nlvr2(tmp_path, sets=1)), image_size=5, image_errors="skip")
    said = Predictions(["true", "false", "true", "true"])  # the third is wrong
    assert data.metrics(data.test, said) == {"accuracy": 0.75, "consistency": 0.5}
    data.test.note({int(data.test.image_index[2, 0]): "broken"})
    left = {"accuracy": 1.0, "consistency": 1.0, "left_out": 2}
    assert data.metrics(data.test, said) == left
