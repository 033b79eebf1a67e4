"""Memory of a step: counted without memory as it is counted on a real step."""

from __future__ import annotations

import pytest
import torch
from small_run import small

from optima_fast.distill import Distiller
from optima_fast.models.task_model import build
from optima_fast.training import cost, experiment, pretence, sources
from optima_fast.training.cost import LiveBytes
from optima_fast.training.trainer import distilled


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("planned"), task="vqa")
    models = sources.plan(config)
    data = experiment.load_data(config, models)
    return config, data, *models.shapes(data)


def batch(data, size=8):
    return data.train.batch(torch.arange(size))


def test_live_bytes_are_of_new_tensors_that_are_still_there():
    held = torch.ones(100)
    with LiveBytes() as live:
        view = held[10:].view(9, 10)
        view.add_(1)
        assert live.now == 0
        double = held * 2
        assert live.now == 400
        rows = double.view(10, 10)
        del double
        assert live.now == 400
        wide = rows.double()
        assert live.now == 1200
        del rows, wide
        assert live.now == 0
        assert torch.ones(50).sum().shape == ()
    assert (live.now, live.peak) == (0, 1200)


@pytest.mark.parametrize("taught", [True, False])
def test_a_pretended_step_holds_what_a_real_one_does(planned, taught):
    config, data, student, teacher = planned
    settings = distilled(config, student, teacher) if taught else {}
    teacher = teacher if taught else None
    held = cost.step_memory(student, teacher, data, batch(data), bf16=False, **settings)

    model = build(student, data.head, data.num_classes)
    parts = [model]
    if teacher is not None:
        parts.append(build(teacher, data.head, data.num_classes))
        parts.append(Distiller(*parts, **settings))
    given = batch(data)
    with LiveBytes() as live:
        if teacher is None:
            loss = pretence.loss(model(given).logits, given)
        else:
            every = parts[-1].modules_matched
            loss = parts[-1](given, every, predict=pretence.loss).total
        loss.backward()
    assert held.weights == sum(p.nbytes for part in parts for p in part.parameters())
    learnt = [model, *parts[2:]]
    assert held.optimizer == sum(
        p.grad.nbytes for part in learnt for p in part.parameters() if p.grad is not None
    )
    assert held.working == live.peak > held.optimizer
    assert held.total == held.weights + held.optimizer + held.working


def test_a_larger_batch_and_wider_numbers_take_more(planned):
    _, data, student, _ = planned
    small_, middle, large = (
        cost.step_memory(student, None, data, batch(data, size), bf16=False).working
        for size in (32, 64, 96)
    )
    assert large - middle == pytest.approx(middle - small_, rel=0.02)
    assert middle > 1.5 * small_
    assert cost.step_memory(student, None, data, batch(data, 96), bf16=True).working < 0.9 * large


def test_nothing_is_drawn_from_the_generator(planned):
    config, data, student, teacher = planned
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    cost.step_memory(student, None, data, batch(data), bf16=False)
    settings = distilled(config, student, teacher)
    cost.distilling_operations(student, teacher, data, batch(data), [None], **settings)
    assert torch.equal(torch.rand(1), expected)
