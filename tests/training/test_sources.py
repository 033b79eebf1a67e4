"""Models by name: presets, runs, published checkpoints, and whole runs that start from these."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_run import QUIET, small

from optima_fast.errors import UserError
from optima_fast.models import CoCa, initialise, open_clip, presets
from optima_fast.training import dry_run, experiment, sources
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display

LARGE = dataclasses.replace(
    presets.get("open_clip_coca_ViT-L-14"),
    image_size=32,
    patch_size=8,
    image_width=64,
    image_layers=6,
    image_heads=1,
    text_width=64,
    text_layers=3,
    multimodal_layers=3,
    text_heads=1,
    pooler_queries=5,
    contrastive_width=64,
    text_length=20,
)
SMALL_ONE = dataclasses.replace(LARGE, patch_size=16, image_width=128, image_heads=2)


PIXELS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def checkpoint(
    folder: Path, name: str, config: presets.CoCaConfig, seed: int, pixels: object = PIXELS
) -> str:
    """An open_clip folder with random weights."""
    torch.manual_seed(seed)
    where = folder / name
    where.mkdir(parents=True)
    state = {k: v.contiguous() for k, v in open_clip.to_open_clip(CoCa(config)).items()}
    save_file(state, where / "open_clip_model.safetensors")
    described = {"model_cfg": open_clip.model_cfg(config), "preprocess_cfg": pixels}
    (where / "open_clip_config.json").write_text(json.dumps(described))
    return str(where)


def captions(folder: Path, images: int = 6) -> str:
    """COCO's layout with a few coloured squares."""
    rng = np.random.default_rng(0)
    for part in ("train2017", "val2017"):
        (folder / part).mkdir(parents=True)
        listed, said = [], []
        for number in range(images):
            levels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / part / f"{number:012d}.jpg")
            listed.append({"id": number, "file_name": f"{number:012d}.jpg"})
            for i in range(2):
                text = f"a square number {number} seen {i} times"
                said.append({"id": 2 * number + i, "image_id": number, "caption": text})
        file = folder / "annotations" / f"captions_{part}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": listed, "annotations": said}))
    return str(folder)


def config(tmp_path: Path, **settings: object) -> TrainConfig:
    given = {"task": "coco", "init_rounds": None, "train_images": None}
    given |= {"steps": 2, "teacher_steps": 2, "reward_examples": 4, "method": "layerwise"}
    given |= {"workers": "0", "checkpoint_every": 100}
    return small(tmp_path, **{**given, **settings})


class Files(NamedTuple):
    """A folder of captions, and checkpoints of the two shapes."""

    data: str
    large: str
    small: str


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    where = tmp_path_factory.mktemp("files")
    large = checkpoint(where, "large", LARGE, 0)
    # of the small one's pixels nothing is known
    return Files(captions(where / "data"), large, checkpoint(where, "small", SMALL_ONE, 1, {}))


def test_a_name_is_a_preset_a_run_or_a_checkpoint(files, tmp_path):
    assert sources.find("digits_base", "--teacher").config == presets.get("digits_base")
    settings = small(tmp_path, method="finetune", steps=2)
    run, _ = experiment.run(settings, QUIET)
    for name in (run.folder, run.weights_path):
        found = sources.find(str(name), "--teacher")
        assert found.run is not None
        assert found.run.folder == run.folder
        assert found.config == run.model_config()
        assert found.trained
    found = sources.find(files.large, "--teacher")
    assert found.checkpoint is not None
    assert found.config == LARGE
    assert not sources.find("coca_base", "--student").trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("weights")
    for wrong, message in (
        (
            "coca_tiny13",
            r"--student 'coca_tiny13' is no run folder and no check.*mean 'coca_tiny12",
        ),
        (str(tmp_path / "none"), "no run folder and no checkpoint: there is nothing of that name"),
        (
            str(tmp_path / "empty"),
            r"is a folder with neither a run .* nor a checkpoint \(open_clip",
        ),
        (str(tmp_path / "notes.txt"), r"is no checkpoint: those are \.safetensors, \.pt"),
    ):
        with pytest.raises(UserError, match=message):
            sources.find(wrong, "--student")
    run.model_path.unlink()
    with pytest.raises(UserError, match=r"run is not finished: .* go on with it by --resume "):
        sources.find(str(run.folder), "--teacher")


