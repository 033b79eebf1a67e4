"""Methods beside one another, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from optima_fast.compare.curves import Point, Result

NOISE = 2.0  # standard errors that a difference must exceed to be more than noise
SEEDS = 3  # fewer tell no winner

Results = Mapping[int, Result]  # of one method on one task, by seed
BUDGETS = ("arithmetic", "time")


@dataclass(frozen=True)
class Difference:
    """A method's metric minus another's over the seeds of both.

    Attributes:
        mean: over the seeds.
        error: its standard error; ``None`` of a single seed.
        seeds: how many.
    """

    mean: float
    error: float | None
    seeds: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the first method is ahead by more than the noise."""
        enough = self.seeds >= SEEDS and self.error is not None
        return enough and self.mean > NOISE * (self.error or 0.0)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """The mean of the differences and its standard error; ``None`` without a common seed."""
    found = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Difference(statistics.fmean(found), error, len(found))


def winner(metrics: Mapping[str, Mapping[int, float]]) -> str | None:
    """The method that is ahead of each other one by more than the noise, if there is one.

    Only seeds that all methods have count.
    """
    if len(metrics) < 2:
        return None
    common = set.intersection(*(set(of_seeds) for of_seeds in metrics.values()))
    shared = {name: {s: of_seeds[s] for s in common} for name, of_seeds in metrics.items()}
    for name, own in shared.items():
        pairs = [paired(own, other) for label, other in shared.items() if label != name]
        if all(pair is not None and pair.beyond_noise for pair in pairs):
            return name
    return None


@dataclass(frozen=True)
class AtBudget:
    """Two methods on the validation split, each at its last evaluation within one budget.

    The budget of a seed is what the cheaper one of its two runs took in all.

    Attributes:
        budget: in operations or seconds, median over the seeds.
        share: of what the other run took in all, likewise.
        steps: of the evaluations that are read, medians of this method and of the other.
        metrics: likewise, but means, so that they are apart by the mean difference.
        difference: of the metrics.
    """

    budget: float
    share: float
    steps: tuple[float, float]
    metrics: tuple[float, float]
    difference: Difference


def at_budget(own: Results, other: Results, kind: str) -> AtBudget | None:
    """Compare two methods at equal arithmetic or equal time.

    Args:
        own: the runs of the first, by seed.
        other: those of the second.
        kind: one of ``BUDGETS``.

    Returns:
        ``None`` where no seed has an evaluation of both runs within the budget, or runs did not
        record their time: nothing is extrapolated.
    """
    budgets, shares, read = [], [], {}
    for seed in sorted(own.keys() & other.keys()):
        mine, others = own[seed].curve, other[seed].curve
        budget = min(spent(mine[-1], kind), spent(others[-1], kind))
        points = _within(mine, budget, kind), _within(others, budget, kind)
        if points[0] is not None and points[1] is not None:
            budgets.append(budget)
            shares.append(budget / spent(others[-1], kind))
            read[seed] = (points[0], points[1])
    if not read:
        return None
    first, second = ({seed: pair[i].metric for seed, pair in read.items()} for i in (0, 1))
    difference = paired(first, second)
    assert difference is not None
    median = statistics.median
    return AtBudget(
        median(budgets),
        median(shares),
        (median(p.step for p, _ in read.values()), median(p.step for _, p in read.values())),
        (statistics.fmean(first.values()), statistics.fmean(second.values())),
        difference,
    )


def spent(point: Point, kind: str) -> float:
    """What had been spent at a point; infinite where it is not known."""
    if kind == "arithmetic":
        return point.operations
    return math.inf if point.seconds is None else point.seconds


def _within(curve: tuple[Point, ...], budget: float, kind: str) -> Point | None:
    """The last point that had been reached within the budget."""
    reached = [point for point in curve if spent(point, kind) <= budget]
    return reached[-1] if reached and math.isfinite(budget) else None


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        label: the entry's.
        metrics: of the test split, by seed.
        difference: to the baseline; ``None`` of the baseline itself.
        arithmetic: operations of its steps, mean over the seeds, those of the baseline 1.
        distill: seconds of its steps, median over the seeds.
        reward: seconds of measuring rewards, likewise.
        budgets: beside the baseline, by the kind of budget; without those that cannot be read.
    """

    label: str
    metrics: Mapping[int, float]
    difference: Difference | None
    arithmetic: float | None
    distill: float
    reward: float
    budgets: Mapping[str, AtBudget]

    @property
    def median(self) -> float:
        return statistics.median(self.metrics.values())


def rows(results: Mapping[str, Results], baseline: str) -> list[Row]:
    """A row for each method that has a run.

    Args:
        results: by label and seed.
        baseline: the label that the others are compared with.
    """
    return [
        _row(label, own, results.get(baseline, {}), label == baseline)
        for label, own in results.items()
        if own
    ]


def _row(label: str, own: Results, base: Results, is_base: bool) -> Row:
    metrics = {seed: result.metric for seed, result in own.items()}
    common = own.keys() & base.keys()
    shares = [_a_step(own[seed]) / _a_step(base[seed]) for seed in common]
    found = {} if is_base else {kind: at_budget(own, base, kind) for kind in BUDGETS}
    return Row(
        label,
        metrics,
        None if is_base else paired(metrics, {seed: r.metric for seed, r in base.items()}),
        statistics.fmean(shares) if shares else None,
        statistics.median(result.distill for result in own.values()),
        statistics.median(result.reward for result in own.values()),
        {kind: budget for kind, budget in found.items() if budget is not None},
    )


def _a_step(result: Result) -> float:
    return result.operations / result.steps
