"""The trainer in processes of its own, which Ctrl-C reaches through this one alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from optima_fast.training.interrupts import INTERRUPTED


def command(words: Sequence[str]) -> list[str]:
    """The trainer's command line with these flags."""
    return [sys.executable, "-m", "optima_fast.train", *words]


class Process:
    """A run in a process of its own; whoever makes it calls :meth:`stop` in the end.

    Args:
        argv: its command line.
        environment: what it has beside the variables of this process.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (stop closes it)
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def running(self) -> bool:
        return self._process.poll() is None

    def ask(self) -> None:
        """Ask it to save and to end."""
        if self.running():
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """:meth:`ask`, and wait until it has."""
        self.ask()
        self._process.wait()
        self._errors.close()

    @property
    def code(self) -> int:
        """Its exit code; waits for it."""
        return self._process.wait()

    def error(self) -> str:
        """The last line that it said of its failure; empty where it ended well or was stopped."""
        code = self.code
        if code in (0, INTERRUPTED):
            return ""
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        why = said[-1].removeprefix("error: ") if said and code > 0 else ""
        return why or f"it ended with code {code}"
