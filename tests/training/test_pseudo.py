"""Images that the teacher captions: made once, kept, trained on, the same when a run goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import QUIET, small

from optima_fast.distill import recipes
from optima_fast.errors import UserError
from optima_fast.tasks.base import Predictions
from optima_fast.tasks.split import Split
from optima_fast.training import checkpoints, dry_run, experiment, predicting, pseudo
from optima_fast.training.config import TrainConfig
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.trainer import Trainer


@pytest.fixture
def folder(tmp_path):
    """Six canvases as files, two of them below."""
    root = tmp_path / "more"
    (root / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(6):
        levels = rng.integers(0, 256, (24, 24), dtype=np.uint8)
        Image.fromarray(levels).save(root / ("below" if i > 3 else "") / f"{i}.png")
    (root / "notes.txt").write_text("no image")
    return root


def settings(tmp_path, folder, **more):
    given = recipes.settings("minivlm", "coco")
    given |= {"recipe": "minivlm", "task": "coco", "extra_images": str(folder), "steps": 2}
    return small(tmp_path, **{**given, "train_images": 20, "teacher_steps": 1, **more})


class Captioning:
    """Coco whose teacher says what it is told."""

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, model, split, **options):
        assert len(split.images) == len(self.texts)
        return Predictions(self.texts)


def extended(data, folder, kept, texts=None, teacher=None):
    teacher = teacher or torch.nn.Linear(1, 1)
    if texts is not None:
        object.__setattr__(data, "predict", Captioning(texts))
    return pseudo.extended(data, str(folder), kept, teacher, device="cpu", display=QUIET)


def test_each_image_is_an_example_with_its_caption(tmp_path, folder):
    data = experiment.load_data(small(tmp_path, task="coco"))
    train, said = data.train, data.train.references[0][0]
    more = extended(data, folder, tmp_path / "kept.json", [said, "", said, said, said, said]).train
    assert more.group == train.group
    assert len(more.images) == len(train.images) + 5  # nothing is learnt from an empty caption
    assert len(more) == len(train) + 5 * train.group
    assert torch.equal(more.text[: len(train)], train.text)
    row = data.tokenizer.encode_all([said], data.text_length)[0]
    assert torch.equal(more.text[-1], row)
    assert more.image_index[-1].tolist() == [len(more.images) - 1]
    assert more.references[-1] == [said]
    before, after = train.batch(range(2))["images"], more.batch(range(2))["images"]
    assert torch.equal(before, after)
    last = more.batch([len(more) - 1])["images"]
    levels = torch.from_numpy(np.array(Image.open(folder / "below" / "5.png")))
    mean, std = train.images.mean, train.images.std
    torch.testing.assert_close(last[0, 0], (levels.float() / 255 - mean) / std)


def test_captions_are_made_once_and_belong_to_their_images_and_teacher(tmp_path, folder):
    data = experiment.load_data(small(tmp_path, task="coco"))
    kept, teacher = tmp_path / "kept.json", torch.nn.Linear(1, 1)
    first = extended(data, folder, kept, ["a"] * 6, teacher)
    again = extended(data, folder, kept, ["b"] * 6, teacher)
    assert torch.equal(first.train.text, again.train.text)
    assert list(checkpoints.read_json(kept)["captions"])[:2] == ["0.png", "1.png"]
    with pytest.raises(UserError, match="the captions of other images .* or of another teacher"):
        extended(data, folder, kept, ["b"] * 6, torch.nn.Linear(1, 1))
    (folder / "0.png").rename(folder / "00.png")
    with pytest.raises(UserError, match="start over in another --out"):
        extended(data, folder, kept, ["b"] * 6, teacher)
    (folder / "00.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read the image"):
        extended(data, folder, tmp_path / "new.json", ["b"] * 6, teacher)


def test_a_run_trains_on_them_and_goes_on_exactly(tmp_path, folder, monkeypatch):
    whole, _ = experiment.run(settings(tmp_path, folder, out=str(tmp_path / "whole")), QUIET)
    captions = checkpoints.read_json(whole.captions_path)["captions"]
    assert list(captions) == ["0.png", "1.png", "2.png", "3.png", "below/4.png", "below/5.png"]
    parts = settings(tmp_path, folder, out=str(tmp_path / "parts"))
    step, seen = Trainer._train_step, []

    def stopping(self):
        seen.append(len(self.data.train))
        self._stop.asked = True
        self.distiller.teacher.forward = None  # it has said what it had to say
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", stopping)
    with pytest.raises(Interrupted):
        experiment.run(parts, QUIET)
    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr(Split, "image_batches", None)  # captions are not made again
    monkeypatch.setattr(predicting, "evaluate", lambda *given: {"cider": 0.0})
    run, _ = experiment.run(parts, QUIET)
    assert run.weights_path.read_bytes() == whole.weights_path.read_bytes()
    some = sum(1 for caption in captions.values() if caption)
    base = experiment.load_data(parts).train
    assert seen == [len(base) + some * base.group]
    assert dry_run._data(parts, experiment.load_data(parts))[3][1].startswith("6 images of ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"extra_images": "x"}, "--extra-images x is for --task coco and a method with a teacher"),
        ({"extra_images": "x", "task": "coco", "method": "finetune"}, "not for --task coco --meth"),
        (
            {"recipe": "minivlm", "task": "coco"},
            "--recipe minivlm needs --task coco and",
        ),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**given)


def test_a_folder_without_images_is_told_first(tmp_path, folder):
    for path, message in ((tmp_path / "none", "is no folder"), (tmp_path / "empty", "no image")):
        if message == "no image":
            path.mkdir()
        with pytest.raises(UserError, match=message):
            experiment.run(settings(tmp_path, path), QUIET)
    assert not (tmp_path / "cache").exists()
