"""The gate by gradients, against gradients of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from teaching import BATCH, DATA, model

from optima_fast import Distiller, bandit
from optima_fast.distill import GradientCosine, arm_space
from optima_fast.models import MODULES


@pytest.fixture
def distiller() -> Distiller:
    torch.manual_seed(0)
    return Distiller(model("digits_student"), model("digits_teacher"), kl_weight=0.5)


def gate(d: Distiller, kind: str = "modules") -> GradientCosine:
    return GradientCosine(d, arm_space(kind, d.student.layer_counts))


def measured(d: Distiller, kind: str = "modules") -> list[float]:
    return gate(d, kind).measure(BATCH, predict=DATA.loss, divergence=DATA.divergence)


def by_hand(d: Distiller, unit: str) -> float:
    student = d.student.eval()
    parameters = list(student.parameters())
    step = d(BATCH, (unit,), predict=DATA.loss, divergence=DATA.divergence)
    own = step.hidden.sum() + 1e-2 * step.attention.sum()
    rows = []
    for loss in (step.prediction, own):
        rows.append(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    both = [(a, b) for a, b in zip(*rows, strict=True) if a is not None and b is not None]
    assert 0 < len(both) < len(parameters)
    task, own = (torch.cat([pair[i].flatten() for pair in both]) for i in range(2))
    return float(torch.cosine_similarity(task.double(), own.double(), dim=0))


@pytest.mark.parametrize("kind", ["modules", "layer-groups:2"])
def test_cosines_are_those_of_the_shared_parameters(distiller, kind):
    found = measured(distiller, kind)
    units = arm_space(kind, distiller.student.layer_counts).units
    assert found == pytest.approx([by_hand(distiller, unit) for unit in units], rel=1e-4, abs=1e-6)
    assert len({*found}) == len(units)


def test_measuring_changes_nothing(distiller):
    student = distiller.student.train()
    before = {n: p.clone() for n, p in student.state_dict().items()}
    measured(distiller)
    assert student.training
    assert all(torch.equal(p, before[n]) for n, p in student.state_dict().items())
    assert all(p.grad is None for p in (*student.parameters(), *distiller.parameters()))


def test_a_module_of_weight_0_has_cosine_0():
    none = {"image": 0.0, "text": 1.0, "multimodal": 1.0}
    pair = model("digits_student"), model("digits_teacher")
    d = Distiller(*pair, hidden_weight=none, attention_weight=none)
    found = measured(d)
    assert found[0] == 0.0
    assert all(found[1:])


@pytest.mark.parametrize(
    ("cosines", "chosen"),
    [
        ([0.1, -0.2, 0.3], ("image", "multimodal")),
        ([0.1, 0.2, 0.3], MODULES),
        ([-0.1, 0.2, -0.3], ("text",)),
        ([-0.3, -0.2, -0.1], ("multimodal",)),
    ],
)
def test_greedy_takes_the_modules_that_agree_or_the_one_that_disagrees_least(
    distiller, cosines, chosen
):
    g = gate(distiller)
    g.update(cosines)
    policy = bandit.Greedy(len(g.rewards()))
    policy.observe(g.rewards())
    space = arm_space("modules", distiller.student.layer_counts)
    assert space.arms[policy.select()] == tuple(chosen)
    assert g.told() == {"cosines": dict(zip(MODULES, cosines, strict=True))}
    again = gate(distiller)
    again.load_state_dict(g.state_dict())
    assert (again.rewards(), again.turn) == (g.rewards(), 1)
