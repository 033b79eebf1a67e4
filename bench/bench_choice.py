"""Which choice of modules makes the best student: whole runs of the built-in tasks, by seed.

    python bench/bench_choice.py --runs runs/choice             # 5 seeds, 100 runs: two hours
    python bench/bench_choice.py --runs runs/choice --show      # the table of what is there
    python bench/bench_choice.py --runs runs/choice --tasks vqa --seeds 0 --smoke

Every run is `python -m optima_fast.train` with the defaults, on one thread, `--jobs` at a time; the
order is by seed, and runs that are finished are not done again. The table gives the metric of the
test split (median over seeds, least and most), in how many seeds a method beat `layerwise` and
`random`, and the arithmetic of its steps relative to that of `layerwise`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

TASKS = ("vqa", "snli_ve", "nlvr2", "coco")
METHODS: dict[str, list[str]] = {
    "headroom": ["--method=headroom"],
    "optima": ["--method=optima"],
    "random": ["--method=random"],
    "layerwise": ["--method=layerwise"],
    "image": ["--method=fixed", "--arm=image"],
}
SMOKE = ["--train-images=60", "--batch-size=4", "--steps=20", "--round-steps=2"]
SMOKE += ["--teacher-steps=4", "--reward-examples=8"]


def folder(runs: Path, task: str, method: str, seed: int) -> Path:
    return runs / f"{task}-{method}-s{seed}"


def train(runs: Path, task: str, method: str, seed: int, smoke: bool, extra: Sequence[str]) -> str:
    """One run, unless it is finished; what went wrong, or nothing."""
    out = folder(runs, task, method, seed)
    if (out / "summary.json").exists():
        return ""
    settings = [f"--task={task}", f"--seed={seed}", f"--out={out}", "--threads=1"]
    settings += [*METHODS[method], *(SMOKE if smoke else []), *extra]
    if smoke and method == "optima":
        settings.append("--init-rounds=1")
    done = subprocess.run(
        [sys.executable, "-m", "optima_fast.train", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else f"{out}: {done.stderr.strip()}"


def read(runs: Path, tasks: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Summaries of the finished runs: [task][method][seed], the reward's costs beside them."""
    found: dict[str, dict[str, Any]] = {task: {method: {} for method in METHODS} for task in tasks}
    for task, method, seed in product(tasks, METHODS, seeds):
        path = folder(runs, task, method, seed) / "summary.json"
        if path.exists():
            found[task][method][seed] = json.loads(path.read_text())
    return found


def relative_cost(run: Path) -> float | None:
    """Mean cost of the rounds' arms, where the run recorded it."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    costs = [line["cost"] for line in lines if "cost" in line]
    return statistics.mean(costs) if costs else None


def row(runs: Path, task: str, method: str, results: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    metric = {seed: run["student_metric"] for seed, run in results[method].items()}
    line: dict[str, Any] = {
        "task": task,
        "method": method,
        "seeds": sorted(metric),
        "metric": [metric[seed] for seed in sorted(metric)],
        "median": statistics.median(metric.values()),
    }
    for other in ("layerwise", "random"):
        theirs = {seed: run["student_metric"] for seed, run in results.get(other, {}).items()}
        both = metric.keys() & theirs.keys()
        line[f"above {other}"] = f"{sum(metric[s] > theirs[s] for s in both)}/{len(both)}"
    if method == "headroom":
        costs = [relative_cost(folder(runs, task, method, seed)) for seed in metric]
        line["cost"] = statistics.mean(cost for cost in costs if cost is not None)
    return line


def show(lines: Sequence[dict[str, Any]]) -> None:
    head = ("task", "method", "median", "least", "most", "seeds", "> layerwise", "> random", "cost")
    form = "{:8} {:10} {:>7} {:>7} {:>7} {:>5} {:>11} {:>8} {:>5}"
    print(form.format(*head))
    for x in lines:
        values = [f"{v:.4f}" for v in (x["median"], min(x["metric"]), max(x["metric"]))]
        cost = f"{x['cost']:.2f}" if "cost" in x else ""
        print(
            form.format(
                x["task"], x["method"], *values, len(x["seeds"]), x["above layerwise"],
                x["above random"], cost,
            )
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/choice"), help="their folders")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny runs, to try it")
    parser.add_argument("--json", type=Path, help="write the lines here too")
    args, extra = parser.parse_known_args(argv)
    failed: list[str] = []
    if not args.show:
        todo = [(t, m, s) for s, t, m in product(args.seeds, args.tasks, METHODS)]
        with ThreadPoolExecutor(args.jobs) as pool:
            outcomes = pool.map(
                lambda x: train(args.runs, x[0], x[1], x[2], args.smoke, extra), todo
            )
            failed = [text for text in outcomes if text]
    results = read(args.runs, args.tasks, args.seeds)
    lines = [
        row(args.runs, task, method, results[task])
        for task, method in product(args.tasks, METHODS)
        if results[task][method]
    ]
    show(lines)
    if args.json:
        args.json.write_text(json.dumps(lines, indent=1) + "\n")
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
