"""One run from settings to summary: data, teacher, student, training, test."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import optima_fast
from optima_fast import tasks
from optima_fast.distill import Distiller
from optima_fast.errors import UserError, unknown
from optima_fast.models import MODULES, CoCa, CoCaConfig, initialise, presets
from optima_fast.models.task_model import TaskModel, build
from optima_fast.tasks import TaskData, submissions
from optima_fast.tasks.folders import FURTHER, SPLITS
from optima_fast.tasks.shards import is_shards
from optima_fast.tasks.workers import usable_cores
from optima_fast.training import (
    cache_plan,
    checkpoints,
    compiling,
    loader,
    parallel,
    policies,
    predicting,
    pretence,
    pseudo,
    ranks,
    sources,
    teachers,
    tracking,
)
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.pretence import pretended
from optima_fast.training.rewards import training_sampler
from optima_fast.training.run import Run
from optima_fast.training.sources import Models
from optima_fast.training.trainer import Trainer, distilled

Summary = dict[str, Any]

# where a summary has the main metric of a split
_RECORDED = {"test": "student_metric", "validation": "validation_metric"}


def run(config: TrainConfig, display: Display) -> tuple[Run, Summary]:
    """Do, or go on with, the run that ``config`` describes.

    Returns:
        Its folder and its summary (also in ``summary.json``).

    Raises:
        UserError: a mistake in settings, data or files; nothing on disk was harmed.
        Interrupted: Ctrl-C; the run can be gone on with.
    """
    device = prepare(config)
    with ranks.joined(device):
        return _run(config, display, device)


def _run(config: TrainConfig, display: Display, device: torch.device) -> tuple[Run, Summary]:
    config, folder = ranks.of_first(lambda: place(config))
    if ranks.of_first(folder.finished):
        display.note(f"{folder.folder} is finished already; another --out starts another run")
        return folder, folder.summary()
    with ranks.together():
        parallel.check(config)
        tracking.check(config)
        tasks.check(config.data)
        models = sources.plan(config)
        if models.teacher is not None and models.teacher.run is None and config.teacher_steps:
            parallel.check(resolve(teachers.teacher_config(config)))
        for note in models.notes:
            display.note(f"student: {config.student}, {note}")
        data = load_data(config, models)
        rehearse(config, models, data)
        folder.check_data(data)
    with folder.held():
        began = time.perf_counter()
        teacher, teacher_metric, taught = _teacher(config, models, data, display, device)
        teacher_seconds = time.perf_counter() - began
        summary = train(config, models, folder, data, display, teacher, device)
        summary |= {
            "teacher_metric": teacher_metric,
            "teacher_params": count(teacher) if teacher else None,
        }
        summary["seconds"]["teacher"] += teacher_seconds
        if taught is not None:
            folder.remember_teacher(taught)
        checkpoints.write_json(folder.summary_path, summary)
    return folder, summary


def settings(given: Mapping[str, Any]) -> TrainConfig:
    """The settings that were given, over the defaults or over those of the run to go on with.

    Raises:
        UserError: ``resume`` names a folder without a run, or settings contradict each other.
    """
    resume = given.get("resume", "auto")
    if resume in ("auto", "never"):
        return TrainConfig(**given)
    if given.get("out", resume) != resume:
        raise UserError(f"--resume {resume} goes on in that folder: leave --out {given['out']} out")
    return dataclasses.replace(Run(resume).config(), **{**given, "out": resume})


def place(config: TrainConfig) -> tuple[TrainConfig, Run]:
    """Resolve the settings and find the folder: a new one, or one to go on with."""
    if config.resume not in ("auto", "never"):
        folder = Run(config.resume)
        folder.check_same(config)
        return config, folder
    config = resolve(config)
    if config.out is None:
        return _default_place(config)
    folder = Run(config.out)
    if folder.exists():
        if config.resume == "never":
            raise UserError(f"{folder.folder} already holds a run: choose another --out")
        folder.check_same(config)
    elif folder.folder.exists() and not folder.folder.is_dir():
        raise UserError(f"--out {folder.folder} is a file: choose another --out")
    elif folder.folder.is_dir() and any(folder.folder.iterdir()):
        raise UserError(f"{folder.folder} is not empty and holds no run: choose another --out")
    return config, folder


def _default_place(config: TrainConfig) -> tuple[TrainConfig, Run]:
    """``runs/TASK-RECIPE-METHOD-seedN``, or the first of ``-2``, ... that is not finished."""
    what = "-".join(filter(None, (config.task, config.recipe, config.method, config.arm)))
    name = f"{what}-seed{config.seed}"
    for number in range(1, 10_000):
        folder = Run(Path("runs") / (name if number == 1 else f"{name}-{number}"))
        if folder.exists():
            if config.resume == "never" or folder.finished():
                continue
            try:
                folder.check_same(config)
            except UserError:
                continue
        elif folder.folder.exists() and any(folder.folder.iterdir()):
            continue
        return dataclasses.replace(config, out=str(folder.folder)), folder
    raise UserError("ten thousand runs below runs/: choose an --out")


def prepare(config: TrainConfig) -> torch.device:
    """Set the thread count; the device to use.

    Raises:
        UserError: CUDA is asked for and not there.
    """
    torch.set_num_threads(config.threads or max(1, usable_cores() // ranks.beside()))
    if ranks.started_by_torchrun() and config.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {config.device}: with torchrun each process has a device of its own; leave "
            "it out"
        )
    if config.device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        kind = config.device
    if ranks.started_by_torchrun() and kind == "cuda":
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(kind)
    except RuntimeError as error:
        raise UserError(f"--device {config.device}: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {config.device}: this torch sees {torch.cuda.device_count()} CUDA devices, "
            f"and {device} is asked for"
        )
    return device


def load_data(config: TrainConfig, models: Models | None = None) -> TaskData:
    """The task's data, with images and texts as the models take them."""
    if config.data == "digits":
        images = config.train_images or 0
        return tasks.load(
            config.task,
            "digits",
            seed=config.data_seed,
            train_images=images,
            validation_images=max(2, images // 20),  # NLVR2 shows two at once
            test_images=max(2, images // 10),
        )
    return _load_folder(config, (models or sources.plan(config)).reading(config))


def _load_folder(
    config: TrainConfig, reading: Mapping[str, Any], further: tuple[str, ...] = ()
) -> TaskData:
    return tasks.load(
        config.task,
        config.data,
        seed=config.data_seed,
        further=further,
        workers=loader.workers(config),
        image_errors=config.image_errors,
        **reading,
    )


def new_model(shape: str | CoCaConfig, data: TaskData, dropout: float = 0.0) -> TaskModel:
    """A model of a preset's or any other shape for the data, with random weights."""
    config = presets.get(shape) if isinstance(shape, str) else shape
    return build(sources.sized(config, data), data.head, data.num_classes, dropout)


def rehearse(config: TrainConfig, models: Models, data: TaskData) -> None:
    """Meet every mistake in sizes and names before any training, on models without memory.

    Raises:
        UserError: as the run itself would, but not after an hour.
    """
    config.check_arms(models.student.layer_counts)
    if config.rewarded:
        policies.check_options(config)
    training_sampler(config, data.train)
    if config.extra_images is not None:
        pseudo.files(config.extra_images)
    models.check(data)
    if config.teacher_cache is not None and models.teacher is not None:
        cache_plan.check_size(config, cached_kinds(config, models, data))
    try:
        shapes = filter(None, models.shapes(data))
        with torch.no_grad(), pretended(data, data.train.sample(), *shapes) as (made, batch):
            student, *taught_by = made
            student(batch)
            for teacher in taught_by:
                settings = distilled(config, student, teacher)
                step = Distiller(student, teacher, modules=MODULES, **settings)
                step(batch, MODULES, predict=pretence.loss, divergence=pretence.divergence)
            if models.start is not None:
                same = models.start is models.teacher
                start = taught_by[0].coca if same else CoCa(models.start.config)
                initialise.from_layers(student.coca, start)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"--student {config.student} and --teacher {config.teacher} on {config.data}: {error}"
        ) from error


def cached_kinds(config: TrainConfig, models: Models, data: TaskData) -> dict[str, cache_plan.Kind]:
    """What ``--teacher-cache`` would keep, which the models' shapes and the data tell."""
    student, teacher = models.shapes(data)
    assert teacher is not None
    more = len(pseudo.files(config.extra_images)) if config.extra_images is not None else 0
    layers = distilled(config, student, teacher)["teacher_layers"]
    return cache_plan.plan(config, data, teacher, layers, more=more)


def _teacher(
    config: TrainConfig,
    models: Models,
    data: TaskData,
    display: Display,
    device: torch.device,
) -> tuple[TaskModel | None, float | None, Run | None]:
    """The teacher on its device, its metric on the test split and its run, or None for each."""
    if models.teacher is None:
        return None, None, None
    folder = models.teacher.run
    if folder is not None or config.teacher_steps == 0:
        name = models.teacher.name if folder is None else f"the model of {folder.folder}"
        display.note(f"teacher: {name}, as it is")
        teacher = models.published_teacher(data) if folder is None else folder.load_model(data)
        teacher = teacher.to(device)
        metric = predicting.evaluate(data, teacher, data.test, device)[data.metric_name]
        return teacher, metric, folder
    own = resolve(teachers.teacher_config(config))
    folder = teachers.cached_run(own, models.teacher, data, device)
    with folder.held(wait=True):
        if ranks.of_first(folder.finished):
            display.note(f"teacher: {config.teacher}, trained before, from {folder.folder}")
        else:
            display.note(
                f"teacher: {config.teacher}, training it on {config.task} first, kept for later"
            )
            own = dataclasses.replace(own, out=str(folder.folder))
            summary = train(own, sources.plan(own), folder, data, display, None, device)
            checkpoints.write_json(folder.summary_path, summary)
    ranks.gathered(None)  # it is written
    metric = float(folder.summary()["student_metric"])
    return folder.load_model(data).to(device), metric, folder


def train(
    config: TrainConfig,
    models: Models,
    folder: Run,
    data: TaskData,
    display: Display,
    teacher: TaskModel | None,
    device: torch.device,
) -> Summary:
    """Train (or go on training) one model in its folder, measure it on the test split, save it."""
    torch.manual_seed(config.seed)
    student = models.new_student(data, teacher, config.dropout).to(device)
    if config.recompute:
        student.recompute()
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        compiling.compile_modules({"student": student, "teacher": teacher}, display.note)
    trained_on = data
    if config.extra_images is not None and teacher is not None:
        trained_on = pseudo.extended(
            data, config.extra_images, folder.captions_path, teacher, device=device, display=display
        )
    trainer = Trainer(config, trained_on, student, teacher, folder, display)
    before = trainer.evaluate(data.test)[data.metric_name]

    with ranks.together():
        resumed = _go_on(trainer, folder, display)
    if not resumed:
        folder.begin(config)
        folder.remember(data)
        folder.truncate_metrics(0)
    trainer.fit()

    validation = trainer.finish()
    test = trainer.evaluate(data.test)
    began = time.perf_counter()
    baselines = data.baselines() if ranks.is_first() else {"majority": 0.0, "text_only": 0.0}
    trainer.seconds["eval"] += time.perf_counter() - began
    folder.save_model(student, data, config)
    return {
        "task": config.task,
        "data": config.data,
        "method": config.method,
        "recipe": config.recipe,
        "arm": config.arm,
        "policy": config.policy if config.rewarded else None,
        "seed": config.seed,
        "steps": config.steps,
        "device": str(device),
        "processes": ranks.count(),
        "metric_name": data.metric_name,
        "teacher_metric": None,
        "student_metric": test[data.metric_name],
        "student_metric_before": before,
        "validation_metric": validation,
        "kept_step": trainer.kept_step,
        "majority_metric": baselines["majority"],
        "text_only_metric": baselines["text_only"],
        "test": test,
        "teacher_params": None,
        "student_params": count(student),
        "arms": trainer.pulls if config.method not in ("kd", "finetune") else {},
        "reward": trainer.reward_summary(),
        "seconds": {
            "teacher": 0.0,
            "distill": trainer.seconds["distill"],
            "reward": trainer.seconds["reward"],
            "eval": trainer.seconds["eval"],
        },
        "versions": versions(),
    }


def _go_on(trainer: Trainer, folder: Run, display: Display) -> bool:
    """Continue from the newest checkpoint that is whole; whether there is one.

    Raises:
        UserError: there are some, all of them damaged.
    """
    paths = ranks.of_first(lambda: checkpoints.found(folder.checkpoints))
    for i, path in enumerate(reversed(paths), 1):
        try:
            trainer.resume(path)
        except checkpoints.Damaged as error:
            if i == len(paths):
                raise UserError(f"{error}; delete it to start over") from error
            display.note(f"warning: {error}; the one before it is taken")
            continue
        display.note(f"going on from {path} (step {trainer.step} of {trainer.steps})")
        return True
    return False


def evaluate(
    folder: str | Path,
    device: str | None = None,
    *,
    data: str | Path | None = None,
    split: str = "test",
    predictions: str | Path | None = None,
) -> tuple[Run, dict[str, float], float | None]:
    """Measure a finished run's student again, from its files alone.

    Args:
        folder: the run's.
        device: instead of the run's.
        data: where the data set is now, if not where the run was trained on it.
        split: train, validation, test or one of ``tasks.folders.FURTHER``.
        predictions: a new file to write what the student says into (``tasks.submissions``).

    Returns:
        The run, all metrics on the split (none where it is secret what is right), and the main
        one as the run recorded it, if it did.

    Raises:
        UserError: no finished run, an unknown split, or a file that is there or cannot be written.
    """
    run = Run(folder, data)
    config = run.config()
    recorded = {name: run.summary().get(key) for name, key in _RECORDED.items()}.get(split)
    if device is not None:
        config = dataclasses.replace(config, device=device)
    further = FURTHER.get(config.task, ()) if config.data != "digits" else ()
    if split not in (*SPLITS, *further):
        raise unknown("split", split, (*SPLITS, *further))
    file = submissions.new_file(predictions, config.data) if predictions is not None else None
    where = prepare(config)
    task = data_of(run, config, () if split in SPLITS else (split,))
    model = run.load_student().to(where)
    part = task.split(split)
    said = task.predict(model, part, device=where)
    if file is not None:
        checkpoints.write_text(file, submissions.render(task, part, said))
    return run, task.metrics(part, said) if part.measurable else {}, recorded


def data_of(run: Run, config: TrainConfig, further: tuple[str, ...] = ()) -> TaskData:
    """The data of a finished run, read as its student knows it.

    Args:
        run: whose student it is for.
        config: the run's settings, with the data set where it is now.
        further: splits that training does not read.

    Raises:
        UserError: the data set is not there, or is of other answers or texts than the student's.
    """
    if config.data == "digits":
        task = load_data(config)
    elif not (run.moved or is_shards(config.data) or Path(config.data).is_dir()):
        raise UserError(
            f"{run.folder} was trained on {config.data}, which is not there: --data FOLDER says "
            "where it is now"
        )
    else:
        task = _load_folder(config, run.reading(), further)
    run.check_fits(task)
    return task


def count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def versions() -> Mapping[str, str]:
    """What a number depends on besides the settings."""
    return {
        "optima_fast": optima_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