def test_a_preset_takes_the_form_of_its_start_and_the_patches_of_its_teacher(files, tmp_path):
    given = {"teacher": files.large, "student": "coca_tiny6", "student_init": files.small}
    planned = sources.plan(config(tmp_path, data="x", **given))
    expected = dataclasses.replace(
        SMALL_ONE, image_layers=3, text_layers=2, multimodal_layers=1, patch_size=8
    )
    assert planned.student == expected
    assert planned.start is not None
    assert planned.start.name == files.small
    assert len(planned.notes) == 2
    assert "3/2/1 layers in the form of" in planned.notes[0]
    assert "32 pixels in patches of 8" in planned.notes[1]


def test_a_preset_of_its_own_form_and_patches_stays_as_it_is(tmp_path):
    planned = sources.plan(config(tmp_path, data="x", teacher="coca_large", student="coca_tiny12"))
    assert planned.student == presets.get("coca_tiny12")
    assert planned.start is None
    assert planned.notes == ()
    same = sources.plan(config(tmp_path, data="x", teacher="coca_base", student="coca_tiny12"))
    assert same.start is same.teacher


def test_a_preset_that_starts_at_random_takes_its_teachers_form(files, tmp_path):
    given = {"data": files.data, "teacher": files.large, "student": "digits_student"}
    settings = config(tmp_path, **given)
    planned = sources.plan(settings)
    assert planned.start is None
    assert "2/1/1 layers in the form of" in planned.notes[0]
    own = presets.get("digits_student")
    assert (planned.student.image_stem, planned.student.pooler) == ("clip", "normed")
    assert planned.student.widths == own.widths
    assert planned.student.layer_counts == own.layer_counts
    experiment.rehearse(settings, planned, experiment.load_data(settings, planned))


def test_sizes_that_do_not_go_together_are_told_before_the_teacher_trains(
    files, tmp_path, monkeypatch
):
    # a class token more than the student has, the same for any other reason
    monkeypatch.setattr(sources, "_other_form", lambda one, other: False)
    given = {"data": files.data, "teacher": files.large, "student": "digits_student"}
    settings = config(tmp_path, **given)
    with pytest.raises(UserError, match=r"--student digits_student and --teacher .* on "):
        experiment.run(settings, QUIET)
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_distils_captions_from_an_official_folder(files, tmp_path):
    teacher = checkpoint(tmp_path, "large", LARGE, 0)
    start = checkpoint(tmp_path, "small", SMALL_ONE, 1, {})
    settings = config(
        tmp_path, data=files.data, teacher=teacher, student="coca_tiny6", student_init=start,
        lr=1e-4,
    )  # fmt: skip
    run, summary = experiment.run(settings, QUIET)
    assert summary["arms"]
    shape = run.model_config()
    assert (shape.vocab_size, shape.text_length) == (49408, 20)
    assert shape.layer_counts == {"image": 3, "text": 2, "multimodal": 1}
    assert run.pixels()["mean"] == (0.5, 0.4, 0.3)
    assert run.reading()["std"] == (0.2, 0.3, 0.4)
    # from its files alone: neither checkpoint is there any more
    for name in (teacher, start):
        Path(name).rename(name + "-gone")
    _, metrics, recorded = experiment.evaluate(run.folder)
    assert metrics["cider"] == recorded


def test_a_student_starts_from_the_layers_of_its_checkpoint(files, tmp_path):
    given = {"method": "finetune", "student": "coca_tiny6", "student_init": files.small}
    settings = config(tmp_path, data=files.data, **given)
    models = sources.plan(settings)
    loaded = experiment.load_data(settings, models)
    student = models.new_student(loaded, None)
    source = sources.find(files.small, "--student-init").load()
    for index in range(3):
        sampled = initialise.sampled_layer(index, 3, 6)
        assert torch.equal(
            student.coca.image.layers[index].mlp.up.weight,
            source.image.layers[sampled].mlp.up.weight,
        )
    assert torch.equal(student.coca.text.embedding.weight, source.text.embedding.weight)


