"""The tables of a comparison, on the terminal and in its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optima_fast.compare import curves, statistics
from optima_fast.compare.grid import FORMAT, PAGE, RESULT, Cell, Grid
from optima_fast.compare.statistics import BUDGETS, NOISE, SEEDS, Difference, Row
from optima_fast.training import Display, checkpoints
from optima_fast.training.overview import number

Table = list[list[str]]  # the header first
MARK = " *"


@dataclass(frozen=True)
class Section:
    """What came of one task."""

    task: str
    metric: str
    rows: Sequence[Row]
    winner: str | None


def begin(grid: Grid) -> None:
    """Mark the folder as a comparison's."""
    path = grid.folder / RESULT
    if not path.is_file():
        checkpoints.write_json(path, {"format": FORMAT})


def show(grid: Grid, cells: Sequence[Cell], failed: Mapping[str, str], display: Display) -> None:
    """Print the tables of the runs that are finished, and write them into the folder.

    Args:
        grid: what is compared.
        cells: its runs.
        failed: by a run's name, why.
        display: where to print.

    Raises:
        UserError: a run's files are damaged, or the tables cannot be saved.
    """
    sections, notes = measure(grid, cells), explained(grid)
    for section in sections:
        head = f"{section.task}: {section.metric} of the test split"
        header, *body = of_test(section, grid.baseline)
        display.table(head, body, header)
        display.note(verdict(section))
        header, *body = of_budgets(section, grid.baseline)
        if body:
            display.table(f"{section.task}: {section.metric} at equal budgets", body, header)
    if sections:
        for note in notes:
            display.note(note)
    checkpoints.write_json(grid.folder / RESULT, as_json(grid, sections, failed))
    checkpoints.write_text(grid.folder / PAGE, as_markdown(grid, sections, failed, notes))
    display.note(f"wrote {grid.folder / RESULT} and {grid.folder / PAGE}")


def measure(grid: Grid, cells: Sequence[Cell]) -> list[Section]:
    """What came of each task that has a finished run."""
    sections = []
    for task in grid.tasks:
        done = [cell for cell in cells if cell.task == task and cell.run.finished()]
        if not done:
            continue
        counted = curves.operations([cell.run for cell in done])
        results: dict[str, dict[int, curves.Result]] = {e.label: {} for e in grid.entries}
        for cell, operations in zip(done, counted, strict=True):
            results[cell.label][cell.seed] = curves.read(cell.run, operations)
        rows = statistics.rows(results, grid.baseline)
        best = statistics.winner({row.label: row.metrics for row in rows})
        sections.append(Section(task, done[0].run.metric_name(), rows, best))
    return sections


def of_test(section: Section, baseline: str) -> Table:
    """Methods on the test split."""
    table = [
        ["method", "median", "least-most", f"minus {baseline}", "seeds", "arithmetic", "seconds"]
    ]
    for row in section.rows:
        metrics = row.metrics.values()
        table.append(
            [
                row.label + (MARK if row.label == section.winner else ""),
                number(row.median),
                f"{number(min(metrics))}-{number(max(metrics))}",
                _difference(row.difference),
                str(len(metrics)),
                "-" if row.arithmetic is None else f"{row.arithmetic:.2f}",
                f"{row.distill:.0f} + {row.reward:.0f}",
            ]
        )
    return table


def of_budgets(section: Section, baseline: str) -> Table:
    """Each method beside the baseline on the validation split, at equal budgets."""
    table = [["method", "equal", "budget", "steps", "metric", baseline, "difference"]]
    for row in section.rows:
        if row.difference is None:
            continue
        for kind in BUDGETS:
            budget = row.budgets.get(kind)
            if budget is None:
                table.append([row.label, kind, *["-"] * 5])
                continue
            size = f"{budget.share:.2f}" if kind == "arithmetic" else f"{budget.budget:.0f} s"
            table.append(
                [
                    row.label,
                    kind,
                    size,
                    "{:.0f}, {:.0f}".format(*budget.steps),
                    *map(number, budget.metrics),
                    _difference(budget.difference),
                ]
            )
    return table


