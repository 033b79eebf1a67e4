"""Batches of training steps: the same however they are read, and whole runs on image files."""

from __future__ import annotations

import json
import logging
import multiprocessing
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import SMALL

from optima_fast import tasks
from optima_fast.errors import UserError
from optima_fast.tasks.augment import RandAugment
from optima_fast.tasks.workers import usable_cores
from optima_fast.training import checkpoints, experiment, loader
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.interrupts import Interrupted
from optima_fast.training.run import Run
from optima_fast.training.sampler import Sampler
from optima_fast.training.trainer import Trainer

SIZE = 18


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """SNLI-VE with five training images, and statements that only an image can decide."""
    root = tmp_path / "data"
    (root / "flickr30k-images").mkdir(parents=True)
    for part, images in (("train", 5), ("dev", 2), ("test", 2)):
        entries = []
        for i in range(images):
            name = f"{part}{i}"
            draw = np.random.default_rng(len(part) * 100 + i)
            pixels = draw.integers(0, 256, (SIZE, SIZE + i, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "flickr30k-images" / f"{name}.jpg", quality=95)
            for j, label in enumerate(("entailment", "neutral", "contradiction")):
                entry = {"Flickr30K_ID": name, "gold_label": label, "pairID": f"{name}.jpg#{j}"}
                entries.append({**entry, "sentence1": "-", "sentence2": f"Statement {j}."})
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (root / f"snli_ve_{part}.jsonl").write_text(lines)
    return root


def config_of(folder: Path, **settings: Any) -> TrainConfig:
    given = {
        **{k: v for k, v in SMALL.items() if k not in ("train_images", "teacher_steps")},
        "data": str(folder),
        "task": "snli_ve",
        "out": str(folder.parent / "run"),
        "teacher": "digits_teacher",
        "student": "digits_student",
        "reward_examples": 6,
        "steps": 8,
        "round_steps": 1,
        "augment": "2,9",
        "workers": "0",
    }
    return resolve(TrainConfig(**{**given, **settings}))


def load(config: TrainConfig) -> tasks.TaskData:
    return tasks.load(
        config.task,
        config.data,
        image_size=SIZE,
        workers=loader.workers(config),
        image_errors=config.image_errors,
    )


def trainer(config: TrainConfig) -> Trainer:
    data = load(config)
    torch.manual_seed(config.seed)
    student, teacher = (experiment.new_model(config.student, data, 0.1) for _ in range(2))
    run = Run(config.out)
    run.begin(config)
    if config.method == "finetune":
        teacher = None
    return Trainer(config, data, student, teacher, run, Display(quiet=True))


def batches(config: TrainConfig, first: int = 0) -> list:
    data = load(config)
    sampler = Sampler(data.train, config.batch_size, config.seed)
    return list(loader.batches(config, data.train, sampler, first))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.index, other.index) and all(
        torch.equal(one.batch[key], other.batch[key]) for key in one.batch | other.batch
    )


def test_a_step_s_batch_depends_on_settings_and_step_alone(folder):
    config = config_of(folder)
    whole = batches(config)
    assert len(whole) == 8
    for workers in ("1", "2"):
        ahead = batches(config_of(folder, workers=workers))
        assert all(map(same, whole, ahead))
    later = batches(config_of(folder, workers="2"), first=5)
    assert all(map(same, whole[5:], later))
    assert not any(map(same, whole, batches(config_of(folder, seed=1))))


def test_augmentation_is_drawn_by_seed_step_and_image_before_normalisation(folder):
    config = config_of(folder, seed=3)
    data, plain = load(config), batches(config_of(folder, seed=3, augment="none"))
    augment, prepare = RandAugment(2, 9, seed=3), data.train.images.preprocessing
    differ = 0
    for step, (loaded, bare) in enumerate(zip(batches(config), plain, strict=True)):
        numbers = data.train.image_index[loaded.index].unique().tolist()
        for image, number in zip(loaded.batch["images"], numbers, strict=True):
            pixels = prepare.read(data.train.images.paths[number])
            drawn = augment(step, pixels, number)
            assert torch.equal(image, prepare.normalise(drawn))
        assert torch.equal(bare.batch["images"], data.train.images[torch.tensor(numbers)])
        differ += not torch.equal(loaded.batch["images"], bare.batch["images"])
        assert torch.equal(loaded.batch["target"], bare.batch["target"])
    assert differ >= 7


