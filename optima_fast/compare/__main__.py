"""``python -m optima_fast.compare``: compare methods on tasks and seeds, in a table.

Each run is optima_fast.train in a process and a folder of its own. Flags of the trainer that are
given here hold for all runs. An entry of --methods is a method, with settings of its own after
colons: optima:gamma=0.9:round-steps=20. fixed:image is short for fixed:arm=image. An entry
FILE.yaml is a file of settings, as --config takes it, and is labelled by the file's name. The first
run of a task trains the teacher; the other runs wait for it and share it. Ctrl-C saves the runs in
progress; the same command goes on, and repeats no finished run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from optima_fast.entry import Parser, guarded

METHODS = "headroom,layerwise,random"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 where a run failed, 2 for a mistake, 130 after
    Ctrl-C."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.compare import grid, runner, tables
    from optima_fast.training import Display, Interrupted
    from optima_fast.training.interrupts import INTERRUPTED

    arguments, common = _parser().parse_known_args(argv)
    entries = grid.read_entries(arguments.methods)
    grid.check_common(common, entries)
    made = grid.Grid(
        grid.read_tasks(arguments.task),
        entries,
        arguments.seeds,
        grid.read_baseline(arguments.baseline, entries),
        arguments.teacher_per_seed,
        arguments.out,
        tuple(common),
    )
    cells, display = made.cells(), Display()
    grid.check_folder(made.folder, cells)
    first = cells[0].config
    where = runner.places(first.device, first.threads, arguments.jobs)
    if arguments.dry_run:
        for name, state, command in runner.listing(cells, where[0]):
            display.note(f"{name} ({state}): {command}")
        display.note(f"{len(cells)} runs, {len(where)} at a time; nothing was run or written")
        return 0
    runner.check_writable(made.folder)
    tables.begin(made)
    try:
        failed = runner.train(cells, where, display)
    except Interrupted as error:
        display.note(f"{error}; the same command goes on from there")
        return INTERRUPTED
    tables.show(made, cells, failed, display)
    if not failed:
        folder = shlex.quote(str(made.folder))
        display.note(f"next: python -m optima_fast.report {folder}/*/")
    for name, why in failed.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m optima_fast.compare",
        usage="python -m optima_fast.compare [flags below] [flags of optima_fast.train]",
        description=(__doc__ or "").partition(": ")[2],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--task",
        default="vqa",
        metavar="TASK,...",
        help="the tasks, separated by commas; default %(default)s",
    )
    parser.add_argument(
        "--methods",
        default=METHODS,
        metavar="ENTRY,...",
        help="the methods to compare; default %(default)s",
    )
    parser.add_argument(
        "--seeds", type=_whole, default=3, metavar="N", help="seeds 0 to N - 1; default %(default)s"
    )
    parser.add_argument(
        "--baseline",
        metavar="ENTRY",
        help="the method that the others are compared with; default layerwise, else the first one",
    )
    parser.add_argument(
        "--teacher-per-seed",
        action="store_true",
        help="the student of seed S learns from a teacher of seed S, so that the standard errors "
        "include the teachers; by default all seeds of a task share one teacher",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="the folder of all runs and tables; default %(default)s",
    )
    parser.add_argument(
        "--jobs",
        type=_whole,
        metavar="N",
        help="runs at a time; default one per core, or one per GPU",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs and their commands, and stop"
    )
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
