"""``python -m optima_fast.evaluate RUN``: measure the saved student of a run again.

With --predictions it also writes the student's answers, in the format that the data set's own
evaluation takes: JSON for VQA's server, CSV for NLVR2, JSON results for COCO, JSON lines of pairs
and labels for SNLI-VE.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from optima_fast.entry import Parser, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.training import experiment, overview
    from optima_fast.training.display import Display

    parser = Parser(
        prog="python -m optima_fast.evaluate", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--data", metavar="FOLDER", help="where the data set is now, if it has moved since the run"
    )
    parser.add_argument(
        "--device", default=None, help="auto, cpu, cuda or cuda:N; default the run's"
    )
    parser.add_argument(
        "--split",
        default="test",
        help="train, validation or test (default); for VQA v2 also test-dev and test-std, for "
        "NLVR2 also test2",
    )
    parser.add_argument("--predictions", metavar="FILE", help="write the answers to this new file")
    arguments = parser.parse_args(argv)
    run, metrics, recorded = experiment.evaluate(
        arguments.run,
        arguments.device,
        data=arguments.data,
        split=arguments.split,
        predictions=arguments.predictions,
    )
    display = Display()
    overview.show_evaluation(run, metrics, recorded, display, arguments.split)
    if arguments.predictions:
        display.note(f"wrote {arguments.predictions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
