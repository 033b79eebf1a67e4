"""The reward of a round: fixed training examples, measured before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optima_fast.distill import Distiller, Headroom, Measurement, parse_reward
from optima_fast.distill.arms import Arm
from optima_fast.distill.measurement import average
from optima_fast.distill.reward import HEADROOM, Context
from optima_fast.errors import UserError
from optima_fast.tasks import Split, TaskData
from optima_fast.tasks.split import Loaded, to_device
from optima_fast.training.config import TrainConfig
from optima_fast.training.sampler import Sampler


def reward_examples(config: TrainConfig, split: Split) -> Tensor:
    """Indices of the examples that every round's reward is measured on, drawn once by the seed."""
    assert config.reward_examples
    runs = min(max(1, config.reward_examples // split.group), len(split) // split.group)
    # a seed of its own, so that they are not the first batch
    return Sampler(split, runs, config.seed + 1).at(0)


def reward_batches(config: TrainConfig, split: Split) -> tuple[Tensor, ...]:
    """The examples in parts of one batch size."""
    assert config.batch_size
    return torch.split(reward_examples(config, split), config.batch_size * split.group)


def training_sampler(config: TrainConfig, split: Split) -> Sampler:
    """What the student trains on: everything, or all but the reward's images.

    With ``--reward-split held-out`` neither the reward's examples nor any other that shows one of
    their images is trained on.

    Raises:
        UserError: too few images are left for a batch.
    """
    assert config.batch_size
    without = None
    if config.reward_split == "held-out":
        seen = torch.zeros(len(split.images), dtype=torch.bool)
        seen[split.image_index[reward_examples(config, split)]] = True
        shows = seen[split.image_index].any(1)
        without = shows.view(-1, split.group).any(1)
    return Sampler(split, config.batch_size, config.seed, without=without)


class RewardMeter:
    """Measures the full model, and turns two measurements into the reward of a round.

    Args:
        config: resolved settings.
        data: the task.
        distiller: measures one batch.
        batches: indices of the training examples to measure on.
        arms: of the bandit.
        costs: of each arm, which divide the reward; see
            :func:`optima_fast.training.cost.arm_costs`.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TaskData,
        distiller: Distiller,
        batches: Sequence[Tensor],
        arms: Sequence[Arm],
        costs: Sequence[float],
    ) -> None:
        assert config.reward
        self._data, self._distiller = data, distiller
        self._reward, self._clip = None, config.reward_clip
        self.headroom = None
        if config.reward == HEADROOM:
            matched = {name: len(pairs) for name, pairs in distiller.pairs.items()}
            self.headroom = Headroom(arms, costs, matched, output=distiller.modules_matched[-1])
        else:
            self._reward = parse_reward(config.reward)
        self.batches, self.costs = tuple(batches), tuple(costs)
        self._kept: list[Loaded] = []

    @property
    def examples(self) -> int:
        """Number of examples in the batches."""
        return sum(map(len, self.batches))

    def measure(self, device: torch.device) -> Measurement:
        """All losses of the full model on the fixed examples."""
        parts = []
        for loaded in self._examples():
            batch = to_device(loaded.batch, device)
            # float32 whatever the training runs in: a round changes a loss by parts of a thousand
            measured = self._distiller.measure(
                batch, predict=self._data.loss, divergence=self._data.divergence
            )
            parts.append((measured, len(loaded.index)))
        measurement = average(parts)
        if self.headroom is not None:
            self.headroom.measured(measurement)
        return measurement

    def _examples(self) -> list[Loaded]:
        """The fixed examples in batches, read once and kept, as every round asks for them."""
        if not self._kept:
            read = [self._data.train.load(examples) for examples in self.batches]
            for loaded in read:
                self._data.train.note(loaded.errors)
            self._kept = [loaded for loaded in read if loaded.batch]
        if not self._kept:
            raise UserError("none of the images that the reward is measured on can be read")
        return self._kept

    def record(self, choice: int, before: Measurement, after: Measurement) -> dict[str, Any]:
        """What a round of arm ``choice`` earned, with all that it was computed from."""
        losses = after._asdict()
        layers = {
            "hidden": losses.pop("hidden_layers"),
            "attention": losses.pop("attention_layers"),
            "unexplained": losses.pop("unexplained"),
        }
        line = {"cost": self.costs[choice], "losses": losses, "layers": layers}
        if self.headroom is not None:
            rewards = self.headroom.rewards()
            left = self.headroom.layers()
            return {"reward": rewards[choice], "rewards": rewards, "headroom": left, **line}
        assert self._reward is not None
        context = Context(clip=self._clip, cost=self.costs[choice])
        reward, drops = self._reward(before, after, context)
        return {"reward": reward, "drops": drops, **line}
