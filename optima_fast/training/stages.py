"""Distillation in stages: a student that is the teacher of a smaller one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

from optima_fast.distill import match_layers
from optima_fast.errors import UserError
from optima_fast.training import experiment, ranks, sources
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.experiment import Summary
from optima_fast.training.run import Run


def run(config: TrainConfig, display: Display) -> tuple[Run, Summary]:
    """Do, or go on with, one run a stage, in folders below ``--out``.

    All have the same settings but for student and teacher. A stage that is finished is not done
    again, and one that was stopped goes on.

    Returns:
        The last one's folder and summary.

    Raises:
        UserError: as a run; of models that do not follow on each other, before the first.
        Interrupted: as a run.
    """
    stage, count = first(config), len(_names(config))
    with ranks.joined(experiment.prepare(config)):
        for number in range(1, count + 1):
            display.note(f"stage {number} of {count}: {stage.student}, into {stage.out}")
            folder, summary = experiment.run(stage, display)
            if number < count:
                stage = dataclasses.replace(
                    _of(config, number), teacher=str(folder.folder), teacher_steps=None
                )
    return folder, summary


def first(config: TrainConfig) -> TrainConfig:
    """The settings of the first stage, or these where there are no stages.

    Raises:
        UserError: models of later stages do not follow on each other.
    """
    if not config.stages:
        return config
    if config.resume not in ("auto", "never"):
        raise UserError(
            f"--resume {config.resume} is of one run: with --stages the same command goes on"
        )
    stage = _of(config, 0)
    teacher = resolve(stage).teacher or ""
    models = [sources.find(teacher, "--teacher")]
    models += [sources.find(name, "--stages") for name in _names(config)]
    for above, below in pairwise(models):
        for module, layers in below.config.layer_counts.items():
            try:
                match_layers(layers, above.config.layer_counts[module])
            except UserError as error:
                raise UserError(
                    f"--stages {config.stages}: {below.name} cannot learn from {above.name}, "
                    f"{module}: {error}"
                ) from error
    return stage


def _names(config: TrainConfig) -> list[str]:
    return [name.strip() for name in (config.stages or "").split(",")]


def _of(config: TrainConfig, number: int) -> TrainConfig:
    name = _names(config)[number]
    folder = Path(config.out or f"runs/{config.task}-{config.method}-stages-seed{config.seed}")
    out = str(folder / f"{number + 1}-{Path(name).name}")
    return dataclasses.replace(config, stages=None, student=name, out=out)
