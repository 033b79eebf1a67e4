"""The learning rate over a run."""

from __future__ import annotations

from itertools import pairwise

import pytest

from optima_fast.training.schedule import lr_at


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (1, 10), (5, 50), (9, 10)])
def test_up_to_the_peak_then_evenly_down_to_nothing(warmup, steps):
    rates = [lr_at(s, peak=2.0, warmup=warmup, steps=steps) for s in range(steps)]
    assert max(rates) == rates[max(0, warmup - 1)] == 2.0
    rise = [b - a for a, b in pairwise(rates[:warmup])]
    assert all(r == pytest.approx(2.0 / warmup) for r in rise)
    fall = [a - b for a, b in pairwise(rates[warmup:])]
    assert all(f == pytest.approx(2.0 / (steps - warmup)) for f in fall)
    assert rates[-1] == pytest.approx(2.0 / (steps - warmup))
    assert min(rates) > 0.0
