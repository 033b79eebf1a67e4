"""``python -m optima_fast.report RUN...``: compare runs, and write a page for each.

Prints one line a run and each arm's rewards, and writes ``report.html`` into each run folder:
results, losses over the steps, which arm the bandit chose in each round and what it earned.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optima_fast.entry import Parser, guarded
from optima_fast.errors import UserError

if TYPE_CHECKING:
    from optima_fast.training.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.training import overview, page
    from optima_fast.training.display import Display
    from optima_fast.training.run import Run

    parser = Parser(
        prog="python -m optima_fast.report", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    display = Display()
    runs, exported = [], []
    for run in map(Run, parser.parse_args(argv).runs):
        run.config()
        if run.exported():
            exported.append(run)
        elif run.finished():
            run.summary()
            runs.append(run)
        else:
            display.note(f"{run.folder} is not finished: left out")
    if exported and not runs:
        raise UserError(_exported(exported[0]))
    for run in exported:
        display.note(f"left out: {_exported(run)}")
    if not runs:
        return 0
    overview.compare(runs, display)
    for run in runs:
        overview.show_rewards(run, display)
    for run in runs:
        display.note(f"wrote {page.write(run)}")
    return 0


def _exported(run: Run) -> str:
    return (
        f"{run.folder} holds a student without the record of its training "
        f"({run.metrics_path.name}), as optima_fast.export writes it; give the run that it is of, "
        f"or measure it: python -m optima_fast.evaluate {shlex.quote(str(run.folder))}"
    )


if __name__ == "__main__":
    sys.exit(main())
