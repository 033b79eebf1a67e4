"""What ``--teacher-cache`` saves of a step: trainers with and without it take steps in turn.

    python bench/bench_teacher_cache.py                  # the built-in VQA, one thread
    python bench/bench_teacher_cache.py --task coco

Models have random weights, which cost what trained ones do. ``filled`` is a step of the first
epoch, in which the teacher runs and is written down, ``served`` one of later epochs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from optima_fast.training import cache_plan, experiment
from optima_fast.training.config import TrainConfig, resolve
from optima_fast.training.display import Display
from optima_fast.training.run import Run
from optima_fast.training.trainer import Trainer

WAYS = ("none", *cache_plan.DTYPES)


def trainer(folder: Path, way: str, task: str, images: int) -> Trainer:
    """A trainer of one way, in a folder of its own beside the cache."""
    config = TrainConfig(task=task, train_images=images, method="layerwise", threads=1)
    config = resolve(config if way == "none" else _cached(config, folder / "cache", way))
    assert config.teacher
    assert config.student
    device = experiment.prepare(config)
    data = experiment.load_data(config)
    torch.manual_seed(0)
    teacher, student = (
        experiment.new_model(name, data).to(device) for name in (config.teacher, config.student)
    )
    run = Run(folder / way)
    run.begin(config)
    return Trainer(config, data, student, teacher, run, Display(quiet=True))


def _cached(config: TrainConfig, folder: Path, dtype: str) -> TrainConfig:
    return replace(config, teacher_cache=str(folder), teacher_cache_dtype=dtype)


def seconds(body: Callable[[], object]) -> float:
    """That a call takes."""
    began = time.perf_counter()
    body()
    return time.perf_counter() - began


def teaching(t: Trainer, step: int) -> Callable[[], object]:
    """The teacher alone, on a step's batch."""
    assert t.distiller is not None
    model, request = t.distiller.teacher, t.distiller.teacher_request(t.arm)
    batch = t.data.train.batch(t.sampler.at(step))
    return torch.no_grad()(lambda: model.record(batch, request))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What --teacher-cache saves of a step.")
    parser.add_argument("--task", default="vqa")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=640)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        made = {way: trainer(Path(name), way, args.task, args.images) for way in WAYS}
        plain = made["none"]
        epoch = len(plain.data.train) // len(plain.sampler.at(0))
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        alone = []
        for step in range(epoch * args.epochs):
            for way, t in made.items():
                taken[way].append(seconds(t._train_step))
                t.step += 1
            alone.append(seconds(teaching(plain, step)))
    print(f"{'way':6s}{'filled ms':>10s}{'served ms':>10s}{'quartiles':>16s}  size")
    for way, t in made.items():
        served = taken[way][epoch:]
        filled = 1e3 * statistics.median(taken[way][:epoch])
        low, middle, high = (1e3 * x for x in statistics.quantiles(served, n=4))
        size = cache_plan.in_words(t.config, t.cached.kinds) if t.cached else ""
        print(f"{way:6s}{filled:10.1f}{middle:10.1f}{low:8.1f}{high:8.1f}  {size}")
    print(f"the teacher alone: {1e3 * statistics.median(alone):.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
