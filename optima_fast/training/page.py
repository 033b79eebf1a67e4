"""A run as one HTML page without scripts or outside files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from optima_fast.training import checkpoints
from optima_fast.training.overview import method_name, number
from optima_fast.training.rounds import of_rounds, rewards_by_arm
from optima_fast.training.run import Run

WIDTH, ROW, LEFT = 860, 22, 230  # of the figures, a row of marks, the labels beside it
ROWS, LABEL = 24, 28  # most rows, and letters of a label
COLOURS = ("#06c", "#e07b00", "#2a8f4a", "#8a4fbf", "#b5a100", "#0aa3a3", "#d4569b")
NEGATIVE = "#d00"

METRICS = {
    "teacher_metric": "teacher",
    "student_metric_before": "student before",
    "student_metric": "student after",
    "majority_metric": "majority",
    "text_only_metric": "text only",
}

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em}
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
        choices(lines, summary["arms"]),
        "<h2>Rewards by arm</h2>",
        _rewards(lines),
        "<h2>Settings</h2>",
        _table(settings),
    ]
    path = run.folder / "report.html"
    checkpoints.write_text(path, document(run.folder.name, STYLE, parts))
    return path


def document(title: str, style: str, parts: Sequence[str]) -> str:
    """A page of HTML parts."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}</style>{''.join(parts)}</html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


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


def choices(lines: Sequence[Mapping[str, Any]], pulls: Mapping[str, int]) -> str:
    """The arms over the rounds: a mark a round, and each arm's share so far."""
    rounds = of_rounds(lines)
    if not rounds:
        return "<p>" + (", ".join(f"{k} {v}" for k, v in pulls.items() if v) or "none") + "</p>"
    shown = sorted((n for n in pulls if pulls[n]), key=lambda n: -pulls[n])[:ROWS]
    rows = [name for name in pulls if name in shown]
    colours = dict.fromkeys(rows, "#999") | dict(zip(shown, COLOURS, strict=False))
    others = len([name for name in pulls if pulls[name]]) - len(rows)
    more = f" {others} more arms were pulled less often." if others else ""
    return (
        _raster(rounds, rows, colours, pulls)
        + "<p>One mark a round; its height is the reward, red below 0. "
        + f"In brackets the rounds of each arm.{more}</p>"
        + _shares(rounds, shown, colours)
        + "<p>Share of all rounds so far, in the colours above.</p>"
    )


def _raster(
    rounds: Sequence[Mapping[str, Any]],
    rows: Sequence[str],
    colours: Mapping[str, str],
    pulls: Mapping[str, int],
) -> str:
    """One row an arm, one mark a round."""
    step = (WIDTH - LEFT) / rounds[-1]["round"]
    highest = max(abs(line.get("reward") or 0.0) for line in rounds) or 1.0
    row = {name: i * ROW for i, name in enumerate(rows)}
    marks = []
    for name, top in row.items():
        label = name if len(name) <= LABEL else name[: LABEL - 2] + ".."
        marks.append(
            f'<text x="4" y="{top + 16}">{escape(label)} ({pulls[name]})'
            f"<title>{escape(name)}</title></text>"
        )
    for line in rounds:
        if line["arm"] not in row:
            continue
        reward = line.get("reward") or 0.0
        tall = 4 + (ROW - 8) * abs(reward) / highest
        x = LEFT + (line["round"] - 1) * step
        colour = NEGATIVE if reward < 0 else colours[line["arm"]]
        marks.append(
            f'<rect x="{x:.1f}" y="{row[line["arm"]] + ROW - 2 - tall:.1f}" '
            f'width="{max(1.0, step * 0.8):.1f}" height="{tall:.1f}" fill="{colour}"/>'
        )
    return (
        f'<svg width="{WIDTH}" height="{len(rows) * ROW + 4}" role="img" '
        f'aria-label="arm of each round">{"".join(marks)}</svg>'
    )


def _shares(
    rounds: Sequence[Mapping[str, Any]], shown: Sequence[str], colours: Mapping[str, str]
) -> str:
    """Share of the rounds so far of the arms pulled most."""
    height, last = 160, rounds[-1]["round"]
    curves = []
    for name in shown[: len(COLOURS)]:
        pulled, points = 0, []
        for done, line in enumerate(rounds, 1):
            pulled += line["arm"] == name
            x = LEFT + line["round"] / last * (WIDTH - LEFT)
            points.append(f"{x:.1f},{height - pulled / done * height:.1f}")
        curves.append(
            f'<polyline fill="none" stroke="{colours[name]}" stroke-width="1.5" '
            f'points="{" ".join(points)}"><title>{escape(name)}</title></polyline>'
        )
    return (
        f'<svg width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="share of the rounds so far">{"".join(curves)}'
        f'<text x="{LEFT - 40}" y="14">100%</text><text x="{LEFT - 26}" y="{height - 4}">0%</text>'
        f'<text x="{WIDTH - 90}" y="{height - 6}">round {last}</text></svg>'
    )


def _rewards(lines: Sequence[Mapping[str, Any]]) -> str:
    """What each arm earned."""
    records = rewards_by_arm(lines)
    if not records:
        return "<p>No reward was measured.</p>"
    rows: list[Sequence[str]] = [("arm", "rounds", "mean", "deviation", "least", "most")]
    for r in records:
        values = (f"{value:+.5f}" for value in (r.mean, r.spread, r.least, r.most))
        rows.append((r.name, str(r.pulls), *values))
    return _table(rows)
