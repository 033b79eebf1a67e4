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
from optima_fast.errors import UserError
from optima_fast.models import MODULES, initialise, presets
from optima_fast.models.task_model import TaskModel, build
from optima_fast.tasks import TaskData, submissions
from optima_fast.tasks.base import unknown
from optima_fast.tasks.folders import FURTHER, SPLITS
from optima_fast.training import checkpoints, policies, teachers
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.rewards import training_sampler
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer

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
    config, folder = _place(config)
    if folder.finished():
        display.note(f"{folder.folder} is finished already; another --out starts another run")
        return folder, folder.summary()
    device = prepare(config)
    data = load_data(config)
    _rehearse(config, data)
    with folder.held():
        began = time.perf_counter()
        teacher, teacher_metric = _teacher(config, data, display, device)
        teacher_seconds = time.perf_counter() - began
        summary = train(config, folder, data, display, teacher, device)
        summary |= {
            "teacher_metric": teacher_metric,
            "teacher_params": count(teacher) if teacher else None,
        }
        summary["seconds"]["teacher"] += teacher_seconds
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


def _place(config: TrainConfig) -> tuple[TrainConfig, Run]:
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
    """``runs/TASK-METHOD-seedN``, or the first of ``-2``, ``-3``, ... that is not finished."""
    arm = f"-{config.arm}" if config.arm else ""
    name = f"{config.task}-{config.method}{arm}-seed{config.seed}"
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
    torch.set_num_threads(config.threads or _usable_cores())
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise UserError(f"--device {config.device}: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {config.device}: this torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_data(config: TrainConfig, further: tuple[str, ...] = ()) -> TaskData:
    """The task's data, sized for the student preset, with ``further`` splits of a folder."""
    if config.data == "digits":
        images = config.train_images or 0
        return tasks.load(
            config.task,
            "digits",
            seed=config.data_seed,
            train_images=images,
            validation_images=max(1, images // 20),
            test_images=max(1, images // 10),
        )
    shape = presets.get(config.student or "")
    return tasks.load(
        config.task,
        config.data,
        seed=config.data_seed,
        image_size=shape.image_size,
        text_length=shape.text_length,
        further=further,
    )


def new_model(preset: str | None, data: TaskData, dropout: float = 0.0) -> TaskModel:
    """A preset's model with the task's head, and the data's vocabulary, text length and images."""
    config = dataclasses.replace(
        presets.get(preset or ""),
        vocab_size=len(data.tokenizer),
        text_length=data.text_length,
        image_size=data.image_size,
        image_channels=data.channels,
    )
    return build(config, data.head, data.num_classes, dropout)


def _rehearse(config: TrainConfig, data: TaskData) -> None:
    """Meet every mistake in sizes and names before any training, on models without memory.

    Raises:
        UserError: as the run itself would, but not after an hour.
    """
    if config.method == "optima":
        policies.check_options(config)
    training_sampler(config, data.train)
    try:
        _rehearse_models(config, data)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"--student {config.student} and --teacher {config.teacher} on {config.data}: {error}"
        ) from error


def _rehearse_models(config: TrainConfig, data: TaskData) -> None:
    teacher = None
    if config.method != "finetune":
        folder = _finished_model(config.teacher, "--teacher")
        teacher = folder.load_model(data) if folder else None
    with torch.device("meta"):
        student = new_model(config.student, data)
        if config.method != "finetune":
            teacher = teacher or new_model(config.teacher, data)
            Distiller(student, teacher, modules=MODULES)
        if config.student_init == "teacher":
            if teacher is None:
                raise UserError(f"--student-init teacher: --method {config.method} has no teacher")
            initialise.from_layers(student.coca, teacher.coca)
    if config.student_init not in (None, "teacher", "random"):
        folder = _finished_model(config.student_init, "--student-init")
        if folder is None:
            raise UserError(
                "--student-init must be teacher, random or the model of a run, got "
                f"{config.student_init!r}"
            )


def _finished_model(name: str | None, flag: str) -> Run | None:
    """The run whose folder or ``.safetensors`` file ``name`` is; None for the name of a preset."""
    path = Path(name or "")
    if name in presets.PRESETS:
        return None
    if path.is_file() and path == Run(path.parent).weights_path:
        path = path.parent
    if path.is_dir():
        return Run(path)
    try:
        presets.get(name or "")
    except UserError as error:
        raise UserError(f"{flag} {name!r} is no run folder, and {error}") from None
    return None


def _teacher(
    config: TrainConfig, data: TaskData, display: Display, device: torch.device
) -> tuple[TaskModel | None, float | None]:
    """The teacher on its device with its metric on the test split, or None for finetune."""
    if config.method == "finetune":
        return None, None
    folder = _finished_model(config.teacher, "--teacher")
    if folder is not None:
        display.note(f"teacher: the model of {folder.folder}")
        teacher = folder.load_model(data).to(device)
        return teacher, data.evaluate(teacher, data.test, device=device)[data.metric_name]
    own = resolve(teachers.teacher_config(config))
    folder = teachers.cached_run(own, data, device)
    with folder.held(wait=True):
        if folder.finished():
            display.note(f"teacher: {config.teacher}, trained before, from {folder.folder}")
        else:
            display.note(
                f"teacher: {config.teacher}, training it on {config.task} first, kept for later"
            )
            own = dataclasses.replace(own, out=str(folder.folder))
            summary = train(own, folder, data, display, None, device)
            checkpoints.write_json(folder.summary_path, summary)
    return folder.load_model(data).to(device), float(folder.summary()["student_metric"])


def _student(config: TrainConfig, data: TaskData, teacher: TaskModel | None) -> TaskModel:
    """A fresh student, from layers of a model of the same widths where there is one."""
    student = new_model(config.student, data, config.dropout)
    source = config.student_init
    if source is None:
        same = teacher is not None and teacher.widths == student.widths
        source = "teacher" if same else "random"
    if source == "teacher":
        assert teacher is not None
        initialise.from_layers(student.coca, teacher.coca)
    elif source != "random":
        folder = _finished_model(source, "--student-init")
        assert folder is not None
        initialise.from_layers(student.coca, folder.load_model(data).coca)
    return student


def train(
    config: TrainConfig,
    folder: Run,
    data: TaskData,
    display: Display,
    teacher: TaskModel | None,
    device: torch.device,
) -> Summary:
    """Train (or go on training) one model in its folder, measure it on the test split, save it."""
    torch.manual_seed(config.seed)
    student = _student(config, data, teacher).to(device)
    compile_modules(config, [student, *([teacher] if teacher else [])], device)
    trainer = Trainer(config, data, student, teacher, folder, display)
    began = time.perf_counter()
    before = data.evaluate(student, data.test, device=device)[data.metric_name]
    measuring = time.perf_counter() - began

    last = checkpoints.latest_checkpoint(folder.checkpoints)
    if last is not None:
        trainer.resume(last)
        display.note(f"going on from {last} (step {trainer.step} of {trainer.steps})")
    else:
        folder.begin(config)
        folder.truncate_metrics(0)
    trainer.fit()

    began = time.perf_counter()
    test = data.evaluate(student, data.test, device=device)
    validation = data.evaluate(student, data.validation, device=device)
    baselines = data.baselines()
    measuring += time.perf_counter() - began
    folder.save_model(student, data, config)
    return {
        "task": config.task,
        "data": config.data,
        "method": config.method,
        "arm": config.arm,
        "policy": config.policy if config.method == "optima" else None,
        "seed": config.seed,
        "steps": config.steps,
        "device": str(device),
        "metric_name": data.metric_name,
        "teacher_metric": None,
        "student_metric": test[data.metric_name],
        "student_metric_before": before,
        "validation_metric": validation[data.metric_name],
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
            "eval": trainer.seconds["eval"] + measuring,
        },
        "versions": versions(),
    }


def evaluate(
    folder: str | Path,
    device: str | None = None,
    *,
    split: str = "test",
    predictions: str | Path | None = None,
) -> tuple[Run, dict[str, float], float | None]:
    """Measure a finished run's student again, from its files alone.

    Args:
        folder: the run's.
        device: instead of the run's.
        split: train, validation, test or one of ``tasks.folders.FURTHER``.
        predictions: a new file to write what the student says into (``tasks.submissions``).

    Returns:
        The run, all metrics on the split (none where it is secret what is right), and the main
        one as the run recorded it, if it did.

    Raises:
        UserError: no finished run, an unknown split, or a file that is there or cannot be written.
    """
    run = Run(folder)
    config = run.config()
    recorded = {name: run.summary().get(key) for name, key in _RECORDED.items()}.get(split)
    if device is not None:
        config = dataclasses.replace(config, device=device)
    further = FURTHER.get(config.task, ()) if config.data != "digits" else ()
    if split not in (*SPLITS, *further):
        raise unknown("split", split, (*SPLITS, *further))
    file = submissions.new_file(predictions, config.data) if predictions is not None else None
    where = prepare(config)
    data = load_data(config, further=() if split in SPLITS else (split,))
    model = run.load_model(data).to(where)
    part = data.split(split)
    said = data.predict(model, part, device=where)
    if file is not None:
        checkpoints.write_text(file, submissions.render(data, part, said))
    return run, data.metrics(part, said) if part.measurable else {}, recorded


def compile_modules(
    config: TrainConfig, task_models: list[TaskModel], device: torch.device
) -> None:
    """torch.compile each module in place.

    A teacher's module has a graph for each of: recorded, run for another module only. The limit
    is raised as student and teacher share the code that is compiled.
    """
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for model in task_models:
            for name in MODULES:
                getattr(model.coca, name).compile()


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
