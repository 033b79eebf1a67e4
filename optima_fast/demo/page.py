"""The demo as one HTML page without scripts or outside files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from optima_fast.demo import words
from optima_fast.demo.pair import METHODS
from optima_fast.pages import figures, html, records, report
from optima_fast.pages.examples import Example, gallery
from optima_fast.training import Run, checkpoints


def write(folder: Path, result: Mapping[str, Any], examples: Sequence[Example]) -> Path:
    """Write ``demo.html`` into the demo's folder, and the report of both students; its path."""
    task = result["settings"]["task"]
    runs = records.read([Run(folder / method) for method in METHODS])
    whole = report.write(runs, folder / "report.html", 0)
    header, *rows = words.table(result)
    parts = [
        f"<h1>{escape(task)}: which modules to distil</h1>",
        html.paragraph(words.introduction(result)),
        html.table(rows, header),
        *map(html.paragraph, words.reading(result)),
        "<h2>Four test examples</h2>",
        gallery(examples),
        f"<h2>What {METHODS[0]} chose</h2>",
        html.plots(figures.choices(runs[0].groups[0])[:2]),
        "<h2>Go on</h2>",
        html.commands(words.further(result, folder)),
        f'<p><a href="{whole.name}">Both runs in full</a>: losses, rounds, rewards, settings.</p>',
    ]
    path = folder / "demo.html"
    checkpoints.write_text(path, html.document(f"optima_fast: {task}", parts))
    return path
