"""What the tests of training share."""

from __future__ import annotations

import pytest

from optima_fast.training import trainer
from optima_fast.training.cost import arm_costs

COUNTED: dict[object, list[float]] = {}


@pytest.fixture(autouse=True)
def _costs_are_counted_once(monkeypatch):
    """Costs of arms are a function of shapes, and counting them takes longer than a small run."""

    def counted(student, teacher, data, batch, arms, **settings):
        shapes = tuple((name, value.shape, value.dtype) for name, value in sorted(batch.items()))
        head = (data.head, data.num_classes)
        key = (student, teacher, head, shapes, tuple(arms), repr(sorted(settings.items())))
        if key not in COUNTED:
            COUNTED[key] = arm_costs(student, teacher, data, batch, arms, **settings)
        return COUNTED[key]

    monkeypatch.setattr(trainer, "arm_costs", counted)
