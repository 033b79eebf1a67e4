"""Smooth L1 and cosine of hidden states in the kernels of the squared error, against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from quick_interpreter import patch_once

import optima_fast

pytest.importorskip("triton")
from optima_fast.kernels import launch

patch_once()
MEASURES = {
    "smooth_l1": functools.partial(optima_fast.hidden_smooth_l1, beta=0.7),
    "cosine": optima_fast.hidden_cosine,
}
SHAPES = [((2, 19), 12, 24), ((1, 5), 40, 300), ((3, 4), 12, 24)]


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


def run(loss, students, teachers, weights, masks, backend, dtype=None):
    leaves = [
        [x.detach().to(dtype or x.dtype).requires_grad_() for x in xs] for xs in (students, weights)
    ]
    teachers = [x.to(dtype or x.dtype) for x in teachers]
    losses = loss(leaves[0], teachers, leaves[1], mask=masks, backend=backend)
    weighted = (losses * torch.tensor([0.5, -2.0, 3.0], device=losses.device)[: len(losses)]).sum()
    return [losses.detach(), *torch.autograd.grad(weighted, [x for xs in leaves for x in xs])]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_losses_and_gradients(device, measure, dtype, masked):
    given, loss = problem(device, dtype, masked), MEASURES[measure]
    found, exact = run(loss, *given, "triton"), run(loss, *given, "reference", torch.float64)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    for x, y in zip(found, exact, strict=True):
        assert x.isfinite().all()
        assert (x.double() - y).norm() <= bound * y.norm()
    again = run(loss, *given, "triton")
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("width", [64, 40])  # 40: the last part of a tile lies beyond it
def test_persistent_programs(device, monkeypatch, measure, width):
    """Those that load by TMA, as on sm_90."""
    config = launch.LaunchConfig(16, 32, 16, 4, 2, programs=1, split=2)
    monkeypatch.setitem(launch.PRODUCT, (8, 2), config)
    given = [
        [torch.randn(2, 24, 16), torch.randn(1, 40, 16)],
        [torch.randn(2, 24, width), torch.randn(1, 40, width)],
        [torch.randn(16, width) / 4, torch.randn(16, width) / 4],
    ]
    masks = [None, torch.arange(40)[None].to(device) % 3 > 0]
    given = [[x.to(device, torch.float16) for x in xs] for xs in given]
    found, exact = (
        run(MEASURES[measure], *given, masks, backend, kind)
        for kind, backend in ((torch.float16, "triton"), (torch.float64, "reference"))
    )
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).norm() <= 2e-3 * y.norm()


@pytest.mark.parametrize("beta", [1e-3, 1.0, 50.0])
def test_of_both_ends_of_beta(device, beta):
    """All beyond the square, both, and all within it."""
    given = problem(device, torch.float64)
    loss = functools.partial(optima_fast.hidden_smooth_l1, beta=beta)
    found = run(loss, *given, "triton")
    for x, y in zip(found, run(loss, *given, "reference"), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_the_cosine_of_a_state_of_zeros_is_0(device, which):
    """Below the least length the length is a constant, in the gradient too."""
    students, teachers, weights, masks = problem(device, torch.float64)
    for name, layers in (("student", students), ("teacher", teachers)):
        if which in (name, "both"):
            layers[0][0, 3] = 0
            layers[2][1, 1] *= 1e-10
    given = (students, teachers, weights, masks)
    exact = run(optima_fast.hidden_cosine, *given, "reference")
    for backend in ("triton", "blockwise"):
        found = run(optima_fast.hidden_cosine, *given, backend)
        for x, y in zip(found, exact, strict=True):
            torch.testing.assert_close(x, y)
