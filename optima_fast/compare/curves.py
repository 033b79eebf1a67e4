"""What a finished run recorded: its metric, and the validation split over arithmetic and time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optima_fast.distill import arm_name, parse_arm
from optima_fast.training import Run, TrainConfig, cost, experiment, loader, sources
from optima_fast.training.rounds import of_rounds
from optima_fast.training.trainer import distilled

NO_ARM = arm_name(())  # of steps that distil no module
# settings that the arithmetic of a step does not depend on
_ELSEWHERE = (
    *("seed", "teacher_seed", "arm", "arms", "policy", "reward", "reward_clip", "reward_cost"),
    *("reward_split", "reward_examples", "round_steps", "init_rounds", "gamma", "variance_scale"),
    *("teacher_steps", "teacher_lr", "teacher_head_lr", "teacher_batch_size", "lr", "head_lr"),
    *("steps", "warmup_steps", "weight_decay", "clip", "dropout", "cell_stage"),
    *("log_every", "eval_every"),
)

Operations = Mapping[str, int]  # of a training step, by the name of its arm


@dataclass(frozen=True)
class Point:
    """A measurement on the validation split.

    Attributes:
        step: after so many.
        metric: the task's main one.
        operations: of all steps so far.
        seconds: of all steps so far and of measuring rewards; ``None`` where the run did not
            record them.
    """

    step: int
    metric: float
    operations: int
    seconds: float | None


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        metric: of the test split.
        distill: seconds of its steps.
        reward: seconds of measuring rewards.
        steps: how many it took.
        curve: on the validation split, in the order of steps; the last is after the last step.
    """

    metric: float
    distill: float
    reward: float
    steps: int
    curve: tuple[Point, ...]

    @property
    def operations(self) -> int:
        """Of all its steps."""
        return self.curve[-1].operations


def read(run: Run, operations: Operations) -> Result:
    """What a finished run recorded.

    Args:
        run: its folder.
        operations: of a step with each of its arms.

    Raises:
        UserError: its files are damaged.
    """
    summary, lines, name = run.summary(), run.metrics(), run.metric_name()
    seconds, steps = summary["seconds"], int(summary["steps"])
    spent = spending(lines, arms_of(run, summary)[0], operations)
    curve = [
        Point(line["step"], line["validation"][name], spent(line["step"]), line.get("seconds"))
        for line in lines
        if "validation" in line
    ]
    in_all = seconds["distill"] + seconds["reward"]
    curve.append(Point(steps, summary["validation_metric"], spent(steps), in_all))
    metric = summary["student_metric"]
    return Result(metric, seconds["distill"], seconds["reward"], steps, tuple(curve))


def spending(
    lines: Iterable[Mapping[str, Any]], arm: str, operations: Operations
) -> Callable[[int], int]:
    """A function from a number of steps to the operations that they took.

    Args:
        lines: of metrics.jsonl; those that end a round name the arm of its steps.
        arm: of steps without such a line.
        operations: of a step with each arm.
    """
    rounds = [(int(line["step"]), str(line["arm"])) for line in of_rounds(list(lines))]

    def spent(step: int) -> int:
        total = begun = 0
        for end, name in rounds:
            taken = max(0, min(step, end) - begun)
            total, begun = total + taken * operations[name], end
        return total + max(0, step - begun) * operations[arm]

    return spent


def arms_of(run: Run, summary: Mapping[str, Any]) -> list[str]:
    """The names of the arms of a run's steps."""
    return [name for name, pulls in summary["arms"].items() if pulls] or [NO_ARM]


def operations(runs: Sequence[Run]) -> list[Operations]:
    """Operations of a training step of each run, with each of its arms.

    Counted on models without memory, once for all runs whose steps have the same shapes. Only
    matrix products count: those of the student, of the teacher as far as it runs, and of the
    losses; measuring rewards is not among them.
    """
    keys = [_shapes(run.config()) for run in runs]
    counted = {}
    for key in dict.fromkeys(keys):
        alike = [run for run, k in zip(runs, keys, strict=True) if k == key]
        arms = [name for run in alike for name in arms_of(run, run.summary())]
        counted[key] = _count(alike[0].config(), list(dict.fromkeys(arms)))
    return [counted[key] for key in keys]


def _shapes(config: TrainConfig) -> str:
    """What the arithmetic of a step depends on."""
    settings = Run.computed_by(dataclasses.asdict(config))
    settings["method"] = config.method == "finetune"
    kept = {name: value for name, value in settings.items() if name not in _ELSEWHERE}
    if config.layer_mapping == "random":
        kept["seed"] = config.seed  # how deep the teacher runs
    return json.dumps(kept, sort_keys=True)


def _count(config: TrainConfig, arms: Sequence[str]) -> Operations:
    models = sources.plan(config)
    data = experiment.load_data(config, models)
    student, teacher = models.shapes(data)
    batch = loader.first_batch(config, data)
    if teacher is None:
        return {NO_ARM: cost.finetuning_operations(student, data, batch)}
    layers = student.layer_counts
    parsed = [() if name == NO_ARM else parse_arm(name, layers) for name in arms]
    settings = distilled(config, student, teacher)
    found = cost.distilling_operations(student, teacher, data, batch, parsed, **settings)
    return dict(zip(arms, found, strict=True))
