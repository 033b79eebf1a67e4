"""The reward of a round: fixed training examples, measured before and after it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optima_fast.distill import Distiller, GradientCosine, Headroom, Measurement, parse_reward
from optima_fast.distill.arms import ArmSpace
from optima_fast.distill.measurement import average
from optima_fast.distill.reward import COSINE, HEADROOM, Context, terms_of
from optima_fast.distill.taught import Taught
from optima_fast.errors import UserError
from optima_fast.tasks import Split, TaskData
from optima_fast.tasks.split import Batch, Loaded, to_device
from optima_fast.training import ranks
from optima_fast.training.config import TrainConfig
from optima_fast.training.sampler import Sampler

log = logging.getLogger(__name__)


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
        space: the arms of the bandit.
        costs: of each arm, which divide the reward; see
            :func:`optima_fast.training.cost.arm_costs`.

    Attributes:
        batches: as given.
        costs: as given.
        known: what is known of every arm, for ``--reward headroom`` and ``gradient-cosine``.
        kept_bytes: of what the teacher said of the batches, kept on the device.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TaskData,
        distiller: Distiller,
        batches: Sequence[Tensor],
        space: ArmSpace,
        costs: Sequence[float],
    ) -> None:
        assert config.reward
        self._data, self._distiller = data, distiller
        self._reward, self._clip = None, config.reward_clip
        self.known: Headroom | GradientCosine | None = None
        if config.reward == HEADROOM:
            matched = {name: len(pairs) for name, pairs in distiller.pairs.items()}
            output = distiller.modules_matched[-1]
            self.known = Headroom(space.arms, costs, matched, output=output)
        elif config.reward == COSINE:
            self.known = GradientCosine(distiller, space)
        else:
            self._reward = parse_reward(config.reward)
        self.batches, self.costs = tuple(batches), tuple(costs)
        self._sharded = config.fsdp
        self._terms = terms_of(config.reward)
        self._examples: dict[int, Loaded] = {}
        self._room = int(config.reward_memory * 2**30)
        self._taught: dict[int, Taught] = {}
        self._told = False
        self.kept_bytes = 0

    @property
    def examples(self) -> int:
        """Number of examples in the batches."""
        return sum(map(len, self.batches))

    def measure(self, device: torch.device) -> Measurement:
        """The losses of the full model on the fixed examples: the mean over :meth:`part` of all.

        Processes share the batches and tell each other what they found, so that all know the same.

        Raises:
            UserError: none of their images can be read.
        """
        numbers = range(len(self.batches))
        # where models are sharded, each process runs whatever the others do
        own = numbers if self._sharded else numbers[ranks.number() :: ranks.count()]
        found: dict[int, tuple[Measurement, int] | None] = {}
        for each in ranks.gathered({number: self.part(number, device) for number in own}):
            found |= each
        parts = [part for number in numbers if (part := found[number]) is not None]
        if not parts:
            raise UserError("none of the images that the reward is measured on can be read")
        measurement = average(parts)
        if isinstance(self.known, Headroom):
            self.known.measured(measurement)
        elif self.known is not None:
            readable = [number for number in numbers if found[number] is not None]
            batch = self._loaded(readable[self.known.turn % len(readable)]).batch
            self.known.update(ranks.of_first(lambda: self._cosines(to_device(batch, device))))
        return measurement

    def _cosines(self, batch: Batch) -> list[float]:
        assert isinstance(self.known, GradientCosine)
        return self.known.measure(batch, predict=self._data.loss, divergence=self._data.divergence)

    def part(self, number: int, device: torch.device) -> tuple[Measurement, int] | None:
        """The measurement on one of the batches, and how many examples of it could be read.

        It does not depend on the other batches. None where no example could be read.
        """
        loaded = self._loaded(number)
        if not loaded.batch:
            return None
        batch = to_device(loaded.batch, device)
        # float32 whatever the training runs in: a round changes a loss by parts of a thousand
        measured = self._distiller.measure(
            batch,
            predict=self._data.loss,
            divergence=self._data.divergence,
            terms=self._terms,
            taught=self._teacher_on(number, batch),
        )
        return measured, len(loaded.index)

    def _loaded(self, number: int) -> Loaded:
        """A batch, read once and kept, as every round asks for it."""
        if number not in self._examples:
            loaded = self._data.train.load(self.batches[number])
            self._data.train.note(loaded.errors)
            self._examples[number] = loaded
        return self._examples[number]

    def _teacher_on(self, number: int, batch: Batch) -> Taught:
        """What the teacher says of a batch, kept where there is room, as it never changes."""
        if number in self._taught:
            return self._taught[number]
        taught = self._distiller.teach(batch, predict=self._data.loss, terms=self._terms)
        if self.kept_bytes + taught.nbytes <= self._room:
            taught = self._taught[number] = taught.own()
            self.kept_bytes += taught.nbytes
        elif not self._told:
            self._told = True
            log.warning(
                "what the teacher says of the %d examples of the reward takes about %.2g GiB, but "
                "--reward-memory is %.2g GiB: the teacher runs again in every round on those that "
                "do not fit",
                self.examples,
                taught.nbytes / len(self.batches[number]) * self.examples / 2**30,
                self._room / 2**30,
            )
        return taught

    def record(self, choice: int, before: Measurement, after: Measurement) -> dict[str, Any]:
        """What a round of arm ``choice`` earned, with all that it was computed from."""
        measured = {name: value for name, value in after._asdict().items() if value is not None}
        found = {
            "hidden": measured.pop("hidden_layers"),
            "attention": measured.pop("attention_layers"),
            "unexplained": measured.pop("unexplained"),
        }
        losses, layers = measured, {name: of for name, of in found.items() if of}
        line = {"cost": self.costs[choice], "losses": losses, "layers": layers}
        if self.known is not None:
            rewards = self.known.rewards()
            told = {"rewards": rewards, **self.known.told()}
            return {"reward": rewards[choice], **told, **line}
        assert self._reward is not None
        context = Context(clip=self._clip, cost=self.costs[choice])
        reward, drops = self._reward(before, after, context)
        return {"reward": reward, "drops": drops, **line}