def _difference(difference: Difference | None) -> str:
    """``+0.0270 (0.0020)``, without the error where there is one seed."""
    if difference is None:
        return "-"
    error = "" if difference.error is None else f" ({difference.error:.4f})"
    return f"{difference.mean:+.4f}{error}"


def verdict(section: Section) -> str:
    """Who is ahead, if that can be told."""
    seeds = min(len(row.metrics) for row in section.rows)
    if len(section.rows) < 2:
        return "There is one method, so nothing is compared."
    if section.winner is not None:
        return (
            f"{section.winner} is ahead of each other method by more than {NOISE:g} standard "
            "errors of their paired difference."
        )
    if seeds == 1:
        return "There is one seed, so there is no standard error and no winner can be told."
    if seeds < SEEDS:
        return f"There are {seeds} seeds; a winner needs {SEEDS}."
    return (
        f"No winner: no method is ahead of each other one by more than {NOISE:g} standard errors."
    )


def explained(grid: Grid) -> list[str]:
    """What the columns mean."""
    base = grid.baseline
    teachers = (
        "Each seed has a teacher of its own, which all methods share."
        if grid.teacher_per_seed
        else "All seeds of a task share one teacher, and the standard errors do not hold what "
        "another teacher would change; --teacher-per-seed makes one for each seed."
    )
    return [
        f"minus {base}: mean over the seeds of the metric minus that of {base} of the same seed, "
        "in brackets its standard error. arithmetic: matrix products of the steps, those of "
        f"{base} 1; measuring rewards is not in it. seconds: of the steps + of measuring rewards, "
        "medians; CPU time where a run has one thread and no workers, else elapsed time, which is "
        "longer beside other work. "
        f"{MARK.strip()}: ahead of each other method by more than {NOISE:g} standard errors of at "
        f"least {SEEDS} seeds.",
        teachers,
        "At equal budgets: means on the validation split (steps and budget: medians). A method "
        f"and {base} are read at the last evaluation that each had reached within what the cheaper "
        "of the two runs took in all: matrix products of the steps, or seconds of the steps and of "
        f"measuring rewards. The budget of arithmetic is a share of what {base} took. Nothing "
        "is read between or beyond evaluations: '-' means that one of them had none by then. A run "
        "that is read before its end still has a high learning rate; one that is planned for "
        "this budget may do better.",
    ]


def as_json(grid: Grid, sections: Sequence[Section], failed: Mapping[str, str]) -> dict[str, Any]:
    """Everything that is told, and each seed's metric."""
    return {
        "format": FORMAT,
        "baseline": grid.baseline,
        "seeds": grid.seeds,
        "teacher_per_seed": grid.teacher_per_seed,
        "methods": {entry.label: list(entry.words) for entry in grid.entries},
        "flags": list(grid.common),
        "tasks": {
            section.task: {
                "metric": section.metric,
                "winner": section.winner,
                "rows": [{**dataclasses.asdict(row), "median": row.median} for row in section.rows],
            }
            for section in sections
        },
        "failed": dict(failed),
    }


def as_markdown(
    grid: Grid, sections: Sequence[Section], failed: Mapping[str, str], notes: Sequence[str]
) -> str:
    """The tables as a page."""
    parts = [f"# {', '.join(grid.tasks)}: {', '.join(entry.label for entry in grid.entries)}"]
    for section in sections:
        parts += [
            f"## {section.task}: {section.metric} of the test split",
            _markdown(of_test(section, grid.baseline)),
            verdict(section),
        ]
        budgets = of_budgets(section, grid.baseline)
        if len(budgets) > 1:
            parts += [
                f"### {section.task}: {section.metric} of the validation split at equal budgets",
                _markdown(budgets),
            ]
    parts += notes if sections else ["No run is finished."]
    parts += [f"FAILED: {name}: {why}" for name, why in failed.items()]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    header, *body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    return "\n".join([header, "|" + "---|" * len(table[0]), *body])
