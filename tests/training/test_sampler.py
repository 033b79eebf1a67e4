"""Which examples a step sees."""

from __future__ import annotations

import pytest
import torch

from optima_fast.errors import UserError
from optima_fast.tasks.split import ArrayImages, Split
from optima_fast.training.sampler import Sampler


def split(images: int, group: int) -> Split:
    return Split(
        ArrayImages(torch.zeros(images, 1, 2, 2, dtype=torch.uint8)),
        torch.ones(images * group, 3, dtype=torch.int64),
        torch.arange(images).repeat_interleave(group),
        torch.zeros(images * group, dtype=torch.int64),
        group=group,
        name="train",
    )


def test_an_epoch_shows_every_example_once_and_runs_stay_together():
    data = split(12, 3)
    sampler = Sampler(data, 4, seed=5)
    steps = [sampler.at(s) for s in range(3)]
    assert sorted(torch.cat(steps).tolist()) == list(range(36))
    for indices in steps:
        for run in indices.view(-1, 3).tolist():
            assert run[0] % 3 == 0
            assert run == [run[0], run[0] + 1, run[0] + 2]


def test_a_step_is_a_function_of_seed_and_step_alone():
    data = split(10, 2)
    forward, backward = Sampler(data, 3, seed=1), Sampler(data, 3, seed=1)
    ahead = [forward.at(s).tolist() for s in range(9)]
    assert [backward.at(s).tolist() for s in reversed(range(9))] == ahead[::-1]
    assert Sampler(data, 3, seed=2).at(0).tolist() != ahead[0]
    assert ahead[0] != ahead[3]  # another epoch, another order


def test_a_batch_larger_than_the_split_is_refused():
    with pytest.raises(UserError, match="--batch-size 11 is more than the 10 images of the train"):
        Sampler(split(10, 2), 11, seed=0)
    with pytest.raises(UserError, match="than the 10 examples of the train split: lower it"):
        Sampler(split(10, 1), 11, seed=0)