def test_a_student_of_its_teacher_starts_from_the_trained_one(files, tmp_path):
    given = {"teacher": files.large, "student": "coca_tiny6", "student_init": "teacher"}
    settings = config(tmp_path, data=files.data, **given)
    models = sources.plan(settings)
    data = experiment.load_data(settings, models)
    trained = models.published_teacher(data)
    with torch.no_grad():
        trained.coca.text.embedding.weight.add_(1.0)
    student = models.new_student(data, trained, 0.25)
    assert torch.equal(student.coca.text.embedding.weight, trained.coca.text.embedding.weight)


def test_a_checkpoint_alone_is_a_student_that_goes_on(files, tmp_path):
    given = {"method": "finetune", "student": files.large, "image_size": 48}
    settings = config(tmp_path, data=files.data, **given)
    models = sources.plan(settings)
    assert models.student == dataclasses.replace(LARGE, image_size=48)
    loaded = experiment.load_data(settings, models)
    student = models.new_student(loaded, None)
    assert student.coca.image.positions.shape == (37, 64)
    source = sources.find(files.large, "--student").load()
    assert torch.equal(student.coca.to_vocabulary.weight, source.to_vocabulary.weight)
    assert loaded.image_size == 48


def test_a_teacher_that_captions_is_taken_as_it_is(files, tmp_path):
    given = {"teacher": files.large, "student": "coca_tiny6", "student_init": "teacher"}
    settings = config(tmp_path, data=files.data, **given, teacher_steps=0)
    _, summary = experiment.run(settings, QUIET)
    assert summary["seconds"]["teacher"] >= 0
    assert not (tmp_path / "cache").exists()
    models = sources.plan(settings)
    loaded = experiment.load_data(settings, models)
    published = models.published_teacher(loaded)
    source = sources.find(files.large, "--teacher").load()
    assert torch.equal(published.coca.text.positions, source.text.positions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "digits"}, "reads photographs and --data digits is the built-in data"),
        ({"tokenizer": "words"}, r"knows 49408 token ids, the tokenizer of the data has \d+"),
        ({"image_size": 33}, "--image-size 33: image_size must be a multiple of patch_size"),
        ({"student": "coca_base", "student_init": "teacher"}, "the student is deeper than its"),
        ({"student_init": "coca_base"}, "must be teacher, random, a run or a checkpoint"),
        ({"task": "vqa", "teacher_steps": 0}, "on vqa has to be trained first"),
        ({"method": "fixed", "arm": "image[9]"}, "image"),
    ],
)
def test_mistakes_with_checkpoints_are_told_before_any_work(files, tmp_path, settings, message):
    given = {"data": files.data, "teacher": files.large, "student": "coca_tiny6"}
    with pytest.raises(UserError, match=message) as caught:
        experiment.run(config(tmp_path, **{**given, "student_init": "teacher", **settings}), QUIET)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_sizes_and_writes_nothing(files, tmp_path, capsys):
    given = {"teacher": files.large, "student": "coca_tiny6", "student_init": files.small}
    dry_run.show(config(tmp_path, data=files.data, method="headroom", **given), Display())
    assert not list(tmp_path.iterdir())
    said = " ".join(capsys.readouterr().out.translate(str.maketrans("│", " ")).split())
    large = sum(p.numel() for p in CoCa(LARGE).parameters())
    assert f"{large:,} parameters" in said
    for part in ("12 examples of 6 images", "49,408 ids", "17 image tokens (4 for the decoder)"):
        assert part in said, part
    for part in (
        "GFLOP",
        "MiB in eager mode",
        "the teacher's own training",
        "from its published",
        "image+text",
    ):
        assert part in said, part


def test_the_papers_settings_are_the_defaults_on_a_folder():
    for task in ("vqa", "snli_ve", "nlvr2", "coco"):
        settings = resolve(TrainConfig(task=task, data="folder"))
        assert (settings.teacher, settings.student) == ("coca_large", "coca_tiny12")


def test_a_missing_data_folder_is_told_before_a_checkpoint_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "plan", lambda config: pytest.fail("looked for models"))
    settings = config(tmp_path, data=str(tmp_path / "none"), teacher="hf-hub:laion/any")
    for begin in (lambda: experiment.run(settings, QUIET), lambda: dry_run.show(settings, QUIET)):
        with pytest.raises(UserError, match="no data folder .*none': give an existing folder"):
            begin()
