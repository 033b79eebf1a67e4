"""Ctrl-C and a polite kill: the step is finished first."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # the exit code of a command that was stopped


STARTED = time.monotonic()  # when this process began, nearly


class Interrupted(Exception):
    """Ctrl-C: the run was saved after the step it was in."""


class Stop:
    """Whether the run is asked to stop.

    Attributes:
        asked: True from the first signal on.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Note the first SIGINT or SIGTERM; a second one is a KeyboardInterrupt at once."""
        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: nothing to catch there
            pass
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
