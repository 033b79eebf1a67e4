"""What the entry points share: quiet threads, one line for a user's mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from optima_fast.errors import UserError


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
