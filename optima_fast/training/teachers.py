"""Where a run's teacher comes from: a run folder, or a preset trained on the task and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import torch

import optima_fast
from optima_fast.tasks import TaskData
from optima_fast.training.config import TrainConfig
from optima_fast.training.run import Run, pixels_of
from optima_fast.training.sources import Source

_ROOMS = ("models", "tasks", "training")


def cache_folder(config: TrainConfig) -> Path:
    """``--cache``, or ``$OPTIMA_FAST_CACHE``, or ``~/.cache/optima_fast``."""
    chosen = config.cache or os.environ.get("OPTIMA_FAST_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "optima_fast"


def teacher_config(config: TrainConfig) -> TrainConfig:
    """Settings of the teacher's own training: finetuning of ``config.teacher`` on the same data."""
    assert config.teacher_steps is not None
    return TrainConfig(
        task=config.task,
        data=config.data,
        method="finetune",
        student=config.teacher,
        tokenizer=config.tokenizer,
        image_size=config.image_size,
        steps=config.teacher_steps,
        train_images=config.train_images,
        augment=config.augment,
        image_errors=config.image_errors,
        lr=config.teacher_lr,
        head_lr=config.teacher_head_lr,
        batch_size=config.teacher_batch_size,
        weight_decay=config.weight_decay,
        clip=config.clip,
        cell_stage=0.3 if config.data == "digits" else 0.0,
        seed=config.teacher_seed,
        data_seed=config.data_seed,
        device=config.device,
        compile=config.compile,
        precision=config.precision,
        threads=config.threads,
        workers=config.workers,
        max_hours=config.max_hours,
        accumulate=config.accumulate,
        recompute=config.recompute,
        fsdp=config.fsdp,
        cache=config.cache,
    )


def cached_run(config: TrainConfig, source: Source, data: TaskData, device: torch.device) -> Run:
    """The folder that holds the trained teacher of these (its own, resolved) settings.

    Its name is a digest of the settings, the checkpoint it starts from, the kind of device, the
    data as it was read (of images their files' names and how they are normalised), this package's
    models, tasks and training code and the version of torch: when one of them changes, so does the
    folder.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(Run.computed_by(dataclasses.asdict(config))).encode())
    digest.update(json.dumps([device.type, data.tokenizer.to_dict(), data.classes]).encode())
    sizes = [data.text_length, data.image_size, data.channels, pixels_of(data)]
    digest.update(json.dumps([sizes, source.config.to_dict()]).encode())
    for split in (data.train, data.validation, data.test):
        digest.update(split.digest().encode())
    digest.update(torch.__version__.encode())
    digest.update(code_digest(*_ROOMS).encode())
    if source.checkpoint is not None:
        file = source.checkpoint.path.resolve()
        digest.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    kind = re.sub(r"[^\w.]+", "-", Path(str(config.student)).name)
    name = f"{config.task}-{kind}-{digest.hexdigest()[:12]}"
    return Run(cache_folder(config) / "teachers" / name)


def code_digest(*rooms: str) -> str:
    """SHA-256 of this package's sources in these folders."""
    digest = hashlib.sha256()
    for room in rooms:
        for path in sorted((Path(optima_fast.__file__).parent / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
