"""What metrics.jsonl says about the rounds of a run, arm by arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Line = Mapping[str, Any]


class ArmRecord(NamedTuple):
    """Rewards of one arm; ``spread`` is their standard deviation, 0 of a single one."""

    name: str
    pulls: int
    mean: float
    spread: float
    least: float
    most: float


def of_rounds(lines: Sequence[Line]) -> list[Line]:
    """The lines that end a round."""
    return [line for line in lines if "round" in line and "arm" in line and "loss" not in line]


def rewards_by_arm(lines: Sequence[Line]) -> list[ArmRecord]:
    """Each arm that was rewarded, the best mean first."""
    rewards: dict[str, list[float]] = {}
    for line in of_rounds(lines):
        if line.get("reward") is not None:
            rewards.setdefault(line["arm"], []).append(line["reward"])
    records = []
    for name, values in rewards.items():
        n, mean = len(values), math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1))
        records.append(ArmRecord(name, n, mean, spread, min(values), max(values)))
    return sorted(records, key=lambda record: -record.mean)
