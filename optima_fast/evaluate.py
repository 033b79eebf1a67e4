"""``python -m optima_fast.evaluate RUN``: measure a run's saved student on the test split again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from optima_fast.entry import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.training import experiment, overview
    from optima_fast.training.display import Display

    parser = argparse.ArgumentParser(
        prog="python -m optima_fast.evaluate", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--device", default=None, help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    run, metrics, recorded = experiment.evaluate(arguments.run, arguments.device)
    overview.show_evaluation(run, metrics, recorded, Display())
    return 0


if __name__ == "__main__":
    sys.exit(main())
