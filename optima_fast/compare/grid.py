"""Which runs a comparison is made of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optima_fast.errors import UserError, unknown
from optima_fast.training import Run, TrainConfig, checkpoints, policies, resolve
from optima_fast.training.config import METHODS, TASKS, flag
from optima_fast.training.flags import parse

FORMAT = 1  # of compare.json
RESULT, PAGE = "compare.json", "compare.md"
EVALUATIONS = 20  # of the validation split in a run, unless --eval-every is given
FILES = (".yaml", ".yml")
# what the grid gives each run, and where it takes that from
OWN = {
    "task": "--task TASK,TASK names the tasks",
    "method": "--methods names the methods",
    "arm": "write fixed:ARM among the --methods",
    "seed": "--seeds N makes runs of seeds 0 to N - 1",
    "out": "--out FOLDER is the folder of all runs",
    "resume": "the same command goes on with runs that are there",
}


@dataclass(frozen=True)
class Entry:
    """A method with settings of its own.

    Attributes:
        label: what it is called in tables.
        words: flags of the trainer that it adds to those of all runs.
    """

    label: str
    words: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The label in names of folders."""
        return re.sub(r"[^\w.+=\[\]-]+", "-", self.label)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    task: str
    label: str
    seed: int
    config: TrainConfig
    words: tuple[str, ...]

    @property
    def run(self) -> Run:
        assert self.config.out is not None
        return Run(self.config.out)

    @property
    def steps(self) -> int:
        assert self.config.steps is not None
        return self.config.steps

    @property
    def name(self) -> str:
        return f"{self.task} {self.label} seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        tasks: in the order of the tables.
        entries: likewise.
        seeds: each run is made with the seeds 0 to ``seeds`` - 1.
        baseline: the label of the entry that the others are compared with.
        teacher_per_seed: seed S learns from a teacher of seed S, not all seeds from one.
        folder: of all runs.
        common: flags of the trainer that all runs have.
    """

    tasks: tuple[str, ...]
    entries: tuple[Entry, ...]
    seeds: int
    baseline: str
    teacher_per_seed: bool
    folder: Path
    common: tuple[str, ...]

    def cells(self) -> list[Cell]:
        """All runs, seed by seed, so that a grid that is stopped has whole seeds.

        Raises:
            UserError: settings that the trainer would refuse.
        """
        made = {(t, e): self._settings(t, e) for t in self.tasks for e in self.entries}
        cells = []
        for seed in range(self.seeds):
            for (task, entry), config in made.items():
                own: dict[str, Any] = {"task": task, "seed": seed, "eval_every": config.eval_every}
                if self.teacher_per_seed:
                    own["teacher_seed"] = seed
                own["out"] = str(self.folder / f"{task}-{entry.slug}-seed{seed}")
                words = (*self.common, *entry.words, *(f"{flag(k)}={v}" for k, v in own.items()))
                config = dataclasses.replace(config, **own)
                cells.append(Cell(task, entry.label, seed, config, words))
        return cells

    def _settings(self, task: str, entry: Entry) -> TrainConfig:
        """The resolved settings of an entry's runs, but for what the grid adds."""
        words = [*self.common, *entry.words, f"--task={task}"]
        try:
            given = parse(words, prog="python -m optima_fast.compare", description="")
            if "resume" in given:
                raise UserError(f"resume is not for a grid: {OWN['resume']}")
            config = resolve(TrainConfig(**{**given, "seed": 0, "out": None}))
            if config.rewarded:
                policies.check_options(config)
        except UserError as error:
            raise UserError(f"{entry.label} on {task}: {error}") from error
        assert config.steps is not None
        every = given.get("eval_every") or max(1, config.steps // EVALUATIONS)
        return dataclasses.replace(config, eval_every=every)


def read_tasks(text: str) -> tuple[str, ...]:
    """The tasks of ``--task``.

    Raises:
        UserError: an unknown task, or one that is named twice.
    """
    tasks = tuple(task.strip() for task in text.split(","))
    for task in tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    return _once("--task", tasks)


def read_entries(text: str) -> tuple[Entry, ...]:
    """The entries of ``--methods``.

    Raises:
        UserError: an unknown method, a setting that is not ``name=value``, or two alike.
    """
    entries = tuple(_entry(entry.strip()) for entry in text.split(","))
    _once("--methods", [entry.label for entry in entries])
    _once("--methods", [entry.slug for entry in entries])
    return entries


def _entry(text: str) -> Entry:
    if text.endswith(FILES):
        return Entry(Path(text).stem, (f"--config={text}",))
    method, *settings = text.split(":")
    if method not in METHODS:
        more = "; a value that holds a comma or a colon goes into a file, FILE.yaml"
        raise UserError(f"--methods: {unknown('method', method, METHODS)}{more}")
    words = [f"--method={method}"]
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals and method == "fixed":
            name, value = "arm", setting
        elif not equals or not value:
            raise UserError(f"--methods: {text}: {setting!r} must be NAME=VALUE, as in gamma=0.9")
        elif name in OWN and name != "arm":
            raise UserError(f"--methods: {text}: leave {name} out: {OWN[name]}")
        words.append(f"{flag(name)}={value}")
    if method == "fixed" and not any(word.startswith("--arm=") for word in words):
        raise UserError("--methods: fixed needs an arm: write fixed:image or fixed:image+text")
    return Entry(text, tuple(words))


def read_baseline(text: str | None, entries: Sequence[Entry]) -> str:
    """The label of the entry that the others are compared with.

    Raises:
        UserError: there is no such entry.
    """
    labels = [entry.label for entry in entries]
    if text is None:
        return "layerwise" if "layerwise" in labels else labels[0]
    if text not in labels:
        raise unknown("--baseline", text, labels)
    return text


def _once(what: str, names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{what} has {name} {names.count(name)} times: name it once")
    return tuple(names)


def check_common(words: Sequence[str], entries: Sequence[Entry]) -> None:
    """Raise if flags of all runs are given that the grid or an entry gives itself.

    Raises:
        UserError: naming the flag and what to write instead.
    """
    for word in words:
        name = word.partition("=")[0]
        for own, instead in OWN.items():
            if name == flag(own):
                raise UserError(f"{word} is set by the grid: leave it out; {instead}")
    file = next((entry for entry in entries if entry.words[0].startswith("--config=")), None)
    if file is not None and any(word.partition("=")[0] == "--config" for word in words):
        raise UserError(
            f"--config and the file of {file.label} among --methods do not go together: put what "
            "both say into that file"
        )


def check_folder(folder: Path, cells: Sequence[Cell]) -> None:
    """Raise unless the folder is new, or of a comparison whose runs have the same settings.

    Raises:
        UserError: naming the first thing that does not fit.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        path = folder / RESULT
        if not path.is_file():
            raise UserError(f"{folder} is there and holds no comparison: choose another --out")
        known = checkpoints.read_json(path)
        if not isinstance(known, Mapping) or known.get("format") != FORMAT:
            raise UserError(f"{path} is none of this version's: choose another --out")
    for cell in cells:
        if cell.run.exists():
            cell.run.check_same(cell.config)
