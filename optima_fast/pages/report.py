"""The report of one run or of many as one HTML page."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from optima_fast.pages import examples, figures, html, records
from optima_fast.pages.records import Group, Record, Task
from optima_fast.training import checkpoints
from optima_fast.training.overview import number, reward_line, shares
from optima_fast.training.rounds import of_rounds, rewards_by_arm

METRICS = {
    "student_metric": "student",
    "teacher_metric": "teacher",
    "student_metric_before": "student before training",
    "text_only_metric": "from the text alone",
    "majority_metric": "always the same answer",
}


def write(tasks: Sequence[Task], path: Path, each: int) -> Path:
    """Write the page of these runs.

    Args:
        tasks: what is shown.
        path: of the page.
        each: so many examples that are answered rightly and as many that are answered wrongly.

    Returns:
        The path.

    Raises:
        UserError: the page cannot be saved.
    """
    count = sum(len(task.records) for task in tasks)
    several = f"{count} runs of {', '.join(task.name for task in tasks)}"
    title = f"optima_fast: {several if count > 1 else _title(tasks[0])}"
    parts = [part for task in tasks for part in _task(task, each)]
    if count > 1:
        parts.insert(0, f"<h1>{escape(title)}</h1>")
    parts += ["<h2>Settings</h2>", *map(_settings, tasks)]
    checkpoints.write_text(path, html.document(title, parts))
    return path


def _title(task: Task) -> str:
    record = task.records[0]
    return f"{task.name}: {task.groups[0].label}, seed {record.config.seed}"


def _task(task: Task, each: int) -> list[str]:
    """All of a task: results first, then examples, then plots."""
    first = [_results(task)] if len(task.records) > 1 else [_result(task)]
    shown = [examples.of_task(task, each)] if each else []
    parts = [*first, *shown, f"<h2>{escape(task.name)}: validation split</h2>"]
    if task.uncounted is not None:
        parts.append(html.paragraph(f"Arithmetic is not counted: {task.uncounted}.", "quiet"))
    parts.append(html.plots(figures.validation(task)))
    return parts + [part for group in task.groups for part in _group(group)]


def _result(task: Task) -> str:
    """What came of a single run."""
    (record,) = task.records
    summary = record.summary
    known = {label: summary[key] for key, label in METRICS.items() if summary[key] is not None}
    tiles = "".join(
        f'<div class="tile"><b>{number(value)}</b>{escape(label)}</div>'
        for label, value in known.items()
    )
    return (
        f"<h1>{escape(_title(task))}</h1>"
        + html.paragraph(
            f"The {task.metric} on the test split of {summary['data']}, after {summary['steps']:,} "
            f"steps in {_seconds(record):.0f} s on {summary['device']}."
        )
        + f'<div class="tiles">{tiles}</div>'
        + html.paragraph("The command that made it:")
        + html.commands([records.command(record.config)])
    )


def _results(task: Task) -> str:
    """What came of several runs, a line a method, and the commands that made them."""
    header = ["method", "seeds", "median", "least-most", *list(METRICS.values())[1:], "seconds"]
    rows = [_row(group) for group in task.groups]
    runs = [
        [str(r.run.folder), g.label, str(r.config.seed), number(r.summary["student_metric"])]
        for g in task.groups
        for r in g.records
    ]
    made = [records.command(record.config) for record in task.records]
    return (
        f"<h2>{escape(task.name)}: {escape(task.metric)} on the test split</h2>"
        + html.table(rows, header)
        + html.plots([figures.results(task)])
        + html.details(
            f"{len(runs)} runs and the commands that made them",
            [html.table(runs, ["run", "method", "seed", task.metric]), html.commands(made)],
        )
    )


def _row(group: Group) -> list[str]:
    metrics = [record.summary["student_metric"] for record in group.records]
    others = [
        [r.summary[key] for r in group.records if r.summary[key] is not None]
        for key in list(METRICS)[1:]
    ]
    return [
        group.label,
        ", ".join(str(record.config.seed) for record in group.records),
        number(statistics.median(metrics)),
        f"{number(min(metrics))}-{number(max(metrics))}",
        *(number(statistics.median(values) if values else None) for values in others),
        f"{statistics.median(map(_seconds, group.records)):.0f}",
    ]


def _seconds(record: Record) -> float:
    seconds = record.summary["seconds"]
    return float(seconds["distill"] + seconds["reward"])


def _group(group: Group) -> list[str]:
    """A method's arms and losses."""
    chosen, pulls = figures.choices(group), group.records[0].summary["arms"]
    parts = [f"<h2>{escape(group.label)}: modules, losses</h2>"]
    if not chosen:
        told = shares(pulls) if any(pulls.values()) else "none"
        parts.append(html.paragraph(f"Modules that were distilled: {told}.", "quiet"))
    parts.append(html.plots([*chosen, *figures.losses(group)]))
    return [*parts, _rewards(group)] if chosen else parts


def _rewards(group: Group) -> str:
    """What each arm earned, in all runs."""
    lines = [line for record in group.records for line in of_rounds(record.lines)]
    rows = [
        [r.name, str(r.pulls), *(f"{value:+.5f}" for value in (r.mean, r.spread, r.least, r.most))]
        for r in rewards_by_arm(lines)
    ]
    if not rows:
        return html.paragraph("No reward was measured.")
    reward = group.records[0].summary.get("reward")
    how = html.paragraph(f"The reward: {reward_line(reward)}.", "quiet") if reward else ""
    header = ["arm", "rounds", "mean reward", "deviation", "least", "most"]
    table = html.table(rows, header)
    return how + html.details("Rewards by arm", [table])


def _settings(task: Task) -> str:
    """All settings; of several runs, those that all have and those that differ."""
    every = [dataclasses.asdict(record.config) for record in task.records]
    same = [[k, str(v)] for k, v in every[0].items() if all(e[k] == v for e in every)]
    differ = [k for k, v in every[0].items() if any(e[k] != v for e in every)]
    parts = []
    if differ:
        rows = [[str(settings[name]) for name in differ] for settings in every]
        parts = [html.paragraph("What differs:"), html.table(rows, differ)]
        parts.append(html.paragraph("What all runs have:"))
    shown = [row for row in same if row[1] != "None"]
    return html.details(f"{task.name}: all settings", [*parts, html.table(shown)])
