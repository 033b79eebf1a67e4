"""Smooth L1 of hidden states in the kernels of the squared error, against float64."""

from __future__ import annotations

import pytest
import torch
from quick_interpreter import patch_once

import optima_fast

pytest.importorskip("triton")
from optima_fast.kernels import launch

patch_once()
BETA = 0.7
SHAPES = [((2, 19), 12, 24), ((1, 5), 40, 7), ((3, 4), 12, 24)]


def problem(device, dtype, masked=False):
    g = torch.Generator().manual_seed(0)
    students, teachers, weights, masks = [], [], [], []
    for i, (tokens, d_s, d_t) in enumerate(SHAPES):
        student, teacher = (torch.randn(*tokens, d, generator=g) for d in (d_s, d_t))
        mask = torch.rand(tokens, generator=g) < 0.6 if masked and i != 1 else None
        if mask is not None:
            student[~mask], teacher[~mask] = float("nan"), float("inf")
        students.append(student.to(device, dtype))
        teachers.append(teacher.to(device, dtype))
        weights.append((torch.randn(d_s, d_t, generator=g) * d_s**-0.5).to(device, dtype))
        masks.append(None if mask is None else mask.to(device))
    return students, teachers, weights, masks


def run(students, teachers, weights, masks, backend, dtype=None, beta=BETA):
    leaves = [
        [x.detach().to(dtype or x.dtype).requires_grad_() for x in xs] for xs in (students, weights)
    ]
    teachers = [x.to(dtype or x.dtype) for x in teachers]
    losses = optima_fast.hidden_smooth_l1(
        leaves[0], teachers, leaves[1], mask=masks, beta=beta, backend=backend
    )
    weighted = (losses * torch.tensor([0.5, -2.0, 3.0], device=losses.device)).sum()
    return [losses.detach(), *torch.autograd.grad(weighted, [x for xs in leaves for x in xs])]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_losses_and_gradients(device, dtype, masked):
    given = problem(device, dtype, masked)
    found, exact = run(*given, "triton"), run(*given, "reference", torch.float64)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    for x, y in zip(found, exact, strict=True):
        assert x.isfinite().all()
        assert (x.double() - y).norm() <= bound * y.norm()
    again = run(*given, "triton")
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_persistent_programs(device, monkeypatch):
    """Those that load by TMA, as on sm_90."""
    config = launch.LaunchConfig(16, 32, 16, 4, 2, programs=1, split=2)
    monkeypatch.setitem(launch.PRODUCT, (8, 2), config)
    given = [
        [torch.randn(2, 24, 16), torch.randn(1, 40, 16)],
        [torch.randn(2, 24, 64), torch.randn(1, 40, 64)],
        [torch.randn(16, 64) / 4, torch.randn(16, 64) / 4],
    ]
    given = [[x.to(device, torch.float16) for x in xs] for xs in given]
    students, teachers, weights = given
    found, exact = (
        optima_fast.hidden_smooth_l1(
            *([x.to(kind) for x in xs] for xs in (students, teachers, weights)), backend=backend
        )
        for kind, backend in ((torch.float16, "triton"), (torch.float64, "reference"))
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [1e-3, 1.0, 50.0])
def test_of_both_ends_of_beta(device, beta):
    """All beyond the square, both, and all within it."""
    given = problem(device, torch.float64)
    found = run(*given, "triton", beta=beta)
    for x, y in zip(found, run(*given, "reference", beta=beta), strict=True):
        torch.testing.assert_close(x, y)
