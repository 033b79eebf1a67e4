"""``python -m optima_fast.evaluate RUN``: measure a run's saved student again, write predictions.

Predictions are written as the data set's own evaluation takes them: VQA's JSON for the server,
NLVR2's CSV, COCO's JSON of results, JSON lines of pairs and labels for SNLI-VE.
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
        "--data", metavar="FOLDER", help="where the data set is now, if not where the run had it"
    )
    parser.add_argument("--device", default=None, help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--split",
        default="test",
        help="train, validation, test (default); of VQA v2 also test-dev, test-std; of NLVR2 test2",
    )
    parser.add_argument("--predictions", metavar="FILE", help="write predictions to a new file")
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
