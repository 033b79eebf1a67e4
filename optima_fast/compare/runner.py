"""The runs of a grid, each in a process of its own, as many at a time as the machine allows."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optima_fast.compare.grid import Cell
from optima_fast.errors import UserError
from optima_fast.tasks.workers import usable_cores
from optima_fast.training import Display, Interrupted
from optima_fast.training.display import Stage
from optima_fast.training.interrupts import INTERRUPTED, Stop
from optima_fast.training.overview import number
from optima_fast.training.processes import Process, command

LOOK = 0.5  # seconds between two looks at the processes
TAIL = 1 << 18  # bytes at the end of metrics.jsonl, more than a line has


@dataclass(frozen=True)
class Place:
    """Where one of the runs at a time is made.

    Attributes:
        environment: variables that its process has beside those of this one.
        words: flags of the trainer beside the run's own.
    """

    environment: Mapping[str, str]
    words: tuple[str, ...] = ()


def places(device: str, threads: int, jobs: int | None) -> list[Place]:
    """One place for each run at a time.

    Args:
        device: the trainer's setting. On CUDA each visible device is a place, a device that is
            named (``cuda:1``) is one; on a CPU it is as many cores as a run has threads.
        threads: the trainer's setting. Several runs on a CPU have one thread each unless it is
            given.
        jobs: so many places instead; on CUDA they take the visible devices in turn.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        count = jobs or max(1, usable_cores() // max(1, threads))
        if count == 1 or threads:
            return [Place({})] * count
        return [Place({"OMP_NUM_THREADS": "1"}, ("--threads=1",))] * count
    if ":" in device:
        return [Place({})] * (jobs or 1)
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    count = jobs or len(visible)
    return [Place({"CUDA_VISIBLE_DEVICES": visible[i % len(visible)]}) for i in range(count)]


def train(cells: Sequence[Cell], where: Sequence[Place], display: Display) -> dict[str, str]:
    """Do, or go on with, the runs that are not finished.

    Returns:
        By the name of each run that failed, why. The other runs were made all the same.

    Raises:
        Interrupted: Ctrl-C; the runs that were being made have saved.
    """
    todo = [cell for cell in cells if not cell.run.finished()]
    if not todo:
        return {}
    failed: dict[str, str] = {}
    running: dict[int, tuple[Cell, Process]] = {}
    waiting, stop = list(todo), Stop()
    steps = {cell.name: step(cell) for cell in todo}
    total = sum(cell.steps for cell in todo)
    with stop.caught(), display.stage("steps of all runs", total, sum(steps.values())) as stage:
        try:
            while (waiting or running) and not stop.asked:
                for place, (cell, process) in list(running.items()):
                    steps[cell.name] = step(cell)
                    if not process.running():
                        del running[place]
                        steps[cell.name] = cell.steps
                        _ended(cell, process, failed, display)
                free = (place for place in range(len(where)) if place not in running)
                for place, cell in zip(free, list(waiting), strict=False):
                    waiting.remove(cell)
                    running[place] = (cell, _start(cell, where[place]))
                _show(stage, steps, running, len(todo) - len(waiting) - len(running), len(todo))
                time.sleep(LOOK if running else 0)
        finally:
            for _, process in running.values():
                process.ask()
            for _, process in running.values():
                process.stop()
    if stop.asked:
        done = sum(cell.run.finished() for cell in cells)
        raise Interrupted(f"stopped: {done} of {len(cells)} runs are finished")
    return failed


def _start(cell: Cell, place: Place) -> Process:
    return Process(_words(cell, place), place.environment)


def _words(cell: Cell, place: Place) -> list[str]:
    return command([*cell.words, *place.words])


def _ended(cell: Cell, process: Process, failed: dict[str, str], display: Display) -> None:
    why = process.error()
    if not why and not cell.run.finished():
        stopped = process.code == INTERRUPTED
        why = "something else stopped it" if stopped else "it left no result"
    process.stop()
    if why:
        failed[cell.name] = why
        display.note(f"{cell.name} FAILED: {why}")
        return
    summary = cell.run.summary()
    seconds = summary["seconds"]["distill"] + summary["seconds"]["reward"]
    metric = f"{summary['metric_name']} {number(summary['student_metric'])}"
    display.note(f"{cell.name}: {metric}, {seconds:.0f} s")


def _show(
    stage: Stage,
    steps: Mapping[str, int],
    running: Mapping[int, tuple[Cell, Process]],
    ended: int,
    runs: int,
) -> None:
    now = ", ".join(f"{cell.name} {steps[cell.name]}/{cell.steps}" for cell, _ in running.values())
    stage.update(sum(steps.values()), {"runs": f"{ended}/{runs}", "now": now or "-"})


def step(cell: Cell) -> int:
    """The last step that a run logged; 0 before there is one."""
    try:
        with cell.run.metrics_path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:  # it is being written
            continue
    return 0


def listing(cells: Sequence[Cell], place: Place) -> list[list[str]]:
    """A row a run: what it is, what is there of it, and its command in such a place."""
    rows = []
    for cell in cells:
        state = "new"
        if cell.run.finished():
            state = "finished"
        elif cell.run.exists():
            state = f"step {step(cell)} of {cell.steps}"
        rows.append([cell.name, state, shlex.join(["python", *_words(cell, place)[1:]])])
    return rows


def check_writable(folder: Path) -> None:
    """Create the folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
