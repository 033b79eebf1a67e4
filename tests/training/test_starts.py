"""What a run takes over from its teacher and its start: tokenizer, pixels, sizes; kept teachers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from official import edit, make_coco, make_vqa
from small_run import QUIET, small

from optima_fast.errors import UserError
from optima_fast.models import CoCa, open_clip, presets
from optima_fast.tasks import tokenizers
from optima_fast.training import checkpoints, dry_run, experiment, sources, teachers
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.run import Run

SHAPE = presets.get("digits_base")


def config(tmp_path: Path, **settings: object) -> TrainConfig:
    given = {"method": "headroom", "init_rounds": None, "train_images": None, "workers": "0"}
    given |= {"task": "vqa", "data": str(tmp_path / "data"), "student": "digits_student"}
    given |= {"teacher": "digits_base", "reward_examples": 2, "steps": 2, "batch_size": 2}
    return small(tmp_path, **{**given, **settings})


def run_of(tmp_path: Path, name: str = "first", **settings: object) -> Run:
    """A run of two steps on a folder."""
    given = {"method": "finetune", "image_size": 24, "tokenizer": "words", "teacher": None}
    settings = {**given, **settings, "out": str(tmp_path / name)}
    return experiment.run(config(tmp_path, **settings), QUIET)[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A run on VQA whose pixels are normalised in its own way."""
    folder = tmp_path_factory.mktemp("finished")
    make_vqa(folder / "data")
    run = run_of(folder)
    described = checkpoints.read_json(run.model_path)
    described["pixels"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize": "squash"}
    checkpoints.write_json(run.model_path, described)
    # a run that goes on from it hands on how images are read
    return run_of(folder, "second", student=str(run.folder))


def data_of(run: Run) -> str:
    return run.config().data


def test_a_run_that_teaches_decides_how_images_and_texts_are_read(finished, tmp_path):
    settings = config(tmp_path, data=data_of(finished), teacher=str(finished.folder))
    data = experiment.load_data(settings)
    seen = data.train.images.preprocessing
    assert (seen.mean, seen.std, seen.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")
    assert data.tokenizer.to_dict() == finished.tokenizer().to_dict()
    assert data.text_length == finished.reading()["text_length"]
    # a student of its shape starts from its layers, whatever the preset says of the vocabulary
    models = sources.plan(settings)
    assert models.start is models.teacher


def test_a_run_goes_on_with_images_of_another_size(finished, tmp_path):
    settings = config(
        tmp_path, data=data_of(finished), method="finetune", teacher=None,
        student=str(finished.folder), image_size=36,
    )  # fmt: skip
    models = sources.plan(settings)
    data = experiment.load_data(settings, models)
    assert data.image_size == 36
    student = models.new_student(data, None, 0.25)
    assert student.head.dropout.p == 0.25
    assert student.coca.config.image_size == 36
    assert torch.equal(student.coca.text.positions, finished.load_coca().text.positions)


def test_a_teacher_that_is_a_run_keeps_its_image_size(finished, tmp_path):
    settings = config(tmp_path, teacher=str(finished.folder), image_size=36)
    with pytest.raises(UserError, match=r"--image-size 36: .* was trained on images of 24 pixels"):
        sources.plan(settings)
    assert sources.plan(dataclasses.replace(settings, image_size=24)).student.image_size == 24


def test_an_image_size_is_that_of_both_models(tmp_path):
    settings = config(tmp_path, teacher="coca_base", student="coca_tiny6", image_size=144)
    models = sources.plan(settings)
    assert models.teacher.config == dataclasses.replace(presets.get("coca_base"), image_size=144)
    assert models.student == dataclasses.replace(presets.get("coca_tiny6"), image_size=144)


def test_a_tokenizer_that_is_not_the_run_s_is_refused(finished, tmp_path):
    given = {"data": data_of(finished), "teacher": str(finished.folder)}
    for tokenizer in (None, "words"):  # the run's own
        settings = config(tmp_path, **given, tokenizer=tokenizer)
        assert len(experiment.load_data(settings).tokenizer) == len(finished.tokenizer())
    with pytest.raises(UserError, match=r"--tokenizer clip is not what .* leave --tokenizer out"):
        experiment.load_data(config(tmp_path, **given, tokenizer="clip"))


def test_a_start_of_other_words_is_refused_though_their_number_is_the_same(finished, tmp_path):
    other = run_of(tmp_path, data=data_of(finished))
    described = checkpoints.read_json(other.model_path)
    words = described["tokenizer"]["words"]
    words[-2:] = words[-2:][::-1]
    checkpoints.write_json(other.model_path, described)
    assert len(tokenizers.from_dict(described["tokenizer"])) == len(finished.tokenizer())
    settings = config(
        tmp_path, data=data_of(finished), teacher=str(finished.folder),
        student_init=str(other.folder),
    )  # fmt: skip
    with pytest.raises(UserError, match="first was trained with another tokenizer"):
        experiment.run(settings, QUIET)
    assert not Path(settings.out).exists()


def test_steps_of_a_teacher_that_is_trained_already_do_not_matter(finished, tmp_path):
    settings = config(
        tmp_path, data=data_of(finished), teacher=str(finished.folder), teacher_steps=0
    )
    assert sources.plan(settings).teacher.run is not None


def test_a_form_that_a_student_cannot_take_is_told(tmp_path):
    # without a pooler widths must be equal
    student = dataclasses.replace(presets.get("coca_ViT-B-32"), text_width=64, text_heads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "narrow", student)
        settings = config(tmp_path, student="narrow", teacher="open_clip_coca_base")
        with pytest.raises(UserError, match="cannot take the form of open_clip_coca_base: without"):
            sources.plan(settings)


def test_a_step_without_a_teacher_is_tried_before_it_is_taken(finished, tmp_path, monkeypatch):
    settings = config(tmp_path, data=data_of(finished), method="finetune", teacher=None)
    monkeypatch.setattr(sources, "sized", lambda shape, data, start: shape)  # one channel, not 3
    with pytest.raises(UserError, match=r"--student digits_student .*: images must be \[I, 1, 24"):
        experiment.run(settings, QUIET)
    assert not Path(settings.out).exists()


def test_texts_fit_the_shorter_of_both_models(tmp_path):
    shapes = [dataclasses.replace(SHAPE, text_length=n) for n in (9, 7)]
    for student, teacher in (shapes, shapes[::-1]):
        models = sources.Models(student, None, sources.Source("teacher", teacher))
        assert models.reading(config(tmp_path))["max_text_length"] == 7


def kept(settings: TrainConfig, device: str = "cpu") -> str:
    """The name of the folder of the trained teacher."""
    models = sources.plan(settings)
    data = experiment.load_data(settings, models)
    own = resolve(teachers.teacher_config(settings))
    return teachers.cached_run(own, models.teacher, data, torch.device(device)).folder.name


def test_a_kept_teacher_is_of_its_data(tmp_path):
    root = make_vqa(tmp_path / "data")
    settings = config(tmp_path, tokenizer="words", image_size=24)
    names = [kept(settings)]
    file = root / "v2_mscoco_train2014_annotations.json"
    file.touch()
    assert kept(settings) == names[0]

    def swap(content: dict) -> None:
        first, second, *_ = content["annotations"]
        first["answers"], second["answers"] = second["answers"], first["answers"]

    edit(file, swap)
    names.append(kept(settings))
    real = (tmp_path / "real").resolve()
    root.rename(real)  # annotations behind a link are read, so they count
    root.symlink_to(real, target_is_directory=True)
    assert kept(settings) == names[-1]
    edit(root / "v2_mscoco_val2014_annotations.json", swap)
    names.append(kept(settings))
    assert len(set(names)) == 3
    for change in (
        {"data_seed": 1},
        {"teacher_lr": 0.5},
        {"augment": "1,5"},
        {"precision": "bf16"},
    ):
        names.append(kept(dataclasses.replace(settings, **change)))
    assert len(set(names)) == 7
    for same in ({"seed": 3}, {"lr": 0.5}, {"threads": 1}, {"workers": "1"}, {"out": "x"}):
        assert kept(dataclasses.replace(settings, **same)) == names[2], same


def test_a_kept_teacher_is_of_its_captions(tmp_path):
    root = make_coco(tmp_path / "data")
    settings = config(tmp_path, task="coco", tokenizer="words", image_size=24)
    before = kept(settings)

    def swap(content: dict) -> None:
        for entry in content["annotations"]:
            entry["image_id"] = {100: 101, 101: 100}.get(entry["image_id"], entry["image_id"])

    edit(root / "annotations" / "captions_val2017.json", swap)
    assert kept(settings) != before
    assert kept(settings, "cuda") != kept(settings, "cpu")


def test_a_kept_teacher_is_of_its_checkpoint_and_its_description(tmp_path):
    make_coco(tmp_path / "data")
    shape = dataclasses.replace(
        presets.get("coca_ViT-B-32"), image_size=32, image_width=64, image_heads=1, text_width=64,
        text_heads=1, image_layers=2, text_layers=1, multimodal_layers=1, pooler_queries=5,
        contrastive_width=64, text_length=20, pooler_heads=1,
    )  # fmt: skip
    folder = tmp_path / "checkpoint"
    weights = folder / "open_clip_model.safetensors"
    checkpoints.save_state(weights, open_clip.to_open_clip(CoCa(shape)))
    settings = config(tmp_path, task="coco", teacher=str(folder), student="coca_tiny6")
    names = []
    same = open_clip.model_cfg(shape)
    other = open_clip.model_cfg(dataclasses.replace(shape, pooler_heads=2))
    for model, options in (
        (same, {}),
        (same, {"mean": [0.5, 0.5, 0.5]}),
        (same, {"std": [0.5, 0.5, 0.5]}),
        (other, {}),
    ):
        described = {"model_cfg": model, "preprocess_cfg": options}
        (folder / "open_clip_config.json").write_text(json.dumps(described))
        names += [kept(settings), kept(settings)]
    checkpoints.save_state(weights, open_clip.to_open_clip(CoCa(shape)))
    names.append(kept(settings))  # another checkpoint under the same name
    assert len(set(names)) == 5


def test_a_dry_run_counts_the_images_that_a_batch_shows(tmp_path, monkeypatch):
    """Questions of one image stand together in the files, and are drawn apart."""
    make_vqa(tmp_path / "data", images=12)
    batches = []
    real = dry_run.cost.step_memory

    def keep(student, teacher, data, batch, **settings):
        batches.append(batch)
        return real(student, teacher, data, batch, **settings)

    monkeypatch.setattr(dry_run.cost, "step_memory", keep)
    settings = config(tmp_path, method="layerwise", batch_size=8, tokenizer="words", image_size=24)
    settings = dataclasses.replace(settings, teacher_batch_size=3, augment="1,10", workers="1")
    dry_run.show(settings, QUIET)
    step, own = batches
    first = experiment.training_sampler(settings, experiment.load_data(settings).train).at(0)
    assert len(step["text"]) == 8
    assert len(step["images"]) == len({int(i) // 2 for i in first}) > 4
    assert len(own["text"]) == 3
