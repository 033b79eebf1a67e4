"""The family's bench measures the same loss on both sides."""

from __future__ import annotations

import bench_family
import pytest
import torch
from measuring import relative_error


@pytest.mark.parametrize("name", bench_family.CASES)
def test_contenders_agree(name):
    case, g = bench_family.CASES[name], torch.Generator().manual_seed(0)
    tensors = [torch.randn(*x, generator=g, dtype=torch.float64) for x in case.shapes(2, 9)]
    ours, eager = (
        bench_family.step(loss, tensors, case.trained)() for loss in (case.ours, case.eager)
    )
    assert relative_error(ours, eager) < 1e-12
    assert all(x.abs().sum() > 0 for x in eager)
