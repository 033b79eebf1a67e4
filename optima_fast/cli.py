"""``optima-fast train|evaluate|report|doctor``, and what the entry points share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from optima_fast.errors import UserError

COMMANDS = ("train", "evaluate", "report", "doctor")


def calm_openmp() -> None:
    """Let idle OpenMP threads sleep soon instead of spinning, unless the user chose otherwise.

    With another busy process on the machine, threads that spin at a barrier take the very core
    that the thread they wait for needs, and a step can become 100 times slower. OpenMP reads
    this once, when torch is imported.
    """
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("KMP_BLOCKTIME", "0")):
        os.environ.setdefault(name, value)


def guarded(body: Callable[[], int]) -> int:
    """Run an entry point; a user's mistake becomes one line on stderr and exit code 2."""
    calm_openmp()
    try:
        return body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("optima_fast", "torch"):
            raise
        print(f"error: {error}: pip install 'optima-fast[train]'", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to ``optima_fast.train`` and its siblings."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "train":
        from optima_fast.train import main as run
    elif command == "evaluate":
        from optima_fast.evaluate import main as run
    elif command == "report":
        from optima_fast.report import main as run
    elif command == "doctor":
        from optima_fast.doctor import main as run
    else:
        wanted = command in ("-h", "--help")
        usage = f"usage: optima-fast {{{','.join(COMMANDS)}}} [--help] ..."
        print(usage, file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    return run(rest)


if __name__ == "__main__":
    sys.exit(main())
