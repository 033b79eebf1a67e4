"""Balancing by the size of losses, against its formula in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from teaching import BATCH, DATA, model

from optima_fast import Distiller
from optima_fast.distill import Balance, StepLosses
from optima_fast.models import MODULES

B = 0.75
WEIGHTS = [
    {"hidden_weight": 0.7, "attention_weight": 0.3},
    {"hidden_weight": 0.7, "attention_weight": 0.3, "reduction": "mean"},
    {
        "hidden_weight": {"image": [0.5, 2.0], "text": 1.0, "multimodal": 0.25},
        "attention_weight": 0.1,
    },
]


def distiller(**settings) -> Distiller:
    torch.manual_seed(0)
    settings = {"prediction_weight": 2.0, "kl_weight": 0.5, **settings}
    return Distiller(model("digits_student"), model("digits_teacher"), **settings)


def step(d: Distiller) -> StepLosses:
    return d(BATCH, MODULES, predict=DATA.loss, divergence=DATA.divergence)


def by_hand(d: Distiller, losses: StepLosses) -> list[torch.Tensor]:
    """The terms from layers and weights, each by itself."""
    count = len(losses.pairs) if d.hidden.reduction == "mean" else 1
    modules = {name: torch.zeros(()) for name in MODULES}
    for i, pair in enumerate(losses.pairs):
        hidden = d.hidden.weight(pair) * losses.hidden[i]
        attention = d.attention.weight(pair) * losses.attention[i]
        modules[pair.module] = modules[pair.module] + (hidden + attention) / count
    return [losses.prediction, losses.kl, *modules.values()]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_steps_and_gradients_are_those_of_the_formula(weights):
    d = distiller(**weights)
    balance = Balance(d, decay=B)
    student = list(d.student.parameters())
    past: list[list[float]] = []
    for _ in range(4):
        losses = step(d)
        terms = by_hand(d, losses)
        means = [1.0] * 5
        if past:
            ages = [B ** (len(past) - 1 - s) for s in range(len(past))]
            columns = list(zip(*past, strict=True))
            means = [sum(a * x for a, x in zip(ages, c, strict=True)) / sum(ages) for c in columns]
        factors = [2.0, 0.5, 1.0, 1.0, 1.0]
        want = sum(f * t / m for f, t, m in zip(factors, terms, means, strict=True))
        total = balance(losses)
        torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)
        given = torch.autograd.grad(total, student, retain_graph=True, allow_unused=True)
        for g, w in zip(given, torch.autograd.grad(want, student, allow_unused=True), strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
        balance.update(balance.terms(losses.terms(torch.Tensor.detach)))
        past.append([t.item() for t in terms])
        with torch.no_grad():  # another student, so that losses differ from step to step
            for p in student:
                p.mul_(0.9)
    assert past[0] != past[1]


def test_after_a_step_each_term_of_the_same_step_counts_one():
    d = distiller(kl_weight=0.0, prediction_weight=1.0)
    balance = Balance(d)
    losses = d(BATCH, MODULES, predict=DATA.loss)
    balance.update(balance.terms(losses))
    assert not balance.sums.requires_grad
    assert balance(losses).item() == pytest.approx(4.0)  # the task and three modules
    assert balance.names == ("prediction", *MODULES)


def test_a_module_of_weight_0_adds_nothing():
    none = {"image": 0.0, "text": 1.0, "multimodal": 1.0}
    d = distiller(kl_weight=0.0, hidden_weight=none, attention_weight=none)
    balance = Balance(d)
    losses = d(BATCH, MODULES, predict=DATA.loss)
    balance.update(balance.terms(losses))
    assert balance(losses).item() == pytest.approx(2.0 + 2.0)
