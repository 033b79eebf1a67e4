"""Two students of one teacher, trained side by side: each a process with one thread."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optima_fast.demo import teachers
from optima_fast.errors import UserError
from optima_fast.training import (
    Display,
    Interrupted,
    Run,
    TrainConfig,
    experiment,
    processes,
    resolve,
)
from optima_fast.training import teachers as training_teachers
from optima_fast.training.config import flag
from optima_fast.training.interrupts import Stop
from optima_fast.training.processes import Process

METHODS = ("headroom", "layerwise")
TASKS = ("snli_ve", "nlvr2", "vqa")  # each example is right or wrong
LOOK = 0.3  # seconds between two looks at the processes


@dataclass(frozen=True)
class Settings:
    """What a demo depends on.

    Attributes:
        task: one of ``TASKS``.
        seed: of both students.
        steps: of each student; ``None`` for the trainer's default.
        teacher_steps: train the teacher so long; ``None`` takes the packaged one, if there is one.
        further: other settings of :class:`TrainConfig`.
    """

    task: str = TASKS[0]
    seed: int = 1
    steps: int | None = None
    teacher_steps: int | None = None
    further: Mapping[str, Any] = field(default_factory=dict)

    def student(self, method: str, folder: Path) -> dict[str, Any]:
        """Settings of a student's run, those that are not the trainer's defaults."""
        given = {
            "task": self.task,
            "method": method,
            "seed": self.seed,
            "steps": self.steps,
            "teacher": str(folder / "teacher"),
            "threads": 1,
            "device": "cpu",
            **self.further,
            "out": str(folder / method),
        }
        return {name: value for name, value in given.items() if value is not None}

    def teacher(self, folder: Path) -> TrainConfig:
        """Settings of the teacher's own training, on all cores."""
        given = {"task": self.task, "device": "cpu", "teacher_steps": self.teacher_steps}
        config = training_teachers.teacher_config(resolve(_config({**given, **self.further})))
        return dataclasses.replace(config, out=str(folder / "teacher"))


def _config(given: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig(**given)


def check(settings: Settings, folder: Path) -> int:
    """Steps of a student.

    Raises:
        UserError: settings that the trainer would refuse.
    """
    if settings.teacher_steps == 0:
        raise UserError("--teacher-steps must be positive, got 0: leave it out for the usual one")
    settings.teacher(folder)
    (steps,) = {resolve(_config(settings.student(m, folder))).steps for m in METHODS}
    assert steps is not None
    return steps


def train(settings: Settings, folder: Path, display: Display) -> None:
    """Do, or go on with, the teacher and both students below ``folder``.

    Raises:
        UserError: a mistake in the settings or files, or a run that failed.
        Interrupted: Ctrl-C; the runs can be gone on with.
    """
    students = {method: settings.student(method, folder) for method in METHODS}
    steps = check(settings, folder)
    if settings.teacher_steps is None and teachers.packaged(settings.task):
        teachers.unpack(settings.task, folder / "teacher")
    elif not Run(folder / "teacher").finished():
        display.note(f"teacher: training one on {settings.task} first")
        experiment.run(settings.teacher(folder), display)
    runs = {method: Run(folder / method) for method in METHODS}
    if all(run.finished() for run in runs.values()):
        return
    display.note("two students side by side, a thread each; their data is drawn first:")
    for given in students.values():
        display.note("  " + shlex.join([python_name(), *command(given)[1:]]))
    with contextlib.ExitStack() as stack:
        started = {}
        for method, given in students.items():
            started[method] = Process(command(given), {"OMP_NUM_THREADS": "1"})
            stack.callback(started[method].stop)
        _watch(started, runs, steps, display)


def python_name() -> str:
    """This Python as one types it here: ``.venv/bin/python`` where that is below this folder."""
    here, own = Path.cwd(), Path(sys.executable)
    return str(own.relative_to(here)) if own.is_relative_to(here) else "python"


def command(given: Mapping[str, Any]) -> list[str]:
    """The trainer's command line for these settings."""
    return processes.command([f"{flag(name)}={value}" for name, value in given.items()])


def _watch(
    started: Mapping[str, Process], runs: Mapping[str, Run], steps: int, display: Display
) -> None:
    """Show how far both are until both are done; stop the other where one fails."""
    stop, before = Stop(), {method: _step(run) for method, run in runs.items()}
    if any(before.values()):
        display.note(f"going on after steps {_places(before)} of {steps}")
    with stop.caught():
        looks = _looks(started, stop)
        for _ in looks:  # the time that is left is told by steps, not by how long data is drawn
            if all(_step(run) > before[m] or run.finished() for m, run in runs.items()):
                break
        done = {method: _step(run) for method, run in runs.items()}
        with display.stage("distilling", 2 * steps, sum(done.values())) as stage:
            for _ in looks:
                now = {method: _step(run) for method, run in runs.items()}
                if now != done:
                    stage.update(sum(now.values()), {m: f"{s}/{steps}" for m, s in now.items()})
                done = now
    for process in started.values():
        process.ask()
    for process in started.values():
        process.stop()
    if not all(run.finished() for run in runs.values()):
        places = _places({method: _step(run) for method, run in runs.items()})
        raise Interrupted(f"stopped after steps {places} of {steps}")


def _looks(started: Mapping[str, Process], stop: Stop) -> Iterator[None]:
    """Every now and then, until both processes have ended well or a stop is asked for.

    Raises:
        UserError: one of them failed.
    """
    while not stop.asked:
        ended = {method: p for method, p in started.items() if not p.running()}
        for method, process in ended.items():
            if why := process.error():
                goes_on = "; the same command goes on from its last checkpoint"
                raise UserError(f"the {method} run: {why}{'' if process.code == 2 else goes_on}")
        if len(ended) == len(started):
            return
        yield
        time.sleep(LOOK)


def _places(steps: Mapping[str, int]) -> str:
    return ", ".join(f"{method} {step}" for method, step in steps.items())


def _step(run: Run) -> int:
    """The last step that a run logged; 0 before there is one."""
    try:
        lines = run.metrics()
    except UserError:
        return 0
    return int(lines[-1]["step"]) if lines else 0
