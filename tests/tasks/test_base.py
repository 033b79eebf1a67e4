"""Splits, batches, the dispatch of `load`, and what all tasks share."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from optima_fast import tasks
from optima_fast.errors import UserError
from optima_fast.tasks import Vocabulary
from optima_fast.tasks.base import Predictions, evaluating, mean_kl
from optima_fast.tasks.images import FolderImages, Preprocessing
from optima_fast.tasks.snli_ve import SnliVe
from optima_fast.tasks.split import ArrayImages, Split


def images(n):
    return ArrayImages(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2))


def split(n=6, pictures=3, k=1, **options):
    text = torch.arange(n)[:, None].repeat(1, 4)
    index = torch.arange(n * k).remainder(pictures).view(n, k)
    return Split(images(pictures), text, index, torch.arange(n), **options)


def test_a_shared_image_is_in_the_batch_once():
    cells = torch.tensor([[10], [11], [12]])
    batch = split(image_labels={"cells": cells}).batch([5, 0, 2, 3])  # images 2, 0, 2, 0
    assert batch["images"].dtype == torch.float32
    assert (batch["images"][:, 0, 0, 0] * 255).tolist() == [0, 2]
    assert batch["pair_image"].tolist() == [1, 0, 1, 0]
    assert batch["pair_text"].tolist() == [0, 1, 2, 3]
    assert batch["text"][:, 0].tolist() == [5, 0, 2, 3]
    assert batch["target"].tolist() == [5, 0, 2, 3]
    assert batch["cells"].tolist() == [[10], [12]]
    assert {batch[key].dtype for key in ("text", "pair_image", "pair_text")} == {torch.int64}


def test_the_pairs_of_an_example_are_neighbours():
    batch = split(n=3, pictures=6, k=2).batch(torch.tensor([2, 0]))
    shown = batch["images"][batch["pair_image"], 0, 0, 0] * 255
    assert shown.tolist() == [4, 5, 0, 1]
    assert batch["pair_text"].tolist() == [0, 0, 1, 1]


def test_levels_are_standardised():
    some = torch.tensor([0, 51, 255])
    assert images(256)[some][:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    standard = ArrayImages(images(256).levels, mean=0.2, std=0.5)
    assert standard[some][:, 0, 0, 0].tolist() == pytest.approx([-0.4, 0.0, 1.6])
    with pytest.raises(ValueError, match=r"levels must be uint8 \[n, C, H, W\], got torch.float32"):
        ArrayImages(torch.zeros(1, 1, 2, 2))


def test_batches_go_through_everything_in_order():
    parts = [(index.tolist(), batch["target"].tolist()) for index, batch in split().batches(4)]
    assert parts == [([0, 1, 2, 3], [0, 1, 2, 3]), ([4, 5], [4, 5])]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(split().batches(0))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "non-empty"),
        ([[0, 1]], r"shape \(1, 2\)"),
        ([0.0], "float32"),
        ([0, 6], r"in 0 \.\. 5, got 0 \.\. 6"),
        ([-1], r"got -1 \.\. -1"),
    ],
)
def test_bad_indices(indices, message):
    with pytest.raises(ValueError, match=message):
        split().batch(indices)


def test_an_empty_split_is_a_user_error():
    with pytest.raises(UserError, match=r"the test split is empty \(3 images, 0 texts\)"):
        split(n=0, name="test")
    with pytest.raises(UserError, match="empty"):
        Split(images(0), torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ({"kinds": ["a"]}, "kinds"),
        ({"references": [["a"]]}, "references"),
        ({"group": 4}, "group"),
        ({"image_labels": {"cells": torch.zeros(2, 4)}}, "cells"),
    ],
)
def test_parts_that_do_not_fit(options, bad):
    with pytest.raises(ValueError, match=rf"6 texts and 3 images, but not so: {bad}"):
        split(**options)


def test_tensors_that_do_not_fit():
    text, index = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"image_index must be in 0 \.\. 2, got 0 \.\. 3"):
        Split(images(3), text, index)
    with pytest.raises(ValueError, match="but not so: text, image_index, target"):
        Split(images(3), text.float(), index.float(), torch.zeros(3))


def test_kl_is_teacher_against_student_and_equals_torch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    assert float(mean_kl(student, teacher)) == pytest.approx(float(expected), rel=1e-12)
    by_torch = nn.functional.kl_div(student.log_softmax(-1), p, reduction="batchmean")
    assert float(mean_kl(student, teacher)) == pytest.approx(float(by_torch), rel=1e-12)
    assert float(mean_kl(student, teacher)) != pytest.approx(float(mean_kl(teacher, student)))
    assert float(mean_kl(teacher, teacher)) == 0
    assert float(mean_kl(student, teacher + 5)) == pytest.approx(float(expected), rel=1e-12)


def test_kl_has_no_gradient_for_the_teacher_and_is_float32_for_half():
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher = torch.zeros(3, 4, requires_grad=True)
    mean_kl(student, teacher).backward()
    assert teacher.grad is None
    assert float(student.grad.abs().sum()) > 0
    assert mean_kl(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_each_mode_is_restored_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown task 'snli-ve'; did you mean 'snli_ve'"):
        tasks.load("snli-ve")
    with pytest.raises(UserError, match="choose from vqa, snli_ve, nlvr2, coco"):
        tasks.load("translation")


def test_a_missing_folder_is_a_user_error(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no data folder .*nowhere.*'digits'"):
        tasks.load("vqa", missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no data folder"):
        tasks.load("vqa", str(tmp_path / "file"))


def pictured(tmp_path, n=6, pictures=3, k=1, broken=(), **options):
    """A split like `split`, on files of one level each, some of them broken."""
    paths = [tmp_path / f"{i}.png" for i in range(pictures)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (10 * i,) * 3).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:40])
    source = FolderImages(paths, Preprocessing(4, mean=(0, 0, 0), std=(1, 1, 1)))
    text = torch.arange(n)[:, None].repeat(1, 4)
    index = torch.arange(n * k).remainder(pictures).view(n, k)
    return Split(source, text, index, torch.arange(n) % 2, **options)


def test_an_unreadable_image_is_an_error_that_names_it(tmp_path):
    some = pictured(tmp_path, broken=[1])
    assert some.load(torch.tensor([0, 2])).errors == {}
    with pytest.raises(UserError, match=r"cannot read the image .*1\.png"):
        some.load(torch.tensor([0, 1]))
    for workers in (0, 1):
        some.workers = workers
        with pytest.raises(UserError, match=r"^cannot read the image .*1\.png: [^\n]*$"):
            list(some.batches(2))
        with pytest.raises(UserError, match=r"^cannot read the image .*1\.png: [^\n]*$"):
            list(some.image_batches(2))


def test_what_shows_an_unreadable_image_is_left_out_by_choice(tmp_path):
    some = pictured(tmp_path, n=4, pictures=5, k=2, broken=[1, 3], image_errors="skip")
    # the examples show (0, 1), (2, 3), (4, 0), (1, 2)
    loaded = some.load(torch.tensor([2, 0, 3]))
    assert loaded.index.tolist() == [2]
    assert list(loaded.errors) == [1]
    shown = (loaded.batch["images"] * 255).round()[loaded.batch["pair_image"], 0, 0, 0]
    assert shown.tolist() == [40, 0]
    assert loaded.batch["text"][:, 0].tolist() == [2]
    assert loaded.batch["target"].tolist() == [0]
    nothing = some.load(torch.tensor([1, 0]))
    assert (len(nothing.index), nothing.batch, sorted(nothing.errors)) == (0, {}, [1, 3])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_unreadable_file_is_named_once(tmp_path, caplog, workers):
    some = pictured(tmp_path, broken=[1], image_errors="skip", workers=workers)
    assert some.readable().all()
    for _ in range(2):
        parts = [(index.tolist(), batch["target"].tolist()) for index, batch in some.batches(2)]
        assert parts == [([0], [0]), ([2, 3], [0, 1]), ([5], [1])]
        numbers = [number.tolist() for number, _ in some.image_batches(2)]
        assert numbers == [[0], [2]]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "1.png" in message
    assert message.endswith("what shows it is left out")
    assert list(some.unreadable) == [1]
    assert some.readable().tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_batches(tmp_path, workers):
    plain, ahead = pictured(tmp_path), pictured(tmp_path, workers=workers)
    for (a, one), (b, other) in zip(plain.batches(4), ahead.batches(4), strict=True):
        assert torch.equal(a, b)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for (a, one), (b, other) in zip(plain.image_batches(2), ahead.image_batches(2), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(one, other)


class Constant(nn.Module):
    """Always the class 1, with a loss that differs between examples."""

    def forward(self, batch):
        certain = 1.0 + batch["text"][:, :1].float()
        return SimpleNamespace(logits=torch.cat([-certain, certain], 1))


def test_an_evaluation_counts_what_it_leaves_out(tmp_path):
    kinds = [*"abcabc"]
    whole = pictured(tmp_path, kinds=kinds)
    task = SnliVe(Vocabulary(["a"]), 4, 4, 3, whole, whole, whole, ("no", "yes"))
    complete = task.evaluate(Constant(), whole, batch_size=4)
    assert complete["accuracy"] == 0.5
    assert "left_out" not in complete
    part = pictured(tmp_path, broken=[1], kinds=kinds, image_errors="skip")
    found = task.evaluate(Constant(), part, batch_size=4)  # 0, 2, 3, 5 are left
    assert found["left_out"] == 2
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["accuracy/a"] == pytest.approx(0.5)
    logits = [(1.0 + i) * torch.tensor([-1.0, 1.0]) for i in (0, 2, 3, 5)]
    losses = [-torch.log_softmax(x, 0)[i % 2] for x, i in zip(logits, (0, 2, 3, 5), strict=True)]
    assert found["loss"] == pytest.approx(float(sum(losses)) / 4, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 5])  # of 3 batches
def test_parts_of_a_split_are_evaluated_as_the_whole(tmp_path, parts):
    options = {"broken": [1], "kinds": [*"abcabc"], "image_errors": "skip"}
    whole = pictured(tmp_path, **options)
    task = SnliVe(Vocabulary(["a"]), 4, 4, 3, whole, whole, whole, ("no", "yes"))
    expected = task.evaluate(Constant(), whole, batch_size=2)
    divided = pictured(tmp_path, **options)
    said = [task.predict(Constant(), divided.part(i, parts), batch_size=2) for i in range(parts)]
    seen = [sum(bool(text) for text in each.texts) for each in said]
    assert sum(seen) == 4
    assert max(seen) < 4 or parts == 1
    merged = Predictions.merged(said)
    assert task.metrics(divided, merged) == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert merged.count == 4
    assert Predictions.merged([Predictions(["a", ""]), Predictions(["", "b"])]).texts == ["a", "b"]
