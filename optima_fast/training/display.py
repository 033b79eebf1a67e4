"""What a run shows: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """Progress and results on standard output.

    On a terminal one line is redrawn; elsewhere ten plain lines a stage are printed.
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
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(name, total=total, completed=start, text="")
                yield Stage(self._console, name, total, start, progress, task)
        else:
            yield Stage(self._console, name, total, start)

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
        self,
        console: Console,
        name: str,
        total: int,
        start: int,
        progress: Progress | None = None,
        task: TaskID | None = None,
    ) -> None:
        self._console, self._name, self._total, self._start = console, name, total, start
        self._progress, self._task = progress, task
        self._began = time.monotonic()
        self._printed = start * 10 // total

    def update(self, step: int, values: Mapping[str, str]) -> None:
        """``step`` steps are done; ``values`` are shown beside the bar."""
        text = "  ".join(f"{key} {value}" for key, value in values.items())
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, text=escape(text))
            return
        tenth = step * 10 // self._total
        if tenth > self._printed:
            self._printed = tenth
            done = step - self._start
            left = (time.monotonic() - self._began) / done * (self._total - step)
            self._console.print(
                escape(f"{self._name}: step {step}/{self._total}  {text}  {left:.0f} s left"),
                soft_wrap=True,
            )
