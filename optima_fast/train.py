"""``python -m optima_fast.train``: distil a student, measure it, and print the results.

Without arguments it runs the built-in task from start to end. Each setting below is a flag, and
also a key of the YAML file that --config names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from optima_fast.entry import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake, 130 after Ctrl-C."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.training import dry_run, experiment, overview, ranks, stages
    from optima_fast.training.display import Display
    from optima_fast.training.flags import parse
    from optima_fast.training.interrupts import Interrupted

    description = (__doc__ or "").partition(": ")[2]
    with ranks.said_once():
        given = parse(argv, prog="python -m optima_fast.train", description=description)
        display, dry = Display(quiet=ranks.speechless()), given.pop("dry_run", False)
        config = experiment.settings(given)
        first = stages.first(config)
    if dry:
        dry_run.show(first, display)
        return 0
    try:
        run, summary = (stages.run if config.stages else experiment.run)(config, display)
    except Interrupted as error:
        display.note(f"{error}; the same command goes on from there")
        return 130
    if not ranks.speechless():
        overview.show(run, summary, display)
    return 0


if __name__ == "__main__":
    sys.exit(main())
