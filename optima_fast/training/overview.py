"""The tables that end a run, an evaluation, a comparison of runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from optima_fast.training.config import TrainConfig, paper_scale, unusual
from optima_fast.training.display import Display
from optima_fast.training.rounds import rewards_by_arm
from optima_fast.training.run import Run

ARMS_SHOWN = 12


def show(run: Run, summary: Mapping[str, Any], display: Display) -> None:
    """What a run did: metrics beside their baselines, sizes, times, arms, files, what next."""
    metric = summary["metric_name"]
    config = run.config()
    rows = [
        [f"teacher ({config.teacher})", number(summary["teacher_metric"])],
        [f"student ({config.student}) before", number(summary["student_metric_before"])],
        ["student after", number(summary["student_metric"])],
        ["majority baseline", number(summary["majority_metric"])],
        ["text-only baseline", number(summary["text_only_metric"])],
    ]
    if summary["teacher_metric"] is None:
        rows = rows[1:]
    title = f"{summary['task']} on {summary['data']}, test split: {metric}"
    display.table(title, rows, ["", metric])

    seconds = summary["seconds"]
    facts = [["method", method_name(summary)]]
    if summary["teacher_params"]:
        facts.append(["teacher parameters", f"{summary['teacher_params']:,}"])
    facts += [
        ["student parameters", f"{summary['student_params']:,}"],
        ["seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())],
    ]
    pulls = summary["arms"]
    total = sum(pulls.values())
    if total:
        facts.append([f"arms ({total} rounds)", shares(pulls)])
    if summary.get("reward"):
        facts.append(["reward", reward_line(summary["reward"])])
    facts.append(["files", str(run.folder)])
    display.table("", facts)
    if summary["data"] == "digits":
        display.note(_scaled_down(config))
    display.note(f"next: python -m optima_fast.evaluate {shlex.quote(str(run.folder))}")
    other = "layerwise" if summary["method"] != "layerwise" else "headroom"
    if config.rewarded or config.method in ("layerwise", "random"):
        settings, out = shlex.quote(str(run.config_path)), shlex.quote(f"{run.folder}-{other}")
        display.note(
            f"  or: python -m optima_fast.train --config {settings} --method {other} --out {out}"
        )


def show_evaluation(
    run: Run,
    metrics: Mapping[str, float],
    recorded: float | None,
    display: Display,
    split: str = "test",
) -> None:
    """Metrics measured now, the main one beside what the run recorded."""
    if not metrics:
        display.note(f"{run.folder}, {split} split: no metrics, its answers are not public")
        return
    name = run.metric_name()
    rows = [[key, number(value)] for key, value in metrics.items()]
    display.table(f"{run.folder}, {split} split", rows, ["", "value"])
    if recorded is not None:
        same = "the same as" if metrics[name] == recorded else f"was {number(recorded)} in"
        display.note(f"{name} {number(metrics[name])}: {same} {run.summary_path}")


def compare(runs: Sequence[Run], display: Display) -> None:
    """One line a run."""
    rows = []
    for run in runs:
        s = run.summary()
        rows.append(
            [
                str(run.folder),
                s["task"],
                method_name(s),
                str(s["seed"]),
                f"{s['metric_name']} {number(s['student_metric'])}",
                number(s["teacher_metric"]),
                number(s["text_only_metric"]),
                f"{s['seconds']['distill'] + s['seconds']['reward']:.0f}",
            ]
        )
    header = ["run", "task", "method", "seed", "student", "teacher", "text only", "seconds"]
    display.table("", rows, header)


def show_rewards(run: Run, display: Display) -> None:
    """The rewards that each arm of a run earned, if there were any."""
    records = rewards_by_arm(run.metrics())
    if not records:
        return
    rows = [
        [r.name, str(r.pulls), *(f"{v:+.5f}" for v in (r.mean, r.spread, r.least, r.most))]
        for r in records[:ARMS_SHOWN]
    ]
    if len(records) > ARMS_SHOWN:
        rows.append([f"and {len(records) - ARMS_SHOWN} arms that earned less"])
    header = ["arm", "rounds", "mean reward", "deviation", "least", "most"]
    display.table(f"{run.folder}: rewards by arm", rows, header)


def shares(pulls: Mapping[str, int]) -> str:
    """``image 57%, text 43%``: the arms pulled most, and how many others there were."""
    total = sum(pulls.values())
    ranked = sorted((item for item in pulls.items() if item[1]), key=lambda item: -item[1])
    parts = [f"{name} {count / total:.0%}" for name, count in ranked[:ARMS_SHOWN]]
    if rest := ranked[ARMS_SHOWN:]:
        parts.append(f"{len(rest)} others {sum(count for _, count in rest) / total:.0%}")
    return ", ".join(parts)


def reward_line(reward: Mapping[str, Any]) -> str:
    """``drop on 256 training examples in 2 batches: 11.2 s, 4% of the run``."""
    signed = "" if reward["clip"] else ", signed"
    per = "" if reward["cost"] == "none" else f", per {reward['cost']}"
    where = "training" if reward["split"] == "train" else "held-out training"
    batches = "1 batch" if reward["batches"] == 1 else f"{reward['batches']} batches"
    return (
        f"{reward['name']}{signed}{per} on {reward['examples']} {where} examples in {batches}: "
        f"{reward['seconds']:.1f} s, {reward['share']:.0%} of the run"
    )


def method_name(summary: Mapping[str, Any]) -> str:
    """``optima (reward kl)``, ``fixed (image+text)``, ``headroom``, ``dide, layerwise``."""
    method, arm, reward = summary["method"], summary["arm"], summary.get("reward")
    chosen = {"policy": summary["policy"], "reward": reward and reward["name"]}
    details = arm or ", ".join(f"{k} {v}" for k, v in unusual(method, chosen).items())
    recipe = f"{summary['recipe']}, " if summary.get("recipe") else ""
    return f"{recipe}{method} ({details})" if details else f"{recipe}{method}"


def number(value: float | None) -> str:
    """``0.8400``; ``12`` of a count, ``-`` of what is not known."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _scaled_down(config: TrainConfig) -> str:
    paper = paper_scale(config.task)
    changed = [
        f"{name.replace('_', ' ')} {getattr(config, name)} (paper {value})"
        for name, value in paper.items()
        if getattr(config, name) not in (value, None)
    ]
    return "the built-in run is scaled down: " + ", ".join(changed)
