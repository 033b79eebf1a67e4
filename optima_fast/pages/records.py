"""What runs recorded, read once, and runs put together that differ in their seed alone."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optima_fast.compare import curves
from optima_fast.compare.curves import Result
from optima_fast.errors import UserError
from optima_fast.training.config import TrainConfig, flag, resolve
from optima_fast.training.overview import method_name
from optima_fast.training.run import Run

# what the runs of one method may differ in
_OF_A_SEED = ("seed", "teacher_seed")

Series = tuple[list[float], list[float]]  # x and y


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        run: its folder.
        config: its settings.
        summary: of ``summary.json``.
        lines: of ``metrics.jsonl``.
        result: its metric and the validation split over arithmetic and time.
    """

    run: Run
    config: TrainConfig
    summary: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    result: Result


@dataclass(frozen=True)
class Group:
    """Runs of one method that differ in their seed alone.

    Attributes:
        label: the method, and what tells it from the other methods of the task.
        records: its runs by seed.
    """

    label: str
    records: Sequence[Record]

    @property
    def arms(self) -> list[str]:
        """The names of all arms that there are, pulled or not, in the order of the choices."""
        return list(self.records[0].summary["arms"])


@dataclass(frozen=True)
class Task:
    """The runs of one task.

    Attributes:
        name: the task.
        metric: its main metric.
        groups: the methods, in the order in which their runs were given.
        uncounted: why the arithmetic of the steps is not known, if it is not.
    """

    name: str
    metric: str
    groups: Sequence[Group]
    uncounted: str | None

    @property
    def records(self) -> list[Record]:
        """All runs."""
        return [record for group in self.groups for record in group.records]


def read(runs: Sequence[Run]) -> list[Task]:
    """The finished runs of each task, by method and seed.

    Raises:
        UserError: the files of a run are damaged.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run.summary()["task"], []).append(run)
    return [_task(name, members) for name, members in by_task.items()]


def _task(name: str, runs: Sequence[Run]) -> Task:
    why = None
    try:
        counted = curves.operations(runs)
    except UserError as error:
        why = str(error)
        counted = [dict.fromkeys(curves.arms_of(run, run.summary()), 0) for run in runs]
    records = [
        Record(run, run.config(), run.summary(), run.metrics(), curves.read(run, operations))
        for run, operations in zip(runs, counted, strict=True)
    ]
    return Task(name, runs[0].metric_name(), grouped(records), why)


def grouped(records: Sequence[Record]) -> list[Group]:
    """Runs that differ in their seed alone, together."""
    settings = [Run.computed_by(dataclasses.asdict(record.config)) for record in records]
    by_key: dict[str, list[int]] = {}
    for i, each in enumerate(settings):
        kept = {name: value for name, value in each.items() if name not in _OF_A_SEED}
        by_key.setdefault(json.dumps(kept, sort_keys=True), []).append(i)
    firsts = [members[0] for members in by_key.values()]
    labels = _labels([records[i] for i in firsts], [settings[i] for i in firsts])
    return [
        Group(label, sorted((records[i] for i in members), key=lambda r: r.config.seed))
        for label, members in zip(labels, by_key.values(), strict=True)
    ]


def _labels(records: Sequence[Record], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The method of each; where several have one name, the settings that differ among these."""
    names = [method_name(record.summary) for record in records]
    labels = []
    for name, own in zip(names, settings, strict=True):
        alike = [s for n, s in zip(names, settings, strict=True) if n == name]
        differing = [
            f"{flag(key)} {own.get(key)}"
            for key in own
            if key not in _OF_A_SEED and any(other.get(key) != own[key] for other in alike)
        ]
        labels.append(" ".join([name, *differing]))
    return labels


def medians(group: Group, of: Callable[[Record], Series]) -> Series:
    """The median of y at each x, over the seeds that recorded it there."""
    values: dict[float, list[float]] = {}
    for record in group.records:
        for x, y in zip(*of(record), strict=True):
            values.setdefault(x, []).append(y)
    xs = sorted(values)
    return xs, [statistics.median(values[x]) for x in xs]


def command(config: TrainConfig) -> str:
    """The shortest command whose settings are all those of a run."""
    usual = dataclasses.asdict(TrainConfig())
    settings = dataclasses.asdict(config)
    given = {name: value for name, value in settings.items() if value != usual[name]}
    for name in list(given):
        fewer = {key: value for key, value in given.items() if key != name}
        try:
            needless = resolve(TrainConfig(**fewer)) == config
        except UserError:
            continue
        if needless:
            given = fewer
    words = [f"{flag(name)}={_text(value)}" for name, value in given.items()]
    return " ".join(["python -m optima_fast.train", *map(shlex.quote, words)])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
