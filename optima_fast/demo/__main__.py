"""``python -m optima_fast.demo``: distil two students from one teacher and compare them.

Both students learn a task on images of handwritten digits, on the CPU. One distils the modules with
most left to teach for their cost, the other distils all modules. At the end the demo prints both
results, what may be concluded from them, and four examples, and writes them to an HTML page. Ctrl-C
saves, and the same command goes on. A finished demo is shown again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from optima_fast.entry import Parser, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake, 130 after Ctrl-C."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    from optima_fast.demo import demo
    from optima_fast.demo.pair import TASKS, Settings
    from optima_fast.training import Display, Interrupted

    usual = Settings()
    parser = Parser(
        prog="python -m optima_fast.demo",
        description=(__doc__ or "").partition(": ")[2],
        allow_abbrev=False,
    )
    parser.add_argument("--task", choices=TASKS, default=usual.task, help="default %(default)s")
    parser.add_argument(
        "--seed", type=_whole, default=usual.seed, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--steps", type=_whole, metavar="N", help="steps of each student; default 1000"
    )
    parser.add_argument(
        "--teacher-steps",
        type=_whole,
        metavar="N",
        help="train a teacher for N steps, even where the package has one",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="the folder of both runs; default one below runs/, named by task and seed",
    )
    parser.add_argument(
        "--open", action="store_true", help="open the page in a browser, if there is a screen"
    )
    given = parser.parse_args(argv)
    settings = Settings(given.task, given.seed, given.steps, given.teacher_steps)
    display = Display()
    try:
        page = demo.run(settings, given.out or demo.default_folder(settings), display)
    except Interrupted as error:
        display.note(f"{error}; the same command goes on from there")
        return 130
    if given.open:
        demo.open_page(page, display)
    return 0


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
