"""What the reward costs, and how well fewer examples know the headroom: one run, watched.

    python bench/bench_reward.py --task snli_ve --steps 600 --seed 0 --threads 1 --out runs/watched

It takes the settings of `python -m optima_fast.train` and makes such a run, method headroom. Beside
each measurement of the reward it measures 1,024 training examples of another draw, in parts of 64.
Sets of 256, 128 and 64 of them then choose an arm before every round, as the run did on its own
examples. The table says of each size: in how many rounds a set chose as the run did; what its
choices missed on average, which is how far the reward of the chosen arm is below that of the best
one, by all 1,024 examples; and the deviation of an arm's reward from set to set, relative to it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from optima_fast.distill import Headroom, Measurement
from optima_fast.distill.measurement import average
from optima_fast.errors import UserError
from optima_fast.training import experiment, trainer
from optima_fast.training.config import TrainConfig
from optima_fast.training.display import Display
from optima_fast.training.flags import parse
from optima_fast.training.rewards import RewardMeter
from optima_fast.training.sampler import Sampler

SIZES = (256, 128, 64)
POOL, PART = 1024, 64
Part = tuple[Measurement, int]


class Watched(RewardMeter):
    """Measures other examples too, part by part."""

    made: list[Watched]

    def __init__(self, config: TrainConfig, *given: Any) -> None:
        super().__init__(config, *given)
        data, distiller, _, space, costs = given
        split = data.train
        runs = min(POOL, len(split)) // split.group
        examples = Sampler(split, runs, config.seed + 2).at(0)
        parts = torch.split(examples, max(1, PART // split.group) * split.group)
        others = [part for part in parts if len(part) == len(parts[0])]
        self.pool = RewardMeter(config, data, distiller, others, space, costs)
        matched = {name: len(pairs) for name, pairs in distiller.pairs.items()}
        self.model = (space.arms, costs, matched, distiller.modules_matched[-1])
        self.rows: list[list[Part]] = []
        self.seconds: list[float] = []
        Watched.made.append(self)

    def measure(self, device: torch.device) -> Measurement:
        began = time.perf_counter()
        measured = super().measure(device)
        self.seconds.append(time.perf_counter() - began)
        found = (self.pool.part(number, device) for number in range(len(self.pool.batches)))
        self.rows.append([part for part in found if part is not None])
        return measured

    def rewards(self, chosen: slice) -> list[list[float]]:
        """Rewards of every arm after each measurement, as some of the parts know them."""
        arms, costs, matched, output = self.model
        headroom = Headroom(arms, costs, matched, output=output)
        found = []
        for row in self.rows:
            headroom.measured(average(row[chosen]))
            found.append(headroom.rewards())
        return found


class Row(NamedTuple):
    """What sets of one size know."""

    size: int
    sets: int
    same: float
    missed: float
    deviation: float


def compared(meter: Watched, choices: Sequence[int]) -> Iterator[Row]:
    """A row a size.

    Args:
        meter: of a finished run.
        choices: the arm of each round.
    """
    rounds = len(choices)
    whole = meter.rewards(slice(None))[:rounds]
    parts = len(meter.rows[0])
    for size in SIZES:
        each = size // PART
        if each > parts:
            continue
        sets = [meter.rewards(slice(i, i + each)) for i in range(0, parts - each + 1, each)]
        same, missed, deviations = [], [], []
        for at in range(rounds):
            for known in sets:
                choice = known[at].index(max(known[at]))
                same.append(choice == choices[at])
                missed.append(1 - whole[at][choice] / max(whole[at]))
            for arm, reward in enumerate(whole[at]):
                if len(sets) > 1 and reward > 0:
                    deviations.append(statistics.stdev(known[at][arm] for known in sets) / reward)
        yield Row(
            each * meter.rows[0][0][1],
            len(sets),
            statistics.fmean(same),
            statistics.fmean(missed),
            statistics.fmean(deviations) if deviations else 0.0,
        )


def main(argv: Sequence[str] | None = None) -> int:
    config = experiment.settings(
        parse(argv, prog="python bench/bench_reward.py", description=__doc__ or "")
    )
    if config.method != "headroom":
        raise UserError(f"--method {config.method} measures no headroom: leave it out")
    if config.out is not None and Path(config.out).exists():
        raise UserError(f"--out {config.out} is there already, and a whole run is watched")
    Watched.made = []
    with mock.patch.object(trainer, "RewardMeter", Watched):
        run, summary = experiment.run(config, Display(quiet=True))
    (meter,) = Watched.made
    rounds = [line for line in run.metrics() if "reward" in line]
    spent = sum(meter.seconds)
    share = spent / (spent + summary["seconds"]["distill"])
    print(
        f"{config.task}, seed {config.seed}: {len(rounds)} rounds, "
        f"{summary['metric_name']} {summary['student_metric']:.4f}; the reward takes {share:.1%} "
        f"of training on {meter.examples} examples, "
        f"{1e3 * statistics.median(meter.seconds):.0f} ms a measurement"
    )
    print("examples  sets  chose as the run  missed  deviation")
    for row in compared(meter, [line["choice"] for line in rounds]):
        print(
            f"{row.size:8}{row.sets:6}{row.same:18.1%}{row.missed:8.2%}{row.deviation:11.2%}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
