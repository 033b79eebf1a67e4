"""Which plots a report has, from what its runs recorded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from optima_fast.compare.curves import Point
from optima_fast.models import MODULES
from optima_fast.pages import plots
from optima_fast.pages.plots import Span
from optima_fast.pages.records import Group, Record, Series, Task, medians
from optima_fast.training.rounds import of_rounds

ROWS = 12  # arms that are drawn one by one, those pulled most
OTHERS = "other arms"
_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1, "FLOP"))


def results(task: Task) -> str:
    """The metric of the test split, a dot a run, beside the teacher's."""
    values = {g.label: [r.summary["student_metric"] for r in g.records] for g in task.groups}
    known = [r.summary["teacher_metric"] for r in task.records]
    taught = [metric for metric in known if metric is not None]
    picture = plots.dots(
        f"{task.name}: test split",
        values,
        x=task.metric,
        level=("teacher", statistics.median(taught)) if taught else None,
        colours=plots.colours_of(values),
    )
    caption = "A dot is a run, an upright line the median of a method or of all runs' teachers."
    return _figure(picture, caption)


def validation(task: Task) -> list[str]:
    """The metric of the validation split over steps, arithmetic and seconds."""
    kinds: list[tuple[str, str, Callable[[Point], float | None]]] = [
        ("steps", "optimizer steps", lambda p: p.step)
    ]
    if task.uncounted is None:
        largest = max(record.result.operations for record in task.records)
        size, unit = next((s, u) for s, u in _UNITS if largest >= s or s == 1)
        x = f"arithmetic of the steps, {unit}"
        kinds.append(("arithmetic", x, lambda p: p.operations / size))
    kinds.append(("seconds", "seconds of steps and of measuring rewards", lambda p: p.seconds))
    several = any(len(group.records) > 1 for group in task.groups)
    each = ", median over the seeds; a thin line is a seed" if several else ""
    found = []
    for name, x, of in kinds:
        curves = {g.label: _over(g, of) for g in task.groups}
        curves = {label: curve for label, curve in curves.items() if curve[0]}
        if not curves:
            continue
        faint = {
            g.label: [_curve(r, of) for r in g.records]
            for g in task.groups
            if g.label in curves and len(g.records) > 1
        }
        colours = plots.colours_of([g.label for g in task.groups])
        found.append(
            _figure(
                plots.lines(
                    f"{task.name}: validation over {name}",
                    curves,
                    x=x,
                    y=task.metric,
                    faint=faint,
                    colours=colours,
                ),
                f"The {task.metric} on the validation split over {name}{each}.",
            )
        )
    return found


def _curve(record: Record, of: Callable[[Point], float | None]) -> Series:
    pairs = [(of(point), point.metric) for point in record.result.curve]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def _over(group: Group, of: Callable[[Point], float | None]) -> Series:
    """Medians of x and of y at each evaluation that all seeds have."""
    each = [{point.step: point for point in record.result.curve} for record in group.records]
    xs, ys = [], []
    for step in each[0]:
        points = [found[step] for found in each if step in found]
        known = [x for x in map(of, points) if x is not None]
        if len(known) == len(each):
            xs.append(float(statistics.median(known)))
            ys.append(statistics.median(point.metric for point in points))
    return xs, ys


def losses(group: Group) -> list[str]:
    """Losses over the steps, those of hidden states and attention by module; the learning rate."""
    wholes = {"prediction": "prediction", "teacher's logits (KL)": "kl", "total": "loss"}
    series = {name: _logged(key) for name, key in wholes.items()}
    caption = "The total loss and those of the logits, over the steps"
    found = [_logs(group, "losses", series, caption)]
    for key, what in (("hidden", "hidden states"), ("attention", "attention")):
        logged = {module for r in group.records for x in r.lines for module in x.get(key) or ()}
        modules = [name for name in MODULES if name in logged] + sorted(logged - {*MODULES})
        series = {name: _logged(key, name) for name in modules}
        caption = (
            f"Loss of {what} of each module in steps that distil it, the sum over its layers "
            "before it is weighted"
        )
        found.append(_logs(group, f"{what} by module", series, caption))
    rate = {"learning rate": _logged("lr")}
    caption = "Learning rate of the student's optimizer over the steps"
    found.append(_logs(group, "learning rate", rate, caption, y="learning rate"))
    return [figure for figure in found if figure]


