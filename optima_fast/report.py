"""``python -m optima_fast.report RUN...``: compare runs in one HTML page.

It prints one line for each run, and the rewards of each arm. The page is one file that needs no
network. It shows results, test examples with the models' answers, losses, learning rate, validation
over steps, arithmetic and seconds, which arm was chosen in each round, and what that arm earned.
Runs that differ only in their seed are shown as their median.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optima_fast.entry import Parser, guarded
from optima_fast.errors import UserError

if TYPE_CHECKING:
    from optima_fast.training.run import Run


PAGE = "report.html"
EXAMPLES = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.pages import records, report
    from optima_fast.training import overview
    from optima_fast.training.display import Display
    from optima_fast.training.run import Run

    parser = Parser(
        prog="python -m optima_fast.report", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, such as FOLDER/*/")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="where the page goes; default report.html in the folder of the run, or of all runs",
    )
    parser.add_argument(
        "--examples",
        type=_count,
        default=EXAMPLES,
        metavar="N",
        help="show N right and N wrong answers of the test split; default %(default)s",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="where the data set is now, if not where the runs had it; of runs on the built-in "
        "data it says nothing",
    )
    arguments = parser.parse_args(argv)
    display = Display()
    runs, others = [], []
    for run in map(Run, dict.fromkeys(map(Path, arguments.runs))):
        if not run.exists():
            others.append(f"{run.folder} holds no run (no {run.config_path.name})")
        elif run.exported():
            others.append(_exported(run))
        elif run.finished():
            runs.append(run)
        else:
            display.note(f"{run.folder} is not finished: left out")
    if others and not runs:
        raise UserError(others[0])
    for why in others:
        display.note(f"left out: {why}")
    if not runs:
        return 0
    if arguments.data is not None:
        runs = _moved(runs, arguments.data)
    path = arguments.out or _place(runs)
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: name a file in it, {path / PAGE}")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}; create it first")
    overview.compare(runs, display)
    for run in runs:
        overview.show_rewards(run, display)
    display.note(f"wrote {report.write(records.read(runs), path, arguments.examples)}")
    return 0


def _moved(runs: Sequence[Run], data: str) -> list[Run]:
    """The runs, those on folders with their data where it is now.

    Raises:
        UserError: there are none on folders, they are of several tasks, or there is no such folder.
    """
    from optima_fast import tasks

    configs = {run.folder: run.config() for run in runs}
    moved = {folder: config.task for folder, config in configs.items() if config.data != "digits"}
    names = list(dict.fromkeys(moved.values()))
    if not names:
        raise UserError(f"--data {data}: all runs are on the built-in data: leave it out")
    if len(names) > 1:
        raise UserError(
            f"--data {data} is of one task, and the runs on folders are of {', '.join(names)}: "
            "report each task by itself"
        )
    tasks.check(data)
    return [type(run)(run.folder, data) if run.folder in moved else run for run in runs]


def _place(runs: Sequence[Run]) -> Path:
    """Where the page is written by default.

    Raises:
        UserError: the runs are in several folders.
    """
    if len(runs) == 1:
        return runs[0].folder / PAGE
    parents = list(dict.fromkeys(run.folder.absolute().parent for run in runs))
    if len(parents) > 1:
        raise UserError(
            f"the runs are in several folders, such as {parents[0]} and {parents[1]}: "
            "--out FILE.html says where the page goes"
        )
    return runs[0].folder.parent / PAGE


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)


def _exported(run: Run) -> str:
    return (
        f"{run.folder} holds a student without the record of its training "
        f"({run.metrics_path.name}), as optima_fast.export writes it; give the run that it is of, "
        f"or measure it: python -m optima_fast.evaluate {shlex.quote(str(run.folder))}"
    )


if __name__ == "__main__":
    sys.exit(main())
