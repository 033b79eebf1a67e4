"""The loop: Algorithm 1 of OPTIMA around an optimizer step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from optima_fast import bandit
from optima_fast.distill import (
    Balance,
    Distiller,
    Measurement,
    StepLosses,
    arm_name,
    arm_space,
    parse_arm,
)
from optima_fast.distill.matching import map_layers
from optima_fast.distill.shares import Shares
from optima_fast.errors import UserError
from optima_fast.models import MODULES
from optima_fast.models.task_model import TaskModel
from optima_fast.tasks import Split, TaskData
from optima_fast.tasks.split import Loaded, to_device
from optima_fast.tasks.workers import killed_workers
from optima_fast.training import checkpoints, loader, policies, predicting, ranks, snapshot
from optima_fast.training.adafactor import Adafactor
from optima_fast.training.cells import CellStage
from optima_fast.training.config import TrainConfig
from optima_fast.training.cost import arm_costs
from optima_fast.training.display import Display, Stage
from optima_fast.training.interrupts import STARTED, Interrupted, Stop
from optima_fast.training.parallel import Engine, load_weights
from optima_fast.training.rewards import RewardMeter, reward_batches, training_sampler
from optima_fast.training.run import Run
from optima_fast.training.schedule import lr_at
from optima_fast.training.step import Step, added
from optima_fast.training.teacher_cache import CachedTeacher
from optima_fast.training.tracking import Tracker
from optima_fast.training.watch import GRADIENT, Watch

_DISTILLER = (
    *("hidden_weight", "attention_weight", "prediction_weight", "kl_weight"),
    *("attention_loss", "attention_scale", "relation_heads", "cross_attention", "cross_both_ways"),
    *("hidden_loss", "negatives", "hidden_temperature", "hidden_scale", "reduction"),
)


class Layered(Protocol):
    """A model or its shape."""

    @property
    def layer_counts(self) -> Mapping[str, int]: ...


def distilled(config: TrainConfig, student: Layered, teacher: Layered) -> dict[str, Any]:
    """Settings of the distiller of a student and a teacher."""
    counts = student.layer_counts, teacher.layer_counts
    layers = map_layers(config.layer_mapping, *counts, seed=config.seed)
    return {**{name: getattr(config, name) for name in _DISTILLER}, "teacher_layers": layers}


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether steps run in bfloat16, by autocast."""
    if config.precision != "auto":
        return config.precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def clock(device: torch.device, *, workers: int) -> Callable[[], float]:
    """What a run's seconds are read from.

    Elapsed time, but for a process that computes everything on one core: there it is the
    process's CPU time, which is the same on an idle machine and hardly more on a busy one, so
    that runs side by side can be compared.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    alone = alone and ranks.count() == 1 and not workers
    return time.process_time if alone else time.perf_counter


class Trainer:
    """Trains one student, with or without a teacher, and can stop and go on at any step.

    With several processes each has a trainer of its own, which takes its parts of every batch.

    Args:
        config: resolved settings.
        data: the task.
        student: on the device it trains on.
        teacher: on the same device, or None for ``--method finetune``.
        run: where metrics and checkpoints go.
        display: what the user sees.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TaskData,
        student: TaskModel,
        teacher: TaskModel | None,
        run: Run,
        display: Display,
    ) -> None:
        assert config.steps and config.batch_size and config.lr and config.head_lr
        assert config.round_steps and config.kl_weight is not None
        self.config, self.data, self.student, self.run = config, data, student, run
        self.display = display
        self.device = next(student.parameters()).device
        self.steps = config.steps
        self.sampler = training_sampler(config, data.train)
        self.teacher_digest = "" if teacher is None else checkpoints.digest(teacher)
        self.cached: CachedTeacher | None = None
        self.distiller = self._make_distiller(teacher)
        self.cells = CellStage(config, data, student).to(self.device)
        self.balance: Balance | None = None
        if self.distiller is not None and config.method == "balanced":
            self.balance = Balance(self.distiller).to(self.device)
        step = Step(config, data, student, self.distiller, self.cells, self.balance)
        self.engine = Engine(step, teacher, sharded=config.fsdp)
        self.parts = ranks.count() * config.accumulate  # of every batch
        self.optimizer = self._make_optimizer()

        self.space = arm_space(config.arms, student.layer_counts)
        self.policy, self.fixed_arm = self._make_policy()
        self.meter = self._make_meter(teacher)

        self.step = 0
        self.round = 0
        self.arm = self.fixed_arm
        self.choice = -1
        self.before: Measurement | None = None
        self.pulls = dict.fromkeys(map(arm_name, self.space.arms), 0)
        self.clock = clock(self.device, workers=loader.workers(config))
        self.seconds = {"distill": 0.0, "reward": 0.0, "eval": 0.0}
        self.round_began = 0.0
        self.last_metric: float | None = None
        self.best_metric: float | None = None  # of those measured, with --keep best
        self.kept_step = 0  # the step whose student that is
        self.left_out = 0
        self.watch = Watch(self.device)
        self.tracker: Tracker | None = None
        self._stop = Stop()
        self._stopping = False
        self._batches: Generator[Loaded, None, None] | None = None

    def _make_distiller(self, teacher: TaskModel | None) -> Distiller | None:
        if teacher is None:
            return None
        settings = distilled(self.config, self.student, teacher)
        if self.config.teacher_cache is not None:
            layers, bf16 = settings["teacher_layers"], uses_bf16(self.config, self.device)
            with ranks.together():
                self.cached = CachedTeacher(
                    teacher, self.config, self.data, layers, digest=self.teacher_digest, bf16=bf16
                )
        taught_by = self.cached or teacher
        distiller = Distiller(self.student, taught_by, modules=MODULES, **settings)
        return distiller.to(self.device)

    def _make_meter(self, teacher: TaskModel | None) -> RewardMeter | None:
        if self.distiller is None or teacher is None:
            return None
        batches = reward_batches(self.config, self.data.train)
        costs = [1.0] * len(self.space.arms)
        if self._rewarded and self.config.reward_cost == "flops":
            costs = arm_costs(
                self.student.coca.config,
                teacher.coca.config,
                self.data,
                self.data.train.load(batches[0]).batch,
                self.space.arms,
                **distilled(self.config, self.student, teacher),
            )
        return RewardMeter(self.config, self.data, self.distiller, batches, self.space, costs)

    def _make_optimizer(self) -> Adafactor:
        """The head apart, at its own rate; the teacher in none of the groups."""
        head = [p for p in self.student.head.parameters() if p.requires_grad]
        in_head = set(map(id, head))
        rest = [p for p in self.student.parameters() if p.requires_grad and id(p) not in in_head]
        rest += self.cells.parameters()
        if self.distiller is not None:
            rest += self.distiller.parameters()
        groups = [{"params": rest, "peak": self.config.lr}]
        if head:
            groups.append({"params": head, "peak": self.config.head_lr})
        return Adafactor(groups, weight_decay=self.config.weight_decay)

    def _make_policy(self) -> tuple[bandit.Policy | None, tuple[str, ...]]:
        """A policy that chooses each round, or the arm of every round."""
        config = self.config
        if config.method in ("kd", "finetune"):
            return None, ()
        if config.method in ("layerwise", "balanced"):
            return None, MODULES
        if config.method == "fixed":
            assert config.arm is not None
            return None, parse_arm(config.arm, self.student.layer_counts)
        return policies.make(config, self.space), ()

    # ------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Train to the last step, from wherever this trainer stands.

        Raises:
            Interrupted: Ctrl-C; a checkpoint was saved.
            UserError: a loss or gradient is not finite, which is seen at the next log line, or a
                file cannot be written.
        """
        config = self.config
        assert config.log_every and config.eval_every and config.checkpoint_every
        first, began = self.step, time.monotonic()
        name = "training" if self.distiller is None else "distilling"
        with (
            self._stop.caught(),
            self.display.stage(name, self.steps, first) as stage,
            self._reading_ahead(),
            self._tracked(),
        ):
            while self.step < self.steps:
                if self.distiller is not None and self.step % self._round_steps == 0:
                    self._begin_round()
                losses = self._train_step()
                self.step += 1
                at_end = self.step == self.steps
                if self.distiller is not None and (self.step % self._round_steps == 0 or at_end):
                    self._end_round()
                if self.step % config.log_every == 0 or at_end:
                    self._log(losses, stage, (time.monotonic() - began) / (self.step - first))
                if self.step % config.eval_every == 0 and not at_end:
                    self._evaluate()
                late = time.monotonic() - STARTED > 3600 * (config.max_hours or math.inf)
                self._stop.asked |= late
                # all processes were told of the same step, where there are several
                stopping = self._stopping if self.parts > 1 else self._stop.asked
                if self.step % config.checkpoint_every == 0 or at_end or stopping:
                    self.save()
                if stopping and not at_end:
                    raise Interrupted(f"stopped after step {self.step} of {self.steps}")

    @property
    def _round_steps(self) -> int:
        assert self.config.round_steps is not None
        return self.config.round_steps

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[None]:
        if not ranks.is_first():
            yield
            return
        self.tracker = Tracker(self.run, self.config, self.step + 1)
        try:
            yield
        finally:
            self.tracker.close()

    @contextlib.contextmanager
    def _reading_ahead(self) -> Iterator[None]:
        """End the processes that read images, however it is left, and keep what was computed."""
        try:
            with killed_workers():
                yield
        finally:
            if self.cached is not None:
                self.cached.flush()
            if self._batches is not None:
                self._batches.close()
                self._batches = None

    def _next_parts(self) -> list[Loaded]:
        """What of the step's batch this process works on."""
        if self._batches is None:
            self._batches = loader.batches(self.config, self.data.train, self.sampler, self.step)
        found = [next(self._batches) for _ in range(self.config.accumulate)]
        for loaded in found:
            self.data.train.note(loaded.errors)
        return found

    def _agree(self, found: Sequence[Loaded]) -> list[Shares | None]:
        """What share of the batch each part is, once all processes know of each other's.

        They tell each other too what is left out, and whether one of them is asked to stop.
        """
        first = ranks.number() * len(found)
        sizes = [self.sampler.size(first + i, self.parts) for i in range(len(found))]
        left_out: float = sum(sizes) - sum(len(loaded.index) for loaded in found)
        if self.parts == 1:
            self.left_out += int(left_out)
            return [None]
        held = [self.engine.step.shares_of(loaded.batch) for loaded in found]
        own = [sum(column) for column in zip(*(x.numbers() for x in held), strict=True)]
        stop, left_out, *whole = ranks.total([self._stop.asked, left_out, *own])
        self._stopping = bool(stop)
        self.left_out += int(left_out)
        return [x.of(whole) for x in held]

    def _train_step(self) -> StepLosses:
        began = self.clock()
        config = self.config
        assert config.warmup_steps is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(
                self.step, peak=group["peak"], warmup=config.warmup_steps, steps=self.steps
            )
        found = self._next_parts()
        shares = self._agree(found)
        self.student.train()
        done = []
        for i, loaded in enumerate(found):
            if config.dropout:
                self._seed(i)
            batch = to_device(loaded.batch, self.device, wait=False)
            step = self.step, batch, self.arm, shares[i]
            last = i == len(found) - 1
            with self._seeing(loaded.index):
                done.append(self.engine.backward(*step, last=last, under=self._autocast()))
        losses = added(done)
        losses = losses._replace(total=ranks.summed(losses.total))
        if self.balance is not None:
            self.balance.update(ranks.summed(self.balance.terms(losses)))
        norm = ranks.whole(
            nn.utils.clip_grad_norm_(
                [p for group in self.optimizer.param_groups for p in group["params"]], config.clip
            )
        )
        examples = torch.cat([loaded.index for loaded in found])
        good = self.watch.note(self.step + 1, losses, norm, examples)
        self.optimizer.step(good=good)
        self.optimizer.zero_grad()
        self.seconds["distill"] += self.clock() - began
        return losses

    def _seeing(self, examples: Tensor) -> contextlib.AbstractContextManager[None]:
        """Tell a teacher that is cached what the batch is of."""
        if self.cached is None:
            return contextlib.nullcontext()
        return self.cached.seeing(examples)

    def _seed(self, turn: int) -> None:
        """Draw dropout anew for a part of a step, whatever was drawn before it."""
        part = ranks.number() * self.config.accumulate + turn
        seeds = np.random.SeedSequence([self.config.seed, self.step, part])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if uses_bf16(self.config, self.device):
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _check(self) -> None:
        """Wait for the device, and stop if a step was not finite: none was taken from it on."""
        began = self.clock()
        bad = self.watch.read()
        self.seconds["distill"] += self.clock() - began
        if bad is None:
            return
        # all processes find the same step bad, and one of them at least a term of it
        bad = min(ranks.gathered(bad), key=lambda found: found.terms == [GRADIENT])
        path = self.run.folder / "nonfinite.json"
        report = {"step": bad.step, "terms": bad.terms, "examples": bad.examples}
        last = checkpoints.latest_checkpoint(self.run.checkpoints)
        kept = f"last good checkpoint: {last}" if last else "there is no checkpoint yet"
        with ranks.together():
            checkpoints.write_json(path, report)
            raise UserError(
                f"step {bad.step}: {bad.terms[0]} is {bad.value}, so no step was taken from there "
                f"on; training examples {', '.join(map(str, bad.examples[:4]))}, ... (all in "
                f"{path}); {kept}; a lower --lr (--teacher-lr where it is the teacher that trains) "
                "may help"
            )

    # ------------------------------------------------------------------ rounds of the bandit

    def _begin_round(self) -> None:
        self.round_began = self._busy
        if self.policy is not None:
            if self.before is None and self._rewarded:
                self.before = self._measure()
                self._observe()
            self.choice = self.policy.select()
            self.arm = self.space.arms[self.choice]
        if self.arm:
            name = arm_name(self.arm)
            self.pulls[name] = self.pulls.get(name, 0) + 1

    @property
    def _rewarded(self) -> bool:
        return self.config.rewarded

    @property
    def _busy(self) -> float:
        """Seconds of training and of measuring rewards so far."""
        return self.seconds["distill"] + self.seconds["reward"]

    def _end_round(self) -> None:
        self.round += 1
        if self.policy is None:
            return
        line: dict[str, Any] = {
            "step": self.step,
            "round": self.round,
            "arm": arm_name(self.arm),
            "choice": self.choice,
        }
        if self._rewarded:
            assert self.meter is not None and self.before is not None
            after = self._measure()
            line |= self.meter.record(self.choice, self.before, after)
            self.before = after
        self.policy.update(self.choice, line.get("reward", 0.0))
        if self._rewarded:
            self._observe()
            line |= {
                "means": list(self.policy.mean),
                "counts": list(self.policy.count),
                "spreads": list(self.policy.spread),
            }
        line["seconds"] = self._busy - self.round_began
        self._write(line)

    def _observe(self) -> None:
        """Tell a policy that can use it what every arm is worth, where that is known."""
        assert self.meter is not None
        if self.meter.known is not None and isinstance(self.policy, bandit.Greedy):
            self.policy.observe(self.meter.known.rewards())

    def _measure(self) -> Measurement:
        """The losses of the full model on the reward's examples."""
        assert self.meter is not None
        self._check()
        began = self.clock()
        meter = self.meter
        measured = self.engine.during(lambda: meter.measure(self.device))
        self.seconds["reward"] += self.clock() - began
        return measured

    def reward_summary(self) -> dict[str, Any] | None:
        """What the rewards were measured on and what that cost; None where there were none."""
        if not self._rewarded or self.meter is None:
            return None
        config, seconds = self.config, self.seconds["reward"]
        return {
            "name": config.reward,
            "clip": config.reward_clip,
            "cost": config.reward_cost,
            "split": config.reward_split,
            "examples": self.meter.examples,
            "batches": len(self.meter.batches),
            "seconds": seconds,
            "share": seconds / max(sum(self.seconds.values()), 1e-9),
        }

    # ------------------------------------------------------------------ what is seen and saved

    def _write(self, line: dict[str, Any]) -> None:
        self.run.append_metrics(line)
        if self.tracker is not None:
            self.tracker.add(line)

    def _log(self, losses: StepLosses, stage: Stage, seconds_a_step: float) -> None:
        assert self.config.batch_size is not None
        self._check()
        # the total was added up in the step
        losses = losses.terms(ranks.summed)._replace(total=losses.total)
        rate = self.config.batch_size * self.data.train.group / seconds_a_step
        line: dict[str, Any] = {
            "step": self.step,
            "round": self.round,
            "arm": arm_name(self.arm),
            "loss": float(losses.total),
            "prediction": float(losses.prediction),
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": rate,
        }
        if self.left_out:
            line["left_out"] = self.left_out
        if losses.kl is not None:
            line["kl"] = float(losses.kl)
        for name, layers in (("hidden", losses.hidden), ("attention", losses.attention)):
            if layers is not None:
                sums: dict[str, float] = {}
                for pair, value in zip(losses.pairs, layers.tolist(), strict=True):
                    sums[pair.module] = sums.get(pair.module, 0.0) + value
                line[name] = sums
        if self.balance is not None:
            means = self.balance.means().tolist()
            line["divided_by"] = dict(zip(self.balance.names, means, strict=True))
        self._write(line)
        shown: dict[str, str | dict[str, float]] = {"loss": f"{line['loss']:.3f}"}
        if self.last_metric is not None:
            shown[self.data.metric_name] = f"{self.last_metric:.3f}"
        if self.policy is not None:
            rounds = max(1, sum(self.pulls.values()))
            shown["arms"] = {name: pulls / rounds for name, pulls in self.pulls.items()}
        shown["samples/s"] = f"{rate:.0f}"
        terms = ("prediction", "kl", "hidden", "attention")
        stage.update(self.step, shown, {x: _in_words(line[x]) for x in terms if x in line})

    def _evaluate(self) -> None:
        self._check()
        metrics = self.evaluate(self.data.validation)
        self.last_metric = metrics[self.data.metric_name]
        line = {"step": self.step, "validation": metrics, "seconds": self._busy}
        self._write(line)
        best = -math.inf if self.best_metric is None else self.best_metric
        if self.config.keep == "best" and self.last_metric > best:
            self.best_metric, self.kept_step = self.last_metric, self.step
            checkpoints.save_weights(self.run.best_path(self.step), self.student)

    def finish(self) -> float:
        """Take the student that is kept; its metric on the validation split."""
        metric = self.evaluate(self.data.validation)[self.data.metric_name]
        if self.best_metric is None or metric >= self.best_metric:
            self.kept_step = self.step
            return metric
        ranks.gathered(None)  # the file is written
        state = checkpoints.read_weights(self.run.best_path(self.kept_step))
        load_weights(self.student, state)
        return self.best_metric

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the student as it is now."""
        began = self.clock()
        metrics = self.engine.during(
            lambda: predicting.evaluate(self.data, self.student, split, self.device)
        )
        self.seconds["eval"] += self.clock() - began
        return metrics

    def save(self) -> Path:
        """Write a checkpoint, see :func:`optima_fast.training.snapshot.save`."""
        self._check()
        path = snapshot.save(self)
        for old in self.run.checkpoints.glob("best-*.safetensors") if ranks.is_first() else ():
            if old != self.run.best_path(self.kept_step):
                old.unlink(missing_ok=True)
        return path

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, see :func:`optima_fast.training.snapshot.restore`."""
        snapshot.restore(self, path)
        if self.policy is not None and self.step % self._round_steps:
            self.arm = self.space.arms[self.choice]


def _in_words(loss: float | dict[str, float]) -> str:
    """A term of the loss, of all modules or of each."""
    if isinstance(loss, float):
        return f"{loss:.3f}"
    return "  ".join(f"{module} {value:.3f}" for module, value in loss.items())
