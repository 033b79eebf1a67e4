"""What a teacher said is kept on disk: the same losses, whole rows, room for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import DEFAULT_CHOICE, QUIET, NothingIsRead, small, stop, trainer, untimed

from optima_fast.errors import UserError
from optima_fast.training import (
    cache_plan,
    checkpoints,
    dry_run,
    experiment,
    kept_rows,
    sources,
    teacher_cache,
)
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.kept_rows import Rows, locked
from optima_fast.training.trainer import Trainer

# 16 images are 4 batches of VQA and COCO, and 2 of NLVR2, which shows two at once
TINY = {"train_images": 16, "method": "layerwise", "steps": 10, "log_every": 1, "eval_every": 99}
EVERYTHING = {"kl_weight": 1.0, "cross_attention": True, "attention_loss": "probs"}


def cached(folder: Path, name: str = "kept", **settings) -> Trainer:
    return trainer(folder, teacher_cache=str(folder.parent / name), **{**TINY, **settings})


def teaching(t: Trainer) -> list[int]:
    """The steps in which the teacher itself runs from now on."""
    steps: list[int] = []
    t.cached.teacher.coca.register_forward_pre_hook(lambda *_: steps.append(t.step))
    return steps


def same(one: Trainer, other: Trainer) -> None:
    for a, b in ((one.student, other.student), (one.distiller, other.distiller)):
        state = b.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in a.state_dict().items())
    assert untimed(one.run) == untimed(other.run)


@pytest.mark.parametrize(
    ("task", "epoch", "settings"),
    [
        ("vqa", 4, {}),
        ("vqa", 4, {"method": "kd"}),
        ("vqa", 4, {"method": "fixed", "arm": "text+image[2]", "layer_mapping": "reversed"}),
        ("nlvr2", 2, EVERYTHING),
        ("coco", 4, {**EVERYTHING, "cross_both_ways": True}),
        ("coco", 4, {"attention_loss": "relations", "relation_heads": 4, "accumulate": 2}),
    ],
)
def test_a_second_epoch_has_no_teacher_and_the_same_losses(tmp_path, task, epoch, settings):
    whole = trainer(tmp_path / "whole", **{**TINY, "task": task, **settings})
    whole.fit()
    t = cached(tmp_path / "kept", task=task, teacher_cache_dtype="fp32", **settings)
    ran = teaching(t)
    t.fit()
    assert set(ran) == set(range(epoch))
    same(whole, t)


def test_a_bandit_s_arms_and_rewards_are_those_of_the_teacher_itself(tmp_path):
    settings = {**DEFAULT_CHOICE, "round_steps": 1, "steps": 12, "teacher_cache_dtype": "fp32"}
    whole = trainer(tmp_path / "whole", **{**TINY, **settings})
    whole.fit()
    t = cached(tmp_path / "kept", **settings)
    t.fit()
    same(whole, t)


def test_bf16_is_close_and_does_not_depend_on_what_was_kept(tmp_path):
    settings = {"task": "coco", **EVERYTHING}
    exact = trainer(tmp_path / "exact", **TINY, **settings)
    first, again = (cached(tmp_path / name, **settings) for name in ("first", "again"))
    exact.fit()
    first.fit()
    ran = teaching(again)
    again.fit()
    assert not ran  # another run left all of it
    same(first, again)
    for a, b in zip(exact.run.metrics(), first.run.metrics(), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
    assert untimed(exact.run) != untimed(first.run)
    bytes_of = [f.stat().st_size for f in first.cached.folder.glob("*.bin")]
    assert sum(bytes_of) == cache_plan.needed(first.config, first.cached.kinds)


def test_two_runs_at_the_same_time_share_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "WAITING", 0)
    alone = trainer(tmp_path / "alone", **TINY)
    alone.fit()
    one, two = (
        cached(tmp_path / name, teacher_cache_dtype="fp32", steps=10) for name in ("one", "two")
    )
    ran = teaching(two)
    for _ in range(10):
        for t in (one, two):
            t.arm = t.fixed_arm
            t._train_step()
            t.step += 1
    assert not ran
    for t in (one, two):
        state = t.student.state_dict()
        assert all(torch.equal(v, state[n]) for n, v in alone.student.state_dict().items())


def test_a_step_that_is_served_waits_for_nothing(tmp_path):
    t = cached(tmp_path / "run", **EVERYTHING)
    t.arm = t.fixed_arm
    parts = t._next_parts()
    t._next_parts = lambda: parts
    t._train_step()
    ran = teaching(t)
    with t.cached.seeing(parts[0].index):
        t._seeing = lambda _: contextlib.nullcontext()  # what it looks up is on the CPU anyway
        t.cached.flush()
        with NothingIsRead():
            t._train_step()
    assert not ran


def test_another_teacher_or_other_data_has_other_rows(tmp_path):
    first = cached(tmp_path / "first")
    folders = {first.cached.folder}
    for i, settings in enumerate(
        ({"data_seed": 1}, {"cross_attention": True}, {"layer_mapping": "reversed"}, {"lr": 0.1})
    ):
        folders.add(cached(tmp_path / str(i), **settings).cached.folder)
    assert len(folders) == 3  # a mapping that goes back is of the same layers
    again = trainer(tmp_path / "again", **TINY)
    with torch.no_grad():
        again.distiller.teacher.coca.text.embedding.weight[3, 3] += 1
    digest = checkpoints.digest(again.distiller.teacher)
    config = first.config
    layers = {n: [p.teacher for p in pairs] for n, pairs in again.distiller.pairs.items()}
    other = teacher_cache.CachedTeacher(
        again.distiller.teacher, config, again.data, layers, digest=digest, bf16=False
    )
    assert other.folder not in folders


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_stopped_run_goes_on_exactly(tmp_path, dtype):
    whole = cached(tmp_path / "whole", "a", teacher_cache_dtype=dtype)
    whole.fit()
    parts = cached(tmp_path / "parts", "b", teacher_cache_dtype=dtype)
    stop(parts, after=3)
    for file in (tmp_path / "b").glob("*/text.*"):
        file.unlink()
    parts = cached(tmp_path / "parts", "b", teacher_cache_dtype=dtype)
    parts.resume(checkpoints.latest_checkpoint(parts.run.checkpoints))
    parts.fit()
    same(whole, parts)


def test_rounding_must_match_where_a_run_goes_on_and_the_folder_need_not(tmp_path):
    rounded = cached(tmp_path / "rounded")
    path = rounded.save()
    cached(tmp_path / "moved", "elsewhere", teacher_cache_gb=2.0).resume(path)
    plain = trainer(tmp_path / "plain", **TINY)
    message = "teacher_cache_dtype is bf16 there and fp32, or no --teacher-cache here"
    with pytest.raises(UserError, match=message):
        plain.resume(path)
    with pytest.raises(UserError, match="--teacher-cache-dtype was bf16 there and is fp32, or no"):
        rounded.run.check_same(plain.config)
    exact = cached(tmp_path / "exact", teacher_cache_dtype="fp32")
    exact.resume(plain.save())
    plain.run.check_same(exact.config)


def test_what_cannot_be_kept_is_refused(tmp_path):
    folder = {"task": "vqa", "data": "somewhere", "teacher_cache": "c"}
    with pytest.raises(UserError, match=r"another one in every epoch with --augment 1,10: give"):
        resolve(TrainConfig(**folder))
    resolve(TrainConfig(**folder, augment="none"))
    with pytest.raises(UserError, match="--fsdp true has all run it together"):
        TrainConfig(teacher_cache="c", fsdp=True)
    with pytest.raises(UserError, match="--teacher-cache-dtype must be one of bf16, fp32, got"):
        TrainConfig(teacher_cache_dtype="fp16")
    with pytest.raises(UserError, match="--teacher-cache-gb must be positive"):
        TrainConfig(teacher_cache_gb=0.0)


def test_what_has_no_room_is_refused_before_any_training(tmp_path, monkeypatch):
    given = {**TINY, "teacher_cache": str(tmp_path / "kept"), "teacher_cache_dtype": "fp32"}
    config = small(tmp_path, **given, teacher_cache_gb=1e-6)
    parts = r"image 16 x 9,\d{3}, text 64 x 2,016, multimodal 64 x 2,016 numbers of 4 bytes"
    with pytest.raises(UserError, match=rf"needs 1\.\d\d MB \({parts}\), more than --teacher-c"):
        experiment.run(config, QUIET)
    assert not list(tmp_path.iterdir())  # no teacher, no run
    cached(tmp_path / "first")
    size = sum(f.stat().st_size for f in (tmp_path / "kept").glob("*/*.bin"))
    bound = {"teacher_cache_gb": 1.5 * size / 1e9}
    cached(tmp_path / "again", **bound)
    with pytest.raises(
        UserError, match=r"MB of others, more .* delete sub-folders that no run needs"
    ):
        cached(tmp_path / "other", data_seed=1, **bound)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(
        UserError, match=r"has [0-9.]+ MB free: make room, take --teacher-cache-dtyp"
    ):
        experiment.run(small(tmp_path, **given), QUIET)


def test_a_dry_run_says_how_much_it_would_be(tmp_path, capsys):
    config = small(tmp_path, **TINY, **EVERYTHING, teacher_cache=str(tmp_path / "kept"))
    dry_run.show(config, Display())
    said = " ".join(capsys.readouterr().out.split())
    words = " ".join(re.sub(r"[^\w.,()]", " ", said).split())
    kept = "teacher cache 0.95 MB (image 16 x 9,216, text 64 x 2,016, multimodal 64 x 2,688, "
    assert kept + "cross 16 x 1,536, logits 64 x 12 numbers of 2 bytes)" in words
    assert not list(tmp_path.iterdir())


def test_images_that_the_teacher_has_yet_to_caption_have_rows_too(tmp_path):
    (tmp_path / "extra").mkdir()
    for name in "ab":
        (tmp_path / "extra" / f"{name}.png").touch()
    given = {**TINY, "task": "coco", "teacher_cache": str(tmp_path / "kept")}
    config = small(tmp_path, **given, extra_images=str(tmp_path / "extra"))
    kinds = experiment.cached_kinds(config, sources.plan(config), experiment.load_data(config))
    assert {name: kind.rows for name, kind in kinds.items()} == {
        "image": 16 + 2,
        "text": 5 * (16 + 2),
        "multimodal": 5 * (16 + 2),
    }


def _cut(folder: Path) -> None:
    os.truncate(folder / "text.bin", 10)


def _mark(folder: Path) -> None:
    marks = np.memmap(folder / "image.map", np.uint8, "r+")
    marks[3] = 7
    marks.flush()


def _describe(folder: Path) -> None:
    path = folder / "description.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "fp32"}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut, r"text\.bin is damaged or of something else: it has 10 bytes, not 258,048; delete"),
        (_mark, r"image\.map is damaged .*: a mark is neither 0 nor 1; delete the folder"),
        (_describe, r"description\.json is damaged or of something else: delete the folder"),
    ],
)
def test_damaged_files_are_refused(tmp_path, harm, message):
    t = cached(tmp_path / "run")
    t.fit()
    harm(t.cached.folder)
    with pytest.raises(UserError, match=message):
        cached(tmp_path / "again")


# ---------------------------------------------------------------------- rows


def rows_of(folder: Path, count: int = 40, width: int = 300) -> Rows:
    with locked(folder):
        return Rows(folder, "some", count, width, torch.bfloat16)


def there(rows: Rows, count: int = 40) -> list[int]:
    return [i for i in range(count) if rows.have(torch.tensor([i]))]


def test_rows_come_back_in_any_columns(tmp_path):
    rows, other = rows_of(tmp_path), rows_of(tmp_path)
    values = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.tensor([7, 2, 30])
    rows.add(index, values)
    assert not rows.have(index)
    assert rows.have(index, waiting=True)
    with locked(tmp_path):
        rows.write()
    assert there(other) == [2, 7, 30]  # seen by whoever had them open
    taken = other.take(index.flip(0), 10, 200, torch.device("cpu"))
    assert torch.equal(taken, values.flip(0)[:, 10:200])


def test_a_row_is_written_once(tmp_path):
    writers = rows_of(tmp_path), rows_of(tmp_path)
    for value, rows in enumerate(writers, 1):
        rows.add(torch.arange(value, 3), torch.full((3 - value, 300), float(value)).bfloat16())
    for rows in writers:
        with locked(tmp_path):
            rows.write()
        assert not rows.waiting
    taken = writers[0].take(torch.arange(4), 0, 1, torch.device("cpu"))
    assert taken.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]


def test_no_row_is_marked_before_it_is_on_disk(tmp_path, monkeypatch):
    rows, other = rows_of(tmp_path), rows_of(tmp_path)
    rows.add(torch.arange(5), torch.ones(5, 300).bfloat16())
    flushed = []

    def fsync(handle):
        flushed.append(there(other))
        assert (tmp_path / "some.bin").read_bytes()[: 5 * 600] == 5 * 300 * b"\x80\x3f"
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_rows.os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        rows.write()
    assert flushed == [[]]
    assert there(rows_of(tmp_path)) == []


WRITERS = """
import os, sys
from pathlib import Path
import torch
from optima_fast.training.kept_rows import Rows, locked
folder, count, width = Path(sys.argv[1]), *map(int, sys.argv[2:])
first = os.fork()
value = 2.0 if first else 1.0
if first:
    print(first, flush=True)
with locked(folder):
    rows = Rows(folder, "some", count, width, torch.bfloat16)
for i in range(0, count, 4):
    rows.add(torch.arange(i, i + 4), torch.full((4, width), value).bfloat16())
    with locked(folder):
        rows.write()
"""


def test_processes_write_each_row_once_and_one_that_is_killed_leaves_whole_rows(tmp_path):
    count, width = 4000, 50_000
    command = [sys.executable, "-c", WRITERS, tmp_path, str(count), str(width)]
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first = int(second.stdout.readline())
    rows = rows_of(tmp_path, count, width)
    while not rows.have(torch.arange(40)):
        assert second.poll() is None
    for process in (first, second.pid):
        os.kill(process, signal.SIGKILL)
    second.communicate()  # once both are gone
    found = torch.tensor(there(rows_of(tmp_path, count, width), count))
    assert 40 <= len(found) < count
    values = rows.take(found, 0, width, torch.device("cpu"))
    assert torch.equal(values, values[:, :1].expand_as(values))
    assert set(values[:, 0].tolist()) <= {1.0, 2.0}
