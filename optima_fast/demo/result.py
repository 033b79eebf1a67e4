"""What came of it: both students beside their teacher, on the same test examples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from optima_fast.demo.pair import METHODS
from optima_fast.pages.examples import Example, Truth
from optima_fast.tasks.base import Classification
from optima_fast.training import Run, experiment
from optima_fast.training.rounds import of_rounds

EXAMPLES = 4
NOISE = 2.0  # standard errors that a difference must exceed to be more than the test set's noise


@dataclass(frozen=True)
class Paired:
    """Two models on the same test examples.

    Attributes:
        difference: of their metrics, the first minus the second.
        error: its standard error; examples that show the same images count as one.
        images: how many such groups there are.
        only_first, only_second: examples that this model alone answers rightly.
    """

    difference: float
    error: float
    images: int
    only_first: int
    only_second: int

    @property
    def beyond_noise(self) -> bool:
        return abs(self.difference) > NOISE * self.error


def paired(first: Tensor, second: Tensor, group: int) -> Paired:
    """Compare what each example was worth, float ``[n]``.

    Args:
        first: one model's.
        second: the other's.
        group: so many neighbours show the same images.
    """
    means = (first.double() - second.double()).view(-1, group).mean(1).tolist()
    spread = statistics.stdev(means) if len(means) > 1 else math.inf
    right, other = first > 0.5, second > 0.5
    return Paired(
        statistics.fmean(means),
        spread / math.sqrt(len(means)),
        len(means),
        int((right & ~other).sum()),
        int((other & ~right).sum()),
    )


def measure(folder: Path) -> tuple[dict[str, Any], list[Example]]:
    """Ask all three models about the test split.

    Returns:
        What is printed and kept in ``demo.json``, and the examples that are shown.
    """
    runs = {method: Run(folder / method) for method in METHODS}
    config = runs[METHODS[0]].config()
    experiment.prepare(config)
    data = experiment.load_data(config)
    assert isinstance(data, Classification)
    said, worth = {}, {}
    for name in ("teacher", *METHODS):
        model = Run(folder / name).load_model(data)
        predictions = data.predict(model, data.test)
        said[name], worth[name] = predictions.texts, data.gained(data.test, predictions)
    pair = paired(worth[METHODS[0]], worth[METHODS[1]], data.test.group)
    summaries = {method: run.summary() for method, run in runs.items()}
    result = {
        "metric": data.metric_name,
        "teacher": float(worth["teacher"].double().mean()),
        "teacher_parameters": summaries[METHODS[0]]["teacher_params"],
        "text_only": summaries[METHODS[0]]["text_only_metric"],
        "before": summaries[METHODS[0]]["student_metric_before"],
        "test_examples": len(data.test),
        "paired": {**vars(pair), "beyond_noise": pair.beyond_noise},
        "students": {m: _student(runs[m], summaries[m]) for m in METHODS},
    }
    truth = Truth(data)
    rows = _telling({name: value > 0.5 for name, value in worth.items()}, data.test.group)
    return result, [
        truth.example(row, {name: texts[row] for name, texts in said.items()}) for row in rows
    ]


def _student(run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    costs = [line["cost"] for line in of_rounds(run.metrics()) if "cost" in line]
    return {
        "metric": summary["student_metric"],
        "arithmetic": statistics.fmean(costs) if costs else 1.0,
        "seconds": summary["seconds"]["distill"],
        "choosing": summary["seconds"]["reward"],
        "arms": summary["arms"],
        "parameters": summary["student_params"],
        "steps": summary["steps"],
    }


def _telling(right: Mapping[str, Tensor], group: int) -> Sequence[int]:
    """Examples of different images: one that all answer rightly, one that each student alone does,
    and one that no student does; the first of each in the test split."""
    first, second = (right[method] for method in METHODS)
    wanted = (first & second & right["teacher"], first & ~second, second & ~first, ~first & ~second)
    rows: list[int] = []
    for kind in (*wanted, first & second, ~first | ~second):
        for row in kind.nonzero()[:, 0].tolist():
            if len(rows) < EXAMPLES and row // group not in [r // group for r in rows]:
                rows.append(row)
                break
    return rows