def test_the_defaults_are_the_paper_s_table():
    for task, augment in {
        "vqa": "1,10",
        "snli_ve": "1,10",
        "nlvr2": "none",
        "coco": "none",
    }.items():
        config = resolve(TrainConfig(task=task, data="somewhere"))
        assert config.augment == augment
        assert experiment.teachers.teacher_config(config).augment == augment
        assert resolve(TrainConfig(task=task)).augment == "none"
    assert resolve(TrainConfig(data="somewhere", augment="2,5")).augment == "2,5"
    assert loader.workers(resolve(TrainConfig())) == 0
    auto = loader.workers(resolve(TrainConfig(data="somewhere")))
    assert auto == max(1, usable_cores() - 1)
    assert loader.workers(TrainConfig(workers="3")) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "1,10"}, "--augment 1,10 is for a data folder, not for the digits"),
        ({"augment": "x", "data": "d"}, "augment must be none or LAYERS,MAGNITUDE"),
        ({"workers": "-1"}, "--workers must be auto or a number from 0 to 1024, got '-1'"),
        ({"workers": "many"}, "--workers must be auto or a number"),
        ({"workers": "5000"}, "--workers must be auto or a number"),
        ({"image_errors": "ignore"}, "--image-errors must be one of fail, skip"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_only_training_images_are_augmented(folder, monkeypatch):
    calls: list[int] = []
    real = RandAugment.__call__

    def count(self: RandAugment, step: int, pixels: torch.Tensor, image: int) -> torch.Tensor:
        calls.append(step)
        return real(self, step, pixels, image)

    monkeypatch.setattr(RandAugment, "__call__", count)
    t = trainer(config_of(folder, steps=3, eval_every=1, method="layerwise"))
    t.data.evaluate(t.student, t.data.validation)
    t._measure()
    assert calls == []
    t.fit()
    assert set(calls) == {0, 1, 2}


def weights(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in t.student.state_dict().items()}


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_is_the_same_with_workers_and_after_a_stop(folder, broken):
    settings: dict[str, Any] = {"dropout": 0.1, "image_errors": "skip" if broken else "fail"}
    if broken:
        (folder / "flickr30k-images" / "train2.jpg").write_bytes(b"\xff\xd8\xff")
    whole = trainer(config_of(folder, out=str(folder / "whole"), **settings))
    whole.fit()
    assert (whole.left_out > 0) == broken

    first = trainer(config_of(folder, out=str(folder / "parts"), workers="2", **settings))
    step = first._train_step

    def stop() -> Any:
        if first.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step()

    first._train_step = stop
    with pytest.raises(Interrupted, match="after step 5 of 8"):
        first.fit()
    assert not multiprocessing.active_children()

    second = trainer(config_of(folder, out=str(folder / "parts"), workers="1", **settings))
    second.resume(checkpoints.latest_checkpoint(second.run.checkpoints))
    second.fit()
    assert not multiprocessing.active_children()
    assert second.left_out == whole.left_out
    expected, got = weights(whole), weights(second)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert whole.pulls == second.pulls


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_corrupt_image_ends_the_run_with_its_name(folder, workers):
    (folder / "flickr30k-images" / "train3.jpg").write_bytes(b"\xff\xd8\xff")
    t = trainer(config_of(folder, method="finetune", workers=workers))
    with pytest.raises(UserError, match=r"^cannot read the image .*train3\.jpg: [^\n]*$"):
        t.fit()
    assert not multiprocessing.active_children()
    # it can go on, with what is broken left out
    t.run.check_same(config_of(folder, method="finetune", workers="1", image_errors="skip"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_corrupt_images_are_skipped_counted_and_named_once(folder, workers, caplog):
    for name in ("train3", "dev1"):
        (folder / "flickr30k-images" / f"{name}.jpg").write_bytes(b"\xff\xd8\xff")
    # without a reward, which is measured on the training images too
    config = config_of(
        folder, method="finetune", image_errors="skip", workers=workers, eval_every=3, log_every=4
    )
    t = trainer(config)
    with caplog.at_level(logging.WARNING):
        t.fit()
    named = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert sorted(Path(m.split(": ")[0]).name for m in named) == ["dev1.jpg", "train3.jpg"]
    drawn = torch.cat([t.sampler.at(step) for step in range(8)])
    shown = [t.data.train.images.paths[i].stem for i in t.data.train.image_index[drawn, 0]]
    assert t.left_out == shown.count("train3") > 0
    lines = [json.loads(line) for line in t.run.metrics_path.read_text().splitlines()]
    assert [x["left_out"] for x in lines if "left_out" in x][-1] == t.left_out
    assert [x["validation"]["left_out"] for x in lines if "validation" in x] == [3, 3]


def test_a_step_without_a_readable_image_takes_the_next_one_s(folder):
    for i in range(4):
        (folder / "flickr30k-images" / f"train{i}.jpg").write_bytes(b"")
    config = config_of(folder, image_errors="skip", batch_size=1, augment="1,10")
    data = load(config)
    sampler = Sampler(data.train, 1, config.seed)
    fetch = loader._Fetch(data.train, sampler, RandAugment(1, 10))
    good = [s for s in range(40) if data.train.image_index[sampler.at(s)[0], 0] == 4]
    step = next(s for s in range(40) if s not in good and any(g > s for g in good))
    loaded = fetch(step)
    assert torch.equal(loaded.index, sampler.at(min(g for g in good if g > step)))
    assert loaded.errors
    drawn = data.train.images.load(torch.tensor([4]), partial(RandAugment(1, 10), step))
    assert torch.equal(loaded.batch["images"], drawn)
    (folder / "flickr30k-images" / "train4.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="no image of 100 batches can be read: 5 files, such as: "):
        fetch(0)


def test_a_reward_needs_an_image_that_can_be_read(folder):
    t = trainer(config_of(folder, image_errors="skip"))
    for path in (folder / "flickr30k-images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the images that the reward is measured on"):
        t._measure()
