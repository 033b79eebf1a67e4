"""Layers for the kernels of hidden states: what these and float64 make of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from optima_fast.kernels import hidden_mse as kernel
from optima_fast.kernels import launch

ON_GPU = torch.cuda.is_available()
MARKS = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not ON_GPU, reason="the interpreter multiplies the bit patterns of bfloat16"
        ),
    ),
]
no_float64 = pytest.mark.skipif(ON_GPU, reason="float64 is for gradcheck in the interpreter")
BLOCK_M, BLOCK_N, BLOCK_K = launch.lookup(launch.PRODUCT, (8, 0), 2)[:3]
EDGES = [  # T, d_s, d_t
    (1, 1, 1),
    (3, 5, 7),
    (16, 32, 64),
    (BLOCK_M, BLOCK_K, BLOCK_N),
    (BLOCK_M, BLOCK_K + 1, BLOCK_N),
    (BLOCK_M + 1, BLOCK_K + 1, BLOCK_N + 1),
    (2 * BLOCK_M + 5, BLOCK_N + 3, 2 * BLOCK_N - 1),
    (5, 3 * BLOCK_K - 1, 1),
]
MIXED = [(BLOCK_M + 3, 20, 33), (0, 8, 6), (7, 40, 9), (1, 3, BLOCK_N + 2), (0, 4, 4)]


class Layers(NamedTuple):
    students: list[Tensor]
    teachers: list[Tensor]
    weights: list[Tensor]
    masks: list[Tensor | None]


class Results(NamedTuple):
    losses: list[Tensor]
    d_students: list[Tensor]
    d_weights: list[Tensor]


def make(
    shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: str, masked: bool = False
) -> Layers:
    """Layers; if masked, every second one from the first has a mask, its other rows nan and inf."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = Layers([], [], [], [])
    for i, (tokens, d_s, d_t) in enumerate(shapes):
        student, teacher, weight = normal(tokens, d_s), normal(tokens, d_t), normal(d_s, d_t)
        mask = None
        if masked and i % 2 == 0:
            mask = torch.rand(tokens, generator=generator) < 0.7
            student[~mask] = float("nan")
            teacher[~mask] = float("inf")
            mask = mask.to(device)
        # a mean that is not 0, so that a lost term or factor cannot hide in the noise
        layers.students.append((student + 0.5).to(device, dtype))
        layers.teachers.append((4 * teacher - 1).to(device, dtype))
        layers.weights.append((weight / d_s**0.5).to(device, dtype))
        layers.masks.append(mask)
    return layers


def upstream(layers: Layers) -> Tensor:
    """Gradients that differ from layer to layer and are not 1."""
    student = layers.students[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.linspace(-2.5, 3.0, len(layers.students), dtype=dtype, device=student.device)


def fused(layers: Layers, grad: Tensor) -> Results:
    flags = [True] * len(layers.students)
    losses, residuals, scales = kernel.hidden_mse_forward(*layers, need_residual=True)
    d_students, d_weights = kernel.hidden_mse_backward(
        grad,
        layers.students,
        layers.weights,
        layers.masks,
        residuals,
        scales,
        need_student=flags,
        need_weight=flags,
    )
    return Results(list(losses), d_students, d_weights)


def autograd(layers: Layers, grad: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Plain PyTorch in the inputs' dtype, or in another."""
    results = Results([], [], [])
    for i, (student, teacher, weight, mask) in enumerate(zip(*layers, strict=True)):
        if dtype is not None:
            student, teacher, weight = (x.to(dtype) for x in (student, teacher, weight))
        student, weight = (x.detach().clone().requires_grad_() for x in (student, weight))
        keep = slice(None) if mask is None else mask
        residual = student[keep] @ weight - teacher[keep]
        square = residual.to(torch.promote_types(residual.dtype, torch.float32)).square()
        loss = square.mean() if square.numel() else square.sum()
        loss.backward(grad[i].to(loss.dtype))
        results.losses.append(loss.detach())
        results.d_students.append(student.grad)
        results.d_weights.append(weight.grad)
    return results


def check(layers: Layers, grad: Tensor | None = None) -> Results:
    """Error against float64 <= twice eager's + 2 eps of the result's size, of its own dtype.

    float64 itself has no wider truth: it may differ from eager by 64 eps.
    """
    grad = upstream(layers) if grad is None else grad
    ours, eager = fused(layers, grad), autograd(layers, grad)
    exact = autograd(layers, grad, torch.float64)
    for name in Results._fields:
        rows = zip(getattr(ours, name), getattr(eager, name), getattr(exact, name), strict=True)
        for i, (actual, plain, truth) in enumerate(rows):
            where = f"{name}[{i}]"
            assert actual.shape == truth.shape, where
            if not truth.numel():
                continue
            assert actual.isfinite().all(), where
            error, allowed = ((x.double() - truth).abs().max().item() for x in (actual, plain))
            factor = 64 if layers.students[0].dtype == torch.float64 else 2
            floor = factor * torch.finfo(actual.dtype).eps * truth.abs().max().item()
            assert error <= 2 * allowed + floor, (where, error, allowed, floor)
    return ours
