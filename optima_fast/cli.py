"""``optima-fast demo|train|compare|evaluate|predict|report|export|doctor``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = ("demo", "train", "compare", "evaluate", "predict", "report", "export", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to ``optima_fast.train`` and its siblings."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "demo":
        from optima_fast.demo.__main__ import main as run
    elif command == "train":
        from optima_fast.train import main as run
    elif command == "compare":
        from optima_fast.compare.__main__ import main as run
    elif command == "evaluate":
        from optima_fast.evaluate import main as run
    elif command == "predict":
        from optima_fast.predict import main as run
    elif command == "report":
        from optima_fast.report import main as run
    elif command == "export":
        from optima_fast.export import main as run
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
