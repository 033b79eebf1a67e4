"""What a run shows: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Values = Mapping[str, str | Mapping[str, float]]  # texts, and shares of a whole by name

WIDEST = 100  # of a view
_BARS = 7  # the largest shares, which have a bar each
_NAMED = 2  # which a plain line has


class Display:
    """Progress and results on standard output.

    On a terminal a view is redrawn; elsewhere ten plain lines a stage are printed.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stdout, quiet=quiet, highlight=False)
        if not self._console.is_terminal:
            self._console = Console(file=sys.stdout, quiet=quiet, highlight=False, width=100)

    @property
    def width(self) -> int:
        """Letters that fit in a line."""
        return self._console.width

    def note(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int, start: int = 0) -> Iterator[Stage]:
        """Progress of ``total`` steps, ``start`` of which are done."""
        if not self._console.is_terminal:
            yield Stage(self._console, name, total, start)
            return
        with Live(console=self._console, transient=True) as live:
            stage = Stage(self._console, name, total, start, live)
            live.update(stage.view(start, {}, {}))
            yield stage

    def table(self, title: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
        """Rows of text in aligned columns below a title; the first column is the label."""
        if title:
            self.note(title)
        table = Table(show_header=bool(header))
        for i in range(max(map(len, rows))):
            table.add_column(header[i] if header else "", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self._console.print(table)


class Stage:
    """One stage's progress; made by :meth:`Display.stage`."""

    def __init__(
        self, console: Console, name: str, total: int, start: int, live: Live | None = None
    ) -> None:
        self._console, self._name, self._total, self._start = console, name, total, start
        self._live = live
        self._began = time.monotonic()
        self._printed = start * 10 // total

    def update(self, step: int, values: Values, more: Mapping[str, str] | None = None) -> None:
        """``step`` steps are done; ``values`` are shown beside it, ``more`` in a view alone."""
        if self._live is not None:
            self._live.update(self.view(step, values, more or {}))
            return
        tenth = step * 10 // self._total
        if tenth > self._printed:
            self._printed = tenth
            text = "  ".join(f"{key} {_plain(value)}" for key, value in values.items())
            text = f"{self._name}: step {step}/{self._total}  {text}  {self._left(step):.0f} s left"
            self._console.print(escape(text), soft_wrap=True)

    def view(self, step: int, values: Values, more: Mapping[str, str]) -> Group:
        """The progress as a bar, the texts below it, and a bar for each share."""
        done = f"{step}/{self._total}"
        if step > self._start:
            done += f"  {datetime.timedelta(seconds=round(self._left(step)))} left"
        head, below, bars = (self._grid() for _ in range(3))
        head.add_row(Text(self._name), ProgressBar(self._total, step), Text(done))
        for key, value in {**values, **more}.items():
            if isinstance(value, str):
                below.add_row(Text(key), Text(value))
                continue
            bars.add_row(Text(key))
            for name, share in _largest(value, _BARS):
                bars.add_row(Text(f"  {name}"), ProgressBar(1.0, share), Text(f"{share:4.0%}"))
        return Group(head, below, bars)

    def _grid(self) -> Table:
        """Rows of a label, something that takes the room there is, and a number."""
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.width = min(self._console.width, WIDEST)
        grid.add_column(no_wrap=True, overflow="ellipsis", max_width=grid.width // 2)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        return grid

    def _left(self, step: int) -> float:
        """Seconds."""
        done = step - self._start
        return (time.monotonic() - self._began) / done * (self._total - step)


def _largest(shares: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(((n, s) for n, s in shares.items() if s), key=lambda item: -item[1])[:count]


def _plain(value: str | Mapping[str, float]) -> str:
    if isinstance(value, str):
        return value
    return ", ".join(f"{name} {share:.0%}" for name, share in _largest(value, _NAMED))