def _logs(
    group: Group,
    title: str,
    series: Mapping[str, Callable[[Record], Series]],
    caption: str,
    y: str = "loss",
) -> str:
    curves = {name: medians(group, of) for name, of in series.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    if not curves:
        return ""
    most = max(len(x) for x, _ in curves.values())
    thin = f" {plots.POINTS} points at most, each a mean." if most > plots.POINTS else ""
    picture = plots.lines(
        f"{group.label}: {title}", curves, x="optimizer steps", y=y, log=y == "loss"
    )
    return _figure(picture, f"{caption}{_seeds(group)}.{thin}")


def _logged(key: str, module: str | None = None) -> Callable[[Record], Series]:
    """A function from a run to what it logged under a key, of one module where one is named."""

    def of(record: Record) -> Series:
        xs, ys = [], []
        for line in record.lines:
            value = line.get(key) if "loss" in line else None
            if module is not None and value is not None:
                value = value.get(module)
            if value is not None:
                xs.append(line["step"])
                ys.append(value)
        return xs, ys

    return of


def choices(group: Group) -> list[str]:
    """The arm of each round, how often each was chosen, and what they earned."""
    if not any(of_rounds(record.lines) for record in group.records):
        return []
    share = frequencies(group)
    colours = plots.colours_of(_shown(group, share))
    if len(group.arms) > len(colours):
        colours[OTHERS] = "#8a8f98"
    seeds = ", each line in it a seed" if len(group.records) > 1 else ""
    found = [
        _figure(
            plots.rows(
                f"{group.label}: arm of each round",
                {name: _spans(group, name, colours) for name in colours},
                x="round",
                colours=colours,
            ),
            f"Arm choice over time, the paper's figure, here of these runs: a row an arm{seeds}.",
        ),
        _figure(
            plots.bars(
                f"{group.label}: arm frequencies",
                {name: share[name] if name in share else _rest(share, colours) for name in colours},
                x="share of all rounds",
                colours=colours,
            ),
            f"Arm frequencies, the paper's figure, here of these runs{_seeds(group, 'mean')}.",
        ),
    ]
    return found + rewards(group, colours)


def frequencies(group: Group) -> dict[str, float]:
    """The share of the rounds of each arm, mean over the seeds."""
    shares: dict[str, list[float]] = {}
    for record in group.records:
        pulls = record.summary["arms"]
        total = sum(pulls.values()) or 1
        for name, count in pulls.items():
            shares.setdefault(name, []).append(count / total)
    return {name: math.fsum(each) / len(group.records) for name, each in shares.items()}


def _shown(group: Group, share: Mapping[str, float]) -> list[str]:
    """All arms, or of many those pulled most, in the order of the choices."""
    most = sorted(group.arms, key=lambda name: -share.get(name, 0.0))[:ROWS]
    return [name for name in group.arms if name in most]


def _rest(share: Mapping[str, float], shown: Mapping[str, Any]) -> float:
    return math.fsum(value for name, value in share.items() if name not in shown)


def _spans(group: Group, name: str, shown: Mapping[str, str]) -> list[list[Span]]:
    """Of each seed the stretches of rounds with this arm."""
    found = []
    for record in group.records:
        spans: list[Span] = []
        for line in of_rounds(record.lines):
            arm = line["arm"] if line["arm"] in shown else OTHERS
            if arm != name:
                continue
            end = line["round"]
            if spans and spans[-1][1] == end - 1:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((end - 1, end))
        found.append(spans)
    return found


def rewards(group: Group, colours: Mapping[str, str]) -> list[str]:
    """What was earned over the rounds, and the policy's mean of each arm."""
    earned = medians(group, _earned)
    if not earned[0]:
        return []
    found = []
    means = {name: medians(group, _mean(i)) for i, name in enumerate(group.arms)}
    means = {name: curve for name, curve in means.items() if curve[0] and name in colours}
    if means:
        found.append(
            _figure(
                plots.lines(
                    f"{group.label}: reward means",
                    means,
                    x="round",
                    y="mean reward",
                    log=True,
                    colours=colours,
                ),
                f"The policy's mean reward of each arm over the rounds{_seeds(group)}.",
            )
        )
    found.append(
        _figure(
            plots.lines(
                f"{group.label}: reward",
                {"running mean": plots.running_mean(earned)},
                x="round",
                y="reward",
                log=True,
                faint={"running mean": [earned]},
            ),
            "Reward over time, the paper's figure, here of these runs: thin, of each round; thick, "
            f"the mean of the last {max(1, len(earned[0]) // plots.SMOOTH)}{_seeds(group)}.",
        )
    )
    return found


def _earned(record: Record) -> Series:
    known = [line for line in of_rounds(record.lines) if line.get("reward") is not None]
    return [line["round"] for line in known], [line["reward"] for line in known]


def _mean(arm: int) -> Callable[[Record], Series]:
    def of(record: Record) -> Series:
        known = [
            (line["round"], line["means"][arm])
            for line in of_rounds(record.lines)
            if len(line.get("means") or ()) > arm and line["means"][arm] is not None
        ]
        return [x for x, _ in known], [y for _, y in known]

    return of


def _seeds(group: Group, what: str = "median") -> str:
    count = len(group.records)
    return f", {what} of {count} seeds" if count > 1 else ""


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
