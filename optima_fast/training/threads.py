"""CPU threads that do not fight each other; imported before torch, as OpenMP reads this once."""

from __future__ import annotations

import os


def calm_openmp() -> None:
    """Let idle OpenMP threads sleep soon instead of spinning, unless the user chose otherwise.

    With another busy process on the machine, threads that spin at a barrier take the very core
    that the thread they wait for needs, and a step can become 100 times slower.
    """
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("KMP_BLOCKTIME", "0")):
        os.environ.setdefault(name, value)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
