"""A run as one HTML page without scripts or outside files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from optima_fast.training import checkpoints
from optima_fast.training.overview import method_name, number
from optima_fast.training.run import Run

WIDTH, ROW, LEFT = 860, 22, 190

METRICS = {
    "teacher_metric": "teacher",
    "student_metric_before": "student before",
    "student_metric": "student after",
    "majority_metric": "majority",
    "text_only_metric": "text only",
}

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td{padding:.15em 1em .15em 0;vertical-align:top}
svg{background:#fafafa;border:1px solid #ddd}text{font-size:12px}h2{margin-top:1.6em}"""


def write(run: Run) -> Path:
    """Write ``report.html`` into the run's folder; its path.

    Raises:
        UserError: the run is not finished, its files are damaged, or the page cannot be saved.
    """
    summary, lines = run.summary(), run.metrics()
    metric = summary["metric_name"]
    results = [(label, number(summary[name])) for name, label in METRICS.items()]
    settings = [(k, str(v)) for k, v in dataclasses.asdict(run.config()).items() if v is not None]
    parts = [
        f"<h1>{escape(summary['task'])}: {escape(method_name(summary))}</h1>",
        f"<h2>{escape(metric)} on the test split</h2>",
        _table(results),
        "<h2>Losses</h2>",
        _curves(lines),
        "<h2>Arms</h2>",
        _choices(lines, summary["arms"]),
        "<h2>Settings</h2>",
        _table(settings),
    ]
    title = escape(run.folder.name)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    path = run.folder / "report.html"
    checkpoints.write_text(path, text)
    return path


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """The total and the prediction loss over the steps."""
    logged = [line for line in lines if line.get("loss") is not None]
    if len(logged) < 2:
        return "<p>Too few logged steps to draw.</p>"
    height = 200
    top = max(line["loss"] for line in logged) or 1.0
    last = logged[-1]["step"]

    def points(key: str) -> str:
        return " ".join(
            f"{line['step'] / last * WIDTH:.1f},{height - line[key] / top * height:.1f}"
            for line in logged
            if line.get(key) is not None
        )

    return (
        f'<svg width="{WIDTH}" height="{height}" role="img" aria-label="losses over steps">'
        f'<polyline fill="none" stroke="#888" points="{points("loss")}"/>'
        f'<polyline fill="none" stroke="#06c" points="{points("prediction")}"/>'
        f'<text x="6" y="14">{top:.3g}</text><text x="{WIDTH - 70}" y="{height - 6}">step {last}'
        "</text></svg><p>Grey: total. Blue: prediction.</p>"
    )


def _choices(lines: Sequence[Mapping[str, Any]], pulls: Mapping[str, int]) -> str:
    """One row an arm, one mark a round; taller marks for higher rewards."""
    rounds = [line for line in lines if "round" in line and "loss" not in line]
    if not rounds:
        return "<p>" + (", ".join(f"{k} {v}" for k, v in pulls.items() if v) or "none") + "</p>"
    step = (WIDTH - LEFT) / max(1, rounds[-1]["round"])
    best = max((line.get("reward") or 0.0 for line in rounds), default=0.0) or 1.0
    marks = []
    rows = {name: i for i, name in enumerate(pulls)}
    for name, i in rows.items():
        marks.append(f'<text x="4" y="{i * ROW + 16}">{escape(name)} ({pulls[name]})</text>')
    for line in rounds:
        tall = 4 + (ROW - 8) * (line.get("reward") or 0.0) / best
        x = LEFT + (line["round"] - 1) * step
        y = rows[line["arm"]] * ROW + ROW - 2 - tall
        marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, step * 0.8):.1f}" '
            f'height="{tall:.1f}" fill="#06c"/>'
        )
    return (
        f'<svg width="{WIDTH}" height="{len(rows) * ROW + 4}" role="img" '
        f'aria-label="arm of each round">{"".join(marks)}</svg>'
        "<p>One mark a round; its height is the reward.</p>"
    )
